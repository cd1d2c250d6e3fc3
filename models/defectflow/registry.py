"""Finds a flow by the name that recipes and registered models carry."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from defectflow.csflow import CSFlow
from defectflow.dnfad import DNFAD
from defectflow.flow import Flow, Shape
from defectflow.multiflow import MultiFlow
from defectflow.patchflow import PatchFlow

FLOWS: dict[str, type[Flow]] = {"csflow": CSFlow, "dnfad": DNFAD, "multiflow": MultiFlow, "patchflow": PatchFlow}
"""The flows by name."""


def fitting_config(
    name: str, scales: Sequence[Sequence[Shape]], pictures: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """A flow's whole config for features of some shapes and a number of training pictures.

    Args:
        name: A key of `FLOWS`.
        scales: Shapes of the feature maps of each scale of the picture, the largest scale first.
        pictures: How many pictures it will be fitted on.
        settings: Fields that are set by hand; what is left out is published or follows from the features.

    Raises:
        ValueError: As `build_flow`.
    """
    return asdict(_flow_class(name, settings).config_class.fitting(scales, pictures, **settings))


def build_flow(name: str, **config: Any) -> Flow:
    """Builds an unfitted flow.

    Args:
        name: A key of `FLOWS`.
        **config: Fields of the flow's config dataclass; what is left out has the published value.

    Raises:
        ValueError: If there is no flow of that name, or a field is unknown or out of range.

    >>> build_flow("patchflow", channels=(8,), adapted=8).config.bottleneck
    128
    >>> build_flow("patchflow", channels=(8,), depth=3)
    Traceback (most recent call last):
    ...
    ValueError: patchflow has no setting 'depth'; it has: channels, maps, steps, clamp, noise, noise_scheme, adaptor, adapted, bottleneck, neighbourhood, stride
    """  # noqa: E501
    flow = _flow_class(name, config)
    return flow(flow.config_class(**config))


def _flow_class(name: str, settings: Mapping[str, Any]) -> type[Flow]:
    if name not in FLOWS:
        raise ValueError(f"there is no flow {name!r}; there are: {', '.join(sorted(FLOWS))}")
    flow = FLOWS[name]
    known = [field.name for field in fields(flow.config_class)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; it has: {', '.join(known)}")
    return flow
