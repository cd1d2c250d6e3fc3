"""The command ``sprue``: help, wrong usage, the user's mistakes, and what programs read."""

import json
import re
import subprocess
import sys

import click
import numpy as np
import pytest
from click.testing import CliRunner

from sprue.cli import main
from sprue.stages.runtime import run_stage

COMMANDS = {
    "run", "demo", "stage", "search", "serve", "keys", "score",
    "promote", "rollback", "audit", "lineage", "reproduce", "figures", "backup", "restore", "relocate", "doctor",
}  # fmt: skip


@pytest.fixture
def sprue(tmp_path, monkeypatch):
    """Runs a command in an empty folder, with a tracking database of its own."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    yield lambda *arguments: CliRunner().invoke(main, arguments, prog_name="sprue", catch_exceptions=False)
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(registry)


def test_the_commands_are_these():
    assert set(main.commands) >= COMMANDS
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0
    assert all(f"\n  {name} " in done.output for name in COMMANDS)
    assert CliRunner().invoke(main, ["--version"], prog_name="sprue").output.startswith("sprue, version ")


@pytest.mark.parametrize("name", sorted(COMMANDS - {"stage"}))
def test_every_command_explains_itself(name):
    done = CliRunner().invoke(main, [name, "--help"], prog_name="sprue")
    assert done.exit_code == 0
    assert f"Usage: sprue {name}" in done.output
    assert main.commands[name].help.split("\n")[0] in done.output.replace("\n  ", " ")
    options = [each for each in main.commands[name].params if isinstance(each, click.Option)]
    assert all(each.help for each in options), "an option without a word of help"


@pytest.mark.parametrize("stage", ["manifest", "features", "search", "fit", "evaluate", "register"])
def test_every_stage_explains_its_arguments(stage):
    done = CliRunner().invoke(main, ["stage", stage, "--help"])
    assert done.exit_code == 0
    assert f"usage: sprue stage {stage}" in done.output
    assert all(option in done.output for option in ("--dataset", "--params", "--data", "--store"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs"], "there is no command 'runs'; there are: "),
        (
            ["stage", "train"],
            "there is no stage 'train'; there are: manifest, features, search, fit, evaluate, register",
        ),
        (["stage", "fit", "--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["run"], "Missing argument 'FOLDER'"),
        (["run", "data", "--layout", "coco"], "'coco' is not one of 'mvtec', 'mvtec-views'"),
        (["run", "data", "--trials", "-1"], "-1 is not in the range x>=0"),
        (["search", "textures"], "Missing option '--trials'"),
        (["score", "--class", "brick"], "Missing argument 'IMAGES...'"),
        (["score", "a.png"], "Missing option '--class'"),
        (["score", "a.png", "--class", "brick", "--heatmaps"], "--heatmaps needs --output FOLDER"),
        (["score", "s3://plant/images", "--class", "brick"], "images of an s3 URL are scored with --output FOLDER"),
        (["score", "a", "b", "--class", "brick", "--output", "c"], "with --output give one folder or s3 URL of images"),
        (["promote", "brick"], "give labelled images with --images FOLDER, or promote without a test: --force REASON"),
        (["promote", "brick", "--images", ".", "--force", "words"], "give labelled images with --images FOLDER, or"),
        (["rollback", "brick"], "Missing option '--reason'"),
        (["lineage"], "give a class, or a file with --image"),
        (["lineage", "brick", "--image", "params.yaml"], ""),
        (["figures", "none.npz"], "File 'none.npz' does not exist"),
        (["serve", "--port", "many"], "'many' is not a valid integer"),
        (["audit", "--loud"], "o such option"),
        (["backup"], "Missing argument 'ARCHIVE'"),
        (["restore", "backups"], "Missing option '--to'"),
    ],
)
def test_wrong_usage_ends_with_status_2(sprue, arguments, message):
    done = sprue(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def mistake(done):
    """The one line of a user's mistake."""
    assert done.exit_code == 1
    # MLflow says once in a process that it makes a database.
    (line,) = [each for each in done.stderr.strip().splitlines() if "mlflow.store.db" not in each]
    command, _, message = line.partition(": ")
    assert re.fullmatch("sprue [a-z]+", command)
    return message


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "image.png", "--class", "bolt"],
        ["score", ".", "--class", "bolt", "--output", "scores"],
        ["promote", "bolt", "--images", "."],
        ["promote", "bolt", "--force", "words"],
        ["rollback", "bolt", "--reason", "words"],
        ["audit", "bolt"],
        ["lineage", "bolt"],
        ["reproduce", "bolt"],
    ],
)
def test_a_class_that_is_not_registered_is_one_line(sprue, arguments):
    assert mistake(sprue(*arguments)) == "there is no class 'bolt'; there are: none"


def test_mistakes_of_the_settings_are_one_message(sprue, tmp_path, monkeypatch):
    assert mistake(sprue("search", "bolts", "--trials", "3")) == "params.yaml can't be read: No such file or directory"
    (tmp_path / "params.yaml").write_text("datasets: {}\n")
    assert mistake(sprue("search", "bolts", "--trials", "3")) == "params.yaml has no datasets; add one with `sprue run`"
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"sprue fit: params\.yaml has no datasets; add one with `sprue run`"):
        run_stage("fit", [])


def test_a_server_that_is_away_is_one_line(sprue, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "the tracking server http://127.0.0.1:9 does not answer" in mistake(sprue("audit"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "s3://plant/store can't hold the tracking database" in mistake(sprue("--store", "s3://plant/store", "audit"))


def test_an_empty_registry_has_an_empty_audit_log(sprue, tmp_path):
    done = sprue("audit", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, [])
    assert sprue("audit").stdout == "no champion has changed yet\n"
    assert (tmp_path / "store/mlflow/mlflow.db").is_file()


def test_an_image_that_no_version_used(sprue, tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    assert sprue("lineage", "--image", "a.png").stdout == "no version was made with a.png\n"
    assert json.loads(sprue("lineage", "--image", "a.png", "--json").stdout) == {"uses": [], "without_record": []}


def test_metrics_of_a_file_are_json(sprue, tmp_path):
    scores_N, labels_N = np.arange(8.0), np.repeat([0, 1], 4)
    np.savez(tmp_path / "scores.npz", scores_N=scores_N, labels_N=labels_N)
    done = sprue("figures", "scores.npz")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["sample_auroc"] == 1.0
    np.savez(tmp_path / "good.npz", scores_N=scores_N, labels_N=np.zeros(8, int))
    assert json.loads(sprue("figures", "good.npz").stdout)["sample_auroc"] is None
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    assert "bad.npz" in mistake(sprue("figures", "bad.npz"))


def test_a_mistyped_folder_is_named_before_the_registry_is_made(tmp_path):
    script = (
        "import sys, click.testing, sprue.cli\n"
        "done = click.testing.CliRunner().invoke(sprue.cli.main, ['run', 'nowhere'], prog_name='sprue')\n"
        "print(done.exit_code, done.output.strip())\n"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["1 sprue run: there is no folder nowhere", "[]"]
    assert not list(tmp_path.iterdir())


def test_help_and_wrong_usage_import_nothing_that_takes_seconds():
    script = (
        "import sys, click.testing, sprue.cli\n"
        "called = [['--help'], ['score', '--help'], ['score'], ['typo']]\n"
        "print([click.testing.CliRunner().invoke(sprue.cli.main, each).exit_code for each in called])\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'pandas', 'timm', 'dvc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[0, 0, 2, 2]", "[]"]
