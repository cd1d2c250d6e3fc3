"""helm, and what the chart renders; modules of the local stack."""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "infra" / "kubernetes" / "sprue"
DIGEST = "sha256:" + "0" * 64
PINNED = [
    f"image.platform.repository=registry.example/sprue,image.platform.digest={DIGEST}",
    f"image.scoring.repository=registry.example/sprue-scoring,image.scoring.digest={DIGEST}",
    f"bundled.postgres.image.digest={DIGEST}",
]
"""Settings that a user gives at the installation."""


def own(name: str) -> str:
    """A program beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: make setup"
    return found


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([own("helm"), *arguments], capture_output=True, text=True)


Render = Callable[..., list[dict[str, Any]]]


def values_of(name: str, given: tuple[str, ...]) -> list[str]:
    """helm's arguments for a file of values and settings beside it; only a laptop's images may have tags."""
    settings = [*([] if name == "laptop" else PINNED), *given]
    file = CHART.parent / "values" / f"{name}.yaml"
    return ["--values", str(file), *(word for each in settings for word in ("--set", each))]


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of infra/local by its name, as the modules there import one another."""
    monkeypatch.syspath_prepend(ROOT / "infra" / "local")
    return importlib.import_module


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    return own


@pytest.fixture(scope="session")
def lint() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Checks the chart with a file of values: lint(name, *settings)."""
    return lambda name, *given: helm("lint", "--strict", str(CHART), *values_of(name, given))


@pytest.fixture(scope="session")
def template() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Renders the chart, or says why it can't: template(name, *settings)."""
    return lambda name, *given: helm("template", "line", str(CHART), "--namespace", "plant", *values_of(name, given))


@pytest.fixture(scope="session")
def render(template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """The chart's objects: render(name, *settings). Each combination is rendered once."""
    known: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def objects(*given: str) -> list[dict[str, Any]]:
        if given not in known:
            done = template(*given)
            assert done.returncode == 0, done.stderr
            known[given] = [each for each in yaml.safe_load_all(done.stdout) if each]
        return known[given]

    return objects
