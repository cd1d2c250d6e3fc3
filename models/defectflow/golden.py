"""Checks the flows against reference vectors of the papers' networks: ``python -m defectflow.golden FILE.npz ...``.

A file holds one small network as its authors define it: ``meta`` (JSON: the model and its sizes), inputs ``x{i}``,
outputs ``z{i}``, log-determinants, perhaps a ``condition``, and the parameters of each block under the authors'
names. Here the public class is built from it, run forward and back, and the largest differences are printed.

Shapes: B pictures, C channels, H rows, W columns of a node's map.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defectflow.csflow import CSFlow, CSFlowConfig
from defectflow.dnfad import DNFAD, DNFADConfig
from defectflow.flow import Flow
from defectflow.multiflow import MultiFlow, MultiFlowConfig

TOLERANCE = 1e-9
"""Largest difference that passes, in float64."""

Arrays = Mapping[str, Tensor]


@dataclass(frozen=True)
class Differences:
    """Largest absolute differences of the outputs, of the log-determinants, and of the way there and back."""

    outputs: float
    log_dets: float
    round_trip: float

    @property
    def passed(self) -> bool:
        """Whether all are within `TOLERANCE`; a difference that is not a number is not."""
        return all(difference <= TOLERANCE for difference in (self.outputs, self.log_dets, self.round_trip))


def cross_scale_state(subnet: Arrays, scales: int) -> dict[str, Tensor]:
    """A `CrossScaleSubnet`'s parameters from the authors' of CS-Flow."""
    state = {"gamma": torch.cat([subnet[f"gamma{node}"] for node in range(scales)])}
    for node in range(scales):
        sources = [f"conv_scale{node}_1", *([f"up_conv{node + 1}{node}"] if node + 1 < scales else [])]
        state[f"gather.{node}.weight"] = torch.cat([subnet[f"{source}.weight"] for source in sources], dim=1)
        state[f"gather.{node}.bias"] = torch.stack([subnet[f"{source}.bias"] for source in sources]).sum(0)
        for kind in ("weight", "bias"):
            state[f"lift.{node}.{kind}"] = subnet[f"conv_scale{node}_0.{kind}"]
            if node > 0:
                state[f"down.{node - 1}.{kind}"] = subnet[f"down_conv{node - 1}{node}.{kind}"]
    return state


def cross_view_state(subnet: Arrays, neighbours: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A `CrossViewSubnet`'s parameters from the authors' of Multi-Flow."""
    state = {"gamma": torch.cat([subnet[f"gamma{node}"] for node in range(len(neighbours))])}
    for node, sources in enumerate(neighbours):
        own, messages = f"conv_scale{node}_1", [_message(node, source) for source in sources]
        state[f"gather.{node}.weight"] = torch.cat([subnet[f"{name}.weight"] for name in (own, *messages)], dim=1)
        told = [subnet[f"{name}.bias"] / len(messages) for name in messages]
        state[f"gather.{node}.bias"] = torch.stack([subnet[f"{own}.bias"], *told]).sum(0)
        for kind in ("weight", "bias"):
            state[f"lift.{node}.{kind}"] = subnet[f"conv_scale{node}_0.{kind}"]
    return state


def _message(to: int, source: int) -> str:
    """The authors' name of the convolution that carries a view's message to another; a ring's has the source first."""
    if to == 0:
        return f"topview_down{source - 1}"
    return f"topview_up{to - 1}" if source == 0 else f"cross_conv{source}{to}"


def attention_state(subnet: Arrays) -> dict[str, Tensor]:
    """An `AttentionSubnet`'s parameters from the authors' of DNFAD."""
    names = {
        "gamma": "gamma",
        "first.weight": "conv1.weight",
        "first.bias": "conv1.bias",
        "second.weight": "conv2.weight",
        "second.bias": "conv2.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        "attention.kernels": "attention.idconv.weight",
        "attention.biases": "attention.idconv.bias",
        "attention.mixture.0.weight": "attention.idconv.proj.0.weight",
        "attention.mixture.0.bias": "attention.idconv.proj.0.bias",
        "attention.mixture.1.weight": "attention.idconv.proj.1.weight",
        "attention.mixture.1.bias": "attention.idconv.proj.1.bias",
        "attention.combine.weight": "attention.conv1.weight",
    }
    return {ours: subnet[theirs] for ours, theirs in names.items()}


def _kernels(meta: Mapping[str, Any]) -> tuple[int, int]:
    first, last = meta["kernel_sizes"][0], meta["kernel_sizes"][-1]
    if list(meta["kernel_sizes"]) != [first] * (len(meta["kernel_sizes"]) - 1) + [last]:
        raise ValueError(f"kernel_sizes: {meta['kernel_sizes']} are not equal but for the last")
    return first, last


