"""Where a backbone's weights come from.

A source is one string:

- ``package:NAME``: the one weight file inside an installed Python package;
- ``file:PATH``: a ``.safetensors``, ``.pth`` or ``.pt`` file;
- ``s3://BUCKET/KEY``: such a file in an object store (endpoint and credentials as boto3 finds them);
- ``hub:TAG``: timm's hub, with the weight tag pinned, such as ``hub:in1k``.

Files are read without executing pickled code.
"""

import hashlib
import io
import pickle
from importlib.util import find_spec
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sprue.errors import SprueError

SUFFIXES = (".safetensors", ".pth", ".pt")

UNREADABLE = (
    safetensors.SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
"""What reading a file that holds no weights, or more than weights, ends in."""


def read_weights(source: str) -> dict[str, Tensor]:
    """Reads the parameters and buffers that a source names (all but ``hub:``).

    Raises:
        SprueError: If the source is malformed, missing, or not a weight file.
    """
    kind, _, rest = source.partition(":")
    if kind == "package":
        path = _package_file(rest)
        return _parse(path.read_bytes(), str(path))
    if kind == "file":
        path = Path(rest).expanduser()
        if not path.is_file():
            raise SprueError(f"features.weights: there is no file {path}")
        return _parse(path.read_bytes(), str(path))
    if kind == "s3":
        return _parse(_download(source), source)
    raise SprueError(
        f"features.weights: {source!r} is not a source; write package:NAME, file:PATH, s3://BUCKET/KEY or hub:TAG"
    )


def _package_file(name: str) -> Path:
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise SprueError(f"features.weights: there is no installed package {name!r}; install it with pip")
    folder = Path(next(iter(found.submodule_search_locations)))
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
    if len(files) != 1:
        raise SprueError(f"features.weights: package {name!r} holds {len(files)} weight files, one is expected")
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
        raise SprueError(f"features.weights: {url} can't be fetched: {error}") from error


def _parse(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise SprueError(f"features.weights: {name} is not a weight file that can be read safely: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SprueError(f"features.weights: {name} does not hold a dictionary of tensors")
    return state


def fill(model: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    """Copies weights into a model: by their names or, where the names are another library's, in order.

    Only names that are all foreign are matched in order, and then every shape has to agree.

    Raises:
        SprueError: If they don't fit; the message names the first parameter that differs.
    """
    own = model.state_dict()
    if not set(own) & set(state):
        # Counters of batch-norm steps are in some files and not in others; they have no part in the outputs.
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
    sha = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if not key.endswith("num_batches_tracked"):
            sha.update(f"{key}{list(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
