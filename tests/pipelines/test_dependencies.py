"""``dvc.yaml`` names all code that a stage runs, so that a change of it reruns the stage."""

import ast
from pathlib import Path

import grimp
import pytest
from ruamel.yaml import YAML

from sprue.stages.runtime import STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def imports():
    return grimp.build_graph("sprue", "defectflow", cache_dir=None)


@pytest.fixture(scope="module")
def stages():
    return YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def file_of(module):
    """A module's file in the repository."""
    folder = "models" if module.startswith("defectflow") else "platform"
    path = Path(folder, *module.split("."))
    return path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")


def test_the_pipeline_has_all_stages_in_their_order(stages):
    assert tuple(stages) == STAGES
    assert {path.stem for path in (ROOT / "pipelines").glob("*.py")} == {*STAGES, "score"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_imports_is_a_dependency(stage, stages, imports):
    script = ROOT / "pipelines" / f"{stage}.py"
    tree = ast.parse(script.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported.add(f"sprue.stages.{stage}")  # run_stage imports it by its name
    modules = imported.union(*(imports.find_upstream_modules(module) for module in imported))
    # An empty __init__ has no effect on what a stage does.
    files = [script.relative_to(ROOT), *(file_of(module) for module in modules)]
    files = [file for file in files if file.name != "__init__.py" or len(ast.parse((ROOT / file).read_text()).body) > 1]
    dependencies = [Path(each) for each in stages[stage]["do"]["deps"] if "$" not in each]
    missing = [file for file in files if not any(file.is_relative_to(dependency) for dependency in dependencies)]
    assert not missing
    for dependency in dependencies:
        assert (ROOT / dependency).exists()