def _csflow(meta: Mapping[str, Any], arrays: Arrays) -> Flow:
    scales = len(meta["sizes"])
    config = CSFlowConfig(
        (meta["channels"],) * scales,
        steps=meta["blocks"],
        hidden=meta["hidden"],
        clamp=meta["clamp"],
        kernels=_kernels(meta),
    )
    return _loaded(CSFlow(config), "blocks", arrays, lambda subnet: cross_scale_state(subnet, scales))


def _multiflow(meta: Mapping[str, Any], arrays: Arrays) -> Flow:
    config = MultiFlowConfig(
        (meta["channels"],),
        views=meta["views"],
        steps=meta["blocks"],
        hidden=meta["hidden"],
        clamp=meta["clamp"],
        kernels=_kernels(meta),
        noise=0.15 if meta["noise_condition"] else 0.0,
    )
    return _loaded(MultiFlow(config), "blocks", arrays, lambda subnet: cross_view_state(subnet, config.neighbours))


def _dnfad(meta: Mapping[str, Any], arrays: Arrays) -> Flow:
    config = DNFADConfig(
        (meta["channels"],),
        steps=meta["blocks"],
        hidden=len(arrays["block0.s1.conv1.weight"]),
        clamp=meta["clamp"],
        position_channels=meta["position_channels"],
        branches=(meta["branch"],),
    )
    return _loaded(DNFAD(config), f"branches.{meta['branch']}", arrays, attention_state)


BUILDERS = {"csflow": _csflow, "multiflow": _multiflow, "dnfad": _dnfad}
"""How the public class of a model is built from a file."""


def _loaded(flow: Flow, chain: str, arrays: Arrays, translate: Any) -> Flow:
    """The flow with the file's parameters."""
    state: dict[str, Tensor] = {}
    for block in range(flow.config.steps):
        prefix = f"block{block}."
        for name in ("s1", "s2"):
            subnet = _below(arrays, f"{prefix}{name}.")
            state |= {f"{chain}.{block}.{name}.{key}": value for key, value in translate(subnet).items()}
        state |= {f"{chain}.{block}.{key}": value for key, value in _below(arrays, f"{prefix}perm", "perm").items()}
    flow = flow.double()
    flow.load_state_dict(state)
    return flow.eval()


def _below(arrays: Arrays, prefix: str, instead: str = "") -> dict[str, Tensor]:
    return {instead + key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


@torch.no_grad()
def compare(path: Path) -> Differences:
    """Builds a file's network, runs it forward and back.

    Raises:
        ValueError: If the file is of an unknown model or lacks an array.
    """
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
    if meta["model"] not in BUILDERS:
        raise ValueError(f"{path}: there is no network {meta['model']!r}; there are: {', '.join(sorted(BUILDERS))}")
    try:
        flow = BUILDERS[meta["model"]](meta, arrays)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the arrays of a {meta['model']} network: {error}") from error
    inputs = [arrays[f"x{node}"] for node in range(sum(name[0] == "x" and name[1:].isdigit() for name in arrays))]
    condition = None
    if "condition" in arrays:
        condition = [arrays["condition"].expand(len(inputs[0]), -1, -1, -1)] * len(inputs)
    latents, log_dets = flow(inputs, condition)
    restored = flow.inverse(latents, condition)
    expected = [arrays[f"z{node}"] for node in range(len(inputs))]
    return Differences(_largest(latents, expected), _log_det_difference(log_dets, arrays), _largest(restored, inputs))


def _log_det_difference(log_dets: Sequence[Tensor], arrays: Arrays) -> float:
    """Against what the file gives: a log-determinant for each picture, or for each position of each node."""
    if "logdet" in arrays:
        return _largest([torch.stack([log_det.sum((1, 2)) for log_det in log_dets]).sum(0)], [arrays["logdet"]])
    names = ["logdet_map"] if "logdet_map" in arrays else [f"logdet_map{node}" for node in range(len(log_dets))]
    return _largest(log_dets, [arrays[name] for name in names])


def _largest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())


def main(paths: Sequence[str]) -> int:
    """Prints a line for each file; returns the exit status."""
    if not paths:
        print("usage: python -m defectflow.golden FILE.npz ...", file=sys.stderr)
        return 2
    failed = False
    for path in paths:
        try:
            found = compare(Path(path))
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        verdict = "ok" if found.passed else f"differs by more than {TOLERANCE}"
        print(
            f"{path}: outputs {found.outputs:.1e}, log-determinants {found.log_dets:.1e}, "
            f"there and back {found.round_trip:.1e}: {verdict}"
        )
        failed |= not found.passed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
