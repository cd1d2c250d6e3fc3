"""Reads and writes ``params.yaml`` and recipes; an error names the line, the setting, its value and what is allowed."""

import difflib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from sprue.config import (
    FLOW_SETTINGS,
    CalibrationSettings,
    DatasetSettings,
    FitSettings,
    ManifestSettings,
    Params,
    Recipe,
    ScoringSettings,
    SearchSettings,
    Settings,
)
from sprue.errors import SprueError
from sprue.store import location, write_bytes

PARAMS = Path("params.yaml")
"""The parameter file of a checkout."""

RECIPES = Path("models/recipes")

FIRST_RECIPE = "fusion-cpu"
"""Of a dataset that is new to the parameter file."""

Document = TypeVar("Document", bound=Settings)


def read_dataset(path: Path, name: str | None = None) -> tuple[str, DatasetSettings]:
    """Reads the settings of one dataset; mistakes in those of others do not matter.

    Args:
        path: The parameter file.
        name: The dataset; optional where the file has only one.

    Returns:
        The dataset's name and its settings.

    Raises:
        SprueError: If there is no such dataset; or the message lists every bad setting with its line.
    """
    content = _load(path)
    datasets = content.get("datasets") if isinstance(content, Mapping) else None
    if not isinstance(datasets, Mapping) or not datasets:
        raise SprueError(f"{path} has no datasets; add one with `sprue run`")
    if name is None and len(datasets) == 1:
        (name,) = datasets
    if not all(isinstance(each, str) for each in datasets):
        raise SprueError(f'{path}: write the names of datasets as text, such as "2026"')
    if name is None or name not in datasets:
        problem = f"has no dataset {name!r}" if name else "has several datasets, name one with --dataset"
        raise SprueError(f"{path} {problem}: {', '.join(map(str, datasets))}")
    params = _validate(path, Params, content, {**content, "datasets": {name: datasets[name]}})
    return name, params.datasets[name]


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        SprueError: If it can't be read; the message lists every bad setting with its line.
    """
    content = _load(path)
    return _validate(path, Recipe, content, content)


class _Representer(RoundTripRepresenter):
    """Writes null as a word."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _yaml() -> YAML:
    """Keeps comments and quotes, and knows the line of each key. Reads YAML 1.2, in which 1e-3 is a number."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def _load(path: Path) -> Any:
    try:
        return _yaml().load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SprueError(f"{path} can't be read: {error.strerror}") from error
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SprueError(f"{path}{line}: not YAML: {error.problem}") from error
    except (YAMLError, ValueError) as error:
        raise SprueError(f"{path}: not YAML: {error}") from error


def _validate(path: Path, kind: type[Document], file: Any, content: Any) -> Document:
    """Validates content, which is part of what a file holds."""
    try:
        # As JSON a list is a tuple even in strict mode. Dates and the like become strings, which no setting takes.
        return kind.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        errors = error.errors()
        # A list whose only item is wrong is not too short.
        inner = [each for each in errors if each["type"] != "too_short" or not _has_wrong_item(each, errors)]
        problems = sorted(_describe(kind, file, each) for each in inner)
        raise SprueError("\n".join(f"{path}, line {line}: {problem}" for line, problem in problems)) from error


def _has_wrong_item(error: ErrorDetails, errors: list[ErrorDetails]) -> bool:
    depth = len(error["loc"])
    return any(len(each["loc"]) > depth and each["loc"][:depth] == error["loc"] for each in errors)


def _describe(kind: type[Settings], content: Any, error: ErrorDetails) -> tuple[int, str]:
    """The line, and in words the path of the setting, its value and what is allowed."""
    keys, section = [str(key) for key in error["loc"]], 2 if kind is Params else 0
    message = str(error.get("ctx", {}).get("error", error["msg"]))
    if keys[section : section + 1] == ["flow"] and len(keys) > section + 1:
        del keys[section + 1]  # pydantic names the member of the union
    if error["type"] == "value_error" and (named := re.match(r"([\w.]+): ", message)):
        keys += named[1].split(".", 1)
        message = message[named.end() :]
    if error["type"].startswith("union_tag"):
        keys.append("name")
        message = f"give one of {', '.join(FLOW_SETTINGS)}"
    if keys[-1:] == ["[key]"]:
        del keys[-1]
        message = "a dataset's name has letters, digits, '_' and '-' alone"
    line, value = _find(content, keys)
    name = ".".join(keys) or "the file"
    if error["type"] == "extra_forbidden":
        allowed = _allowed(kind, content, keys[:-1])
        near = difflib.get_close_matches(keys[-1], allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return line, f"{name}: there is no such setting; {hint}allowed: {', '.join(allowed)}"
    if error["type"] == "missing":
        return line, f"{name} is missing"
    for word, plain in (("Tuple", "list"), ("a valid array", "a list"), ("an object", "a mapping")):
        message = message.replace(word, plain)
    # The flows' own messages begin with the value.
    shown = "" if isinstance(value, Mapping) or message.startswith(f"{value!r} ") else f"{value!r}: "
    return line, f"{name}: {shown}{message[:1].lower()}{message[1:]}"


def _find(content: Any, keys: list[str]) -> tuple[int, Any]:
    """Line and value of a setting, or of the innermost section that exists."""
    line, value = 1, content
    for key in keys:
        if isinstance(value, Mapping) and key in value:
            # A merged key has no line of its own.
            line, value = value.lc.data.get(key, [line - 1])[0] + 1, value[key]  # type: ignore[attr-defined]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            break
    return line, value


def _allowed(kind: type[Settings], content: Any, keys: list[str]) -> list[str]:
    """The names of the settings that a section has."""
    if kind is Params and keys:
        kind, content, keys = DatasetSettings, content[keys[0]][keys[1]], keys[2:]
    for key in keys:
        content = content[key]
        annotation: Any = FLOW_SETTINGS[content["name"]] if key == "flow" else kind.model_fields[key].annotation
        assert isinstance(annotation, type) and issubclass(annotation, Settings)
        kind = annotation
    return list(kind.model_fields)


def find_recipe(recipe: str) -> Path:
    """The file of a recipe.

    Args:
        recipe: A name in `RECIPES`, or a file.

    Raises:
        SprueError: If there is no such recipe, or it has a bad setting.
    """
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    path = known.get(recipe, Path(recipe))
    if not path.is_file():
        raise SprueError(f"there is no recipe {recipe!r}; give a file or one of {', '.join(known)}")
    read_recipe(path)
    return path


def set_dataset(
    name: str,
    recipe: str | None = None,
    layout: str | None = None,
    trials: int | None = None,
    first_recipe: str = FIRST_RECIPE,
    path: Path = PARAMS,
) -> None:
    """Adds a dataset to the parameter file, or changes one; comments and all other datasets stay as they are.

    Args:
        name: The dataset.
        recipe: Replaces the dataset's features, flow, fit and scoring; a new dataset gets `first_recipe`.
        layout: Of its folders; a new dataset's is ``mvtec``.
        trials: How many settings a search tries for each class.
        first_recipe: Of a new dataset.
        path: The parameter file.

    Raises:
        SprueError: If there is no such recipe, or the result is not valid; the file then stays as it is.
    """
    lock = Path(".dvc/tmp") / f"{path.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        content = _load(path)
        if not isinstance(content, Mapping) or not isinstance(content.get("datasets"), Mapping):
            raise SprueError(f"{path} has no section datasets")
        before = _dump(content)
        if name not in content["datasets"]:
            recipe = recipe or first_recipe
            sections = {
                "manifest": ManifestSettings(),
                "search": SearchSettings(),
                "calibration": CalibrationSettings(),
            }
            content["datasets"][name] = _plain(sections)
        dataset = content["datasets"][name]
        if recipe is not None:
            defaults = {"published": "", "fit": FitSettings(), "scoring": ScoringSettings()}
            dataset.update(_plain(defaults) | _load(find_recipe(recipe)))
        if layout is not None:
            dataset.setdefault("manifest", {})["layout"] = layout
        if trials is not None:
            dataset.setdefault("search", {})["trials"] = trials
        after = _dump(content)
        changed = _yaml().load(after)
        _validate(path, Params, changed, {"datasets": {name: changed["datasets"][name]}})
        if after != before:
            write_bytes(location(str(path)), after)


def _plain(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as YAML takes them."""
    return {key: each.model_dump(mode="json") if isinstance(each, Settings) else each for key, each in sections.items()}


def _dump(content: Any) -> bytes:
    stream = io.BytesIO()
    _yaml().dump(content, stream)
    return stream.getvalue()
