"""The resolved feature spec, as the features stage leaves it beside the tables."""

import json

from upath import UPath

from sprue.formats import FEATURE_SPEC
from sprue.inference.spec import FeatureSpec
from sprue.store import read_json, write_json

FILE = "spec.json"


def write_spec(folder: UPath, spec: FeatureSpec) -> None:
    """Writes ``spec.json``."""
    write_json(folder / FILE, FEATURE_SPEC.stamped(spec.model_dump(mode="json")))


def read_spec(folder: UPath) -> FeatureSpec:
    """Reads what `write_spec` wrote.

    Raises:
        SprueError: If it is missing, damaged or of another format.
    """
    path = folder / FILE
    content = FEATURE_SPEC.current(read_json(path, made_by="features"), path)
    return FeatureSpec.model_validate_json(json.dumps(content))
