"""The doctor's page, as the command prints it."""

import json

from click.testing import CliRunner

from sprue.cli import main
from sprue.operations.findings import Finding


def doctor(*arguments):
    return CliRunner().invoke(main, ["--store", "store", "doctor", *arguments], catch_exceptions=False)


def test_the_page_says_everything_and_the_status_whether_something_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = doctor("--json")
    found = [Finding(**each) for each in json.loads(done.stdout)]
    assert {"packages", "processor", "store", "registry", "Ray", "cache", "exposure"} <= {
        each.subject for each in found
    }
    assert done.exit_code == any(each.level == "FAIL" for each in found)
    assert "OK    registry   " in doctor().stdout

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = doctor()
    assert done.exit_code == 1
    assert "FAIL  registry   http://127.0.0.1:9: ConnectionError" in done.stdout
    assert not (tmp_path / "store").exists()
