"""Where a backbone's weights come from.

A source is one string:

- ``package:NAME``: the one weight file inside an installed Python package;
- ``file:PATH``: a ``.safetensors``, ``.pth`` or ``.pt`` file;
- ``s3://BUCKET/KEY``: such a file in an object store (endpoint and credentials as boto3 finds them);
- ``hub:TAG``: timm's hub, at a weight tag such as ``hub:in1k`` (the hub's default tag may change).

Files are read without executing pickled code.
"""

import hashlib
import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sprue.errors import SprueError

SUFFIXES = (".safetensors", ".pth", ".pt")

UNREADABLE = (
    SafetensorError,
    UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
"""Raised when a file is read that holds no weights, or more than weights."""


def read_weights(source: str) -> dict[str, Tensor]:
    """Reads the parameters and buffers of a source (any but ``hub:``, which timm reads).

    Raises:
        SprueError: If the source is missing, or not a weight file.
    """
    kind, _, rest = source.partition(":")
    if kind == "s3":
        return _parse(_download(source), source)
    path = _package_file(rest) if kind == "package" else Path(rest).expanduser()
    if not path.is_file():
        raise SprueError(f"features.weights: there is no file {path}")
    return _parse(path.read_bytes(), str(path))


def _package_file(name: str) -> Path:
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise SprueError(f"features.weights: there is no installed package {name!r}; install it with pip")
    folder = Path(next(iter(found.submodule_search_locations)))
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
    if len(files) != 1:
        raise SprueError(f"features.weights: package {name!r} has {len(files)} weight files; expected one")
    return files[0]


def _download(url: str) -> bytes:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = url.removeprefix("s3://").removeprefix("s3:").lstrip("/").partition("/")
    if not bucket or not key:
        raise SprueError(f"features.weights: {url!r} is not s3://BUCKET/KEY")
    try:
        return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    except (BotoCoreError, ClientError) as error:
        raise SprueError(f"features.weights: {url} can't be downloaded: {error}") from error


def _parse(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise SprueError(f"features.weights: {name} is not a weight file, or not safe to read: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SprueError(f"features.weights: {name} does not hold a dictionary of tensors")
    return state


def fill(model: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    """Copies weights into a model: by name or, where no name is the model's, in order.

    `source` and `name` say in messages where the weights come from and what the model is called.

    Raises:
        SprueError: If a shape or a number of tensors differs; the message names the first parameter that does.
    """
    own = model.state_dict()
    if not set(own) & set(state):
        # Some files hold counters of batch-norm steps, which the outputs do not depend on.
        names = [key for key in own if not key.endswith("num_batches_tracked")]
        values = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
        if len(names) != len(values):
            raise SprueError(f"features.weights: {source} has {len(values)} tensors, {name} has {len(names)}")
        state = dict(zip(names, values, strict=True))
    for key, tensor in own.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            raise SprueError(f"features.weights: {source} lacks {key!r} of {name}")
        if state[key].shape != tensor.shape:
            raise SprueError(
                f"features.weights: {key!r} has shape {list(state[key].shape)} in {source} "
                f"and {list(tensor.shape)} in {name}"
            )
    model.load_state_dict({key: state.get(key, value) for key, value in own.items()})


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, names included."""
    return state_digest(model.state_dict())


def state_digest(state: Mapping[str, Tensor]) -> str:
    """The `digest` of a model with these parameters and buffers."""
    sha = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        if not key.endswith("num_batches_tracked"):
            sha.update(f"{key}{list(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def portable_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers as safetensors takes them: on the CPU, contiguous, none shared."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
