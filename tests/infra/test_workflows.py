"""The workflows have the form that GitHub reads, are safe, and name what is there."""

import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(each for each in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if each.name != "config.yml")


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def commands(workflow: Path) -> str:
    return "\n".join(step.get("run", "") for step in steps(workflow))


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.dependabot", [ROOT / ".github" / "dependabot.yml"]),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"]),
    ],
)
def test_github_can_read_them(program: Callable[[str], str], schema: str, files: list[Path]) -> None:
    assert files
    command = [program("check-jsonschema"), "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nobody_outside_can_misuse_them(program: Callable[[str], str]) -> None:
    done = subprocess.run(
        [program("zizmor"), "--offline", "--no-progress", str(ROOT / ".github")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_actions_are_githubs_and_dockers_own() -> None:
    used = {step["uses"] for workflow in WORKFLOWS for step in steps(workflow) if "uses" in step}
    assert {each.partition("/")[0] for each in used} == {"actions", "docker"}


def test_each_python_that_is_claimed_is_tested() -> None:
    """And no other is claimed: the package names only the lowest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    lowest = project["requires-python"].removeprefix(">=")
    assert jobs["gate"]["container"] == f"python:{lowest}-bookworm"
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.12", "3.13"]
    assert not any("Python :: 3." in each for each in project.get("classifiers", []))


def test_what_they_run_is_there() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for workflow in WORKFLOWS:
        text = commands(workflow)
        assert set(re.findall(r"^make (\w+)", text, re.M)) <= targets
        named = re.findall(r"[\w./-]*(?:infra|tests|\.ci)/[\w./-]*\w", text)
        assert named
        for path in named:
            made = path.endswith(("torch-cpu.txt", "images.lock"))
            assert made or (ROOT / path).exists(), f"{workflow.name} names {path}"
    assert "bash .ci/run" in commands(ROOT / ".github" / "workflows" / "ci.yml")


def test_a_release_is_what_the_repository_says_it_is() -> None:
    """The workflow refuses a tag unless these agree."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((ROOT / "infra" / "kubernetes" / "sprue" / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    assert re.search(r"^## ", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_other_machines_get_the_gates_packages() -> None:
    """The development container, and the workflow where it does not run the gate itself."""
    install = r"apt-get install .*--no-install-recommends ([\w -]+)"
    (packages,) = re.findall(install, (ROOT / ".ci" / "run").read_text())
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())["postCreateCommand"]
    for command in (container, commands(ROOT / ".github" / "workflows" / "ci.yml")):
        (installed,) = re.findall(install, command)
        assert set(packages.split()) <= set(installed.split())
