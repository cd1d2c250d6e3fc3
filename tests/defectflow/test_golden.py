"""The flows reproduce the authors' networks of `golden/*.npz` in float64; `golden/README.md` describes the files.

Shapes: B images, C channels, H rows, W columns of a node's map.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from defectflow import DNFAD, CSFlow, CSFlowConfig, DNFADConfig, MultiFlow, MultiFlowConfig

TOLERANCE = 1e-9
FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.fixture(autouse=True)
def device():
    """Overrides the fixture of conftest: the files are compared on the CPU only."""


class Differences(NamedTuple):
    """Largest absolute differences of latents, log-determinants, and inputs after the inverse."""

    outputs: float
    log_dets: float
    round_trip: float


def cross_scale_state(subnet, scales):
    """A `CrossScaleSubnet`'s parameters from those of CS-Flow's authors."""
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


def cross_view_state(subnet, neighbours):
    """A `CrossViewSubnet`'s parameters from those of Multi-Flow's authors."""
    state = {"gamma": torch.cat([subnet[f"gamma{node}"] for node in range(len(neighbours))])}
    for node, sources in enumerate(neighbours):
        own, messages = f"conv_scale{node}_1", [message_name(node, source) for source in sources]
        state[f"gather.{node}.weight"] = torch.cat([subnet[f"{name}.weight"] for name in (own, *messages)], dim=1)
        biases = [subnet[f"{name}.bias"] / len(messages) for name in messages]
        state[f"gather.{node}.bias"] = torch.stack([subnet[f"{own}.bias"], *biases]).sum(0)
        for kind in ("weight", "bias"):
            state[f"lift.{node}.{kind}"] = subnet[f"conv_scale{node}_0.{kind}"]
    return state


def message_name(to, source):
    """The authors' name of the convolution for the message from one view to another."""
    if to == 0:
        return f"topview_down{source - 1}"
    return f"topview_up{to - 1}" if source == 0 else f"cross_conv{source}{to}"


def attention_state(subnet):
    """An `AttentionSubnet`'s parameters from those of DNFAD's authors."""
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


def kernels(meta):
    """Kernel sides of all blocks but the last, and of the last."""
    first, last = meta["kernel_sizes"][0], meta["kernel_sizes"][-1]
    assert meta["kernel_sizes"] == [first] * (meta["blocks"] - 1) + [last]
    return first, last


def build_csflow(meta, arrays):
    scales = len(meta["sizes"])
    config = CSFlowConfig(
        (meta["channels"],) * scales,
        steps=meta["blocks"],
        hidden=meta["hidden"],
        clamp=meta["clamp"],
        kernels=kernels(meta),
    )
    return load(CSFlow(config), "blocks", arrays, lambda subnet: cross_scale_state(subnet, scales))


def build_multiflow(meta, arrays):
    config = MultiFlowConfig(
        (meta["channels"],),
        views=meta["views"],
        steps=meta["blocks"],
        hidden=meta["hidden"],
        clamp=meta["clamp"],
        kernels=kernels(meta),
        noise=0.15 if meta["noise_condition"] else 0.0,
    )
    return load(MultiFlow(config), "blocks", arrays, lambda subnet: cross_view_state(subnet, config.neighbours))


def build_dnfad(meta, arrays):
    config = DNFADConfig(
        (meta["channels"],),
        steps=meta["blocks"],
        hidden=len(arrays["block0.s1.conv1.weight"]),
        clamp=meta["clamp"],
        position_channels=meta["position_channels"],
        branches=(meta["branch"],),
    )
    return load(DNFAD(config), f"branches.{meta['branch']}", arrays, attention_state)


BUILDERS = {"csflow": build_csflow, "multiflow": build_multiflow, "dnfad": build_dnfad}


def load(flow, chain, arrays, translate):
    """Loads a file's parameters into the flow, in float64."""
    state = {}
    for block in range(flow.config.steps):
        for name in ("s1", "s2"):
            subnet = below(arrays, f"block{block}.{name}.")
            state |= {f"{chain}.{block}.{name}.{key}": value for key, value in translate(subnet).items()}
        permutations = below(arrays, f"block{block}.perm")
        state |= {f"{chain}.{block}.perm{node}": value for node, value in permutations.items()}
    flow = flow.double()
    flow.load_state_dict(state)
    return flow.eval()


def below(arrays, prefix):
    """The arrays whose names start with a prefix, named without it."""
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


@torch.no_grad()
def compare(path):
    """Builds a file's network, and runs it and its inverse."""
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
    flow = BUILDERS[meta["model"]](meta, arrays)
    inputs = [arrays[f"x{node}"] for node in range(sum(name[0] == "x" and name[1:].isdigit() for name in arrays))]
    condition = None
    if "condition" in arrays:
        condition = [arrays["condition"].expand(len(inputs[0]), -1, -1, -1)] * len(inputs)
    latents, log_dets = flow(inputs, condition)
    return Differences(
        outputs=largest_difference(latents, [arrays[f"z{node}"] for node in range(len(inputs))]),
        log_dets=log_det_difference(log_dets, arrays),
        round_trip=largest_difference(flow.inverse(latents, condition), inputs),
    )


def log_det_difference(log_dets, arrays):
    """A file holds the log-determinant of each image, or of each position of each node."""
    if "logdet" in arrays:
        return largest_difference([sum(log_det.sum((1, 2)) for log_det in log_dets)], [arrays["logdet"]])
    names = ["logdet_map"] if "logdet_map" in arrays else [f"logdet_map{node}" for node in range(len(log_dets))]
    return largest_difference(log_dets, [arrays[name] for name in names])


def largest_difference(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_authors_networks_are_reproduced(path):
    differences = compare(path)
    assert differences.outputs <= TOLERANCE
    assert differences.log_dets <= TOLERANCE
    assert differences.round_trip <= TOLERANCE


def test_all_published_networks_are_here():
    assert {path.stem.split("_")[0] for path in FILES} == set(BUILDERS)


@pytest.mark.parametrize("array", ["z1", "logdet", "block1.s2.down_conv12.weight", "block0.perm2"])
def test_a_changed_array_is_found(tmp_path, array):
    with np.load(FILES[0]) as file:
        arrays = {name: file[name] for name in file.files}
    arrays[array] = arrays[array][::-1].copy() if array.endswith("perm2") else arrays[array] + 1e-6
    np.savez(tmp_path / "changed.npz", **arrays)
    assert max(compare(tmp_path / "changed.npz")) > TOLERANCE
