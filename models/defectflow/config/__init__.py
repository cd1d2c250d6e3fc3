"""The settings of all flows, a module a flow. Imports no torch, so that settings are checked at once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from defectflow.config.base import Adaptation, CouplingConfig, FlowConfig, NoiseScheme, ScoreType, Shape
from defectflow.config.csflow import CSFlowConfig
from defectflow.config.dnfad import Branch, DNFADConfig
from defectflow.config.fusion import FUSION_TOP, FusionConfig
from defectflow.config.gaussian import GaussianConfig
from defectflow.config.memorybank import MemoryBankConfig
from defectflow.config.multiflow import MultiFlowConfig
from defectflow.config.patchflow import PatchFlowConfig

__all__ = [
    "CONFIGS",
    "FUSION_TOP",
    "Adaptation",
    "Branch",
    "CSFlowConfig",
    "CouplingConfig",
    "DNFADConfig",
    "FlowConfig",
    "FusionConfig",
    "GaussianConfig",
    "MemoryBankConfig",
    "MultiFlowConfig",
    "NoiseScheme",
    "PatchFlowConfig",
    "ScoreType",
    "Shape",
    "config_class",
    "config_for_features",
]

CONFIGS: dict[str, type[FlowConfig]] = {
    "csflow": CSFlowConfig,
    "dnfad": DNFADConfig,
    "fusion": FusionConfig,
    "gaussian": GaussianConfig,
    "memorybank": MemoryBankConfig,
    "multiflow": MultiFlowConfig,
    "patchflow": PatchFlowConfig,
}
"""The configs by the flows' names."""


def config_class(name: str, settings: Mapping[str, Any]) -> type[FlowConfig]:
    """The config class of a flow, if it has all the settings.

    Raises:
        ValueError: If there is no flow of that name, or a setting is unknown.
    """
    if name not in CONFIGS:
        raise ValueError(f"name: there is no flow {name!r}; there are {', '.join(sorted(CONFIGS))}")
    known = [field.name for field in fields(CONFIGS[name])]
    for key in settings:
        if key not in known:
            raise ValueError(f"{key}: {name} has no such setting; it has {', '.join(known)}")
    return CONFIGS[name]


def config_for_features(
    name: str, scales: Sequence[Sequence[Shape]], images: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """A flow's complete config for given feature shapes and a number of training images.

    Args:
        name: A key of `CONFIGS`.
        scales: Shapes of the feature maps of each scale of the image, the largest scale first.
        images: Number of training images.
        settings: Fields set explicitly; the others have published values or follow from the features.

    Raises:
        ValueError: If there is no flow of that name, or a field is unknown or out of range.
    """
    return asdict(config_class(name, settings).for_features(scales, images, **settings))
