"""What is to be fitted: a request for each class of a manifest."""

from collections.abc import Mapping
from typing import Any

from upath import UPath

from sprue.data.manifest import Manifest
from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.inference.spec import FeatureSpec
from sprue.training.loop import FitSettings
from sprue.training.worker import FitRequest


def flow_name(section: dict[str, Any]) -> str:
    """Takes the flow's name out of the parameter file's section.

    Raises:
        SprueError: If it is missing.
    """
    name = section.pop("name", None)
    if not isinstance(name, str):
        raise SprueError("flow: the setting 'name' is missing; write the name of a flow, such as patchflow")
    return name


def fit_requests(
    manifest: Manifest, spec: FeatureSpec, features: UPath, flow: Mapping[str, Any], settings: FitSettings
) -> list[FitRequest]:
    """One request for each class.

    Args:
        manifest: The dataset's.
        spec: The resolved feature spec.
        features: Folder of the feature tables.
        flow: The parameter file's section: the flow's name and the settings that are set by hand.
        settings: How to fit.

    Raises:
        SprueError: If the section names no flow.
    """
    config = dict(flow)
    name = flow_name(config)
    return [
        FitRequest(
            class_name,
            spec.fingerprint,
            str(features / spec.fingerprint / class_name),
            len(spec.blocks),
            samples_of(manifest.select(class_name, "train")),
            samples_of(manifest.select(class_name, "validation")),
            name,
            config,
            settings,
        )
        for class_name in manifest.classes
    ]
