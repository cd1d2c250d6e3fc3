"""Finds a flow by the name that recipes and registered models carry."""

from typing import Any

from defectflow.config import config_class
from defectflow.csflow import CSFlow
from defectflow.dnfad import DNFAD
from defectflow.flow import Flow
from defectflow.fusion import Fusion
from defectflow.gaussian import Gaussian
from defectflow.memorybank import MemoryBank
from defectflow.multiflow import MultiFlow
from defectflow.patchflow import PatchFlow

FLOWS: dict[str, type[Flow]] = {
    "csflow": CSFlow,
    "dnfad": DNFAD,
    "fusion": Fusion,
    "gaussian": Gaussian,
    "memorybank": MemoryBank,
    "multiflow": MultiFlow,
    "patchflow": PatchFlow,
}
"""The flows and the baselines by name."""


def build_flow(name: str, **config: Any) -> Flow:
    """Builds an unfitted flow of `FLOWS`; fields of its config that are not given have the published value.

    Raises:
        ValueError: If there is no flow of that name, or a field is unknown or out of range.

    >>> build_flow("patchflow", channels=(8,), adapted=8).config.bottleneck
    128
    >>> build_flow("patchflow", channels=(8,), depth=3)
    Traceback (most recent call last):
    ...
    ValueError: depth: patchflow has no such setting; it has channels, maps, steps, clamp, noise, noise_scheme, adaptor, adapted, bottleneck, neighbourhood, stride
    """  # noqa: E501
    settings = config_class(name, config)(**config)
    return FLOWS[name](settings)
