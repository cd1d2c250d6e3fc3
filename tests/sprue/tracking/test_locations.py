"""Where a tracking database says that its files are, and how that is changed."""

import sqlite3

import mlflow
import pytest

from sprue.errors import SprueError
from sprue.store import location
from sprue.tracking.locations import adopt, left_behind, locations, outside, relocate
from sprue.tracking.server import connect, experiment_id


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A store with a run that has a file, and its database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uris = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    monkeypatch.chdir(tmp_path)
    store = location(str(tmp_path / "old"))
    connect(store)
    run = mlflow.MlflowClient().create_run(experiment_id("plant", store))
    mlflow.MlflowClient().log_text(run.info.run_id, "words", "file.txt")
    yield store
    mlflow.set_tracking_uri(uris[0])
    mlflow.set_registry_uri(uris[1])


def test_a_store_that_was_moved_is_adopted(old, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # which MLflow has set
    new = location(str(tmp_path / "old-and new"))
    old.rename(new)
    with pytest.raises(SprueError, match=r"names files in .*old/mlflow/artifacts, which is not there: .* `sprue reloc"):
        connect(new)
    database = tmp_path / "old-and new/mlflow/mlflow.db"
    assert adopt(database, new) == 2
    assert adopt(database, new) == 0
    connect(new)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("plant").experiment_id])
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/file.txt") == "words"


def test_only_what_is_below_the_store_is_changed(old, tmp_path):
    database = tmp_path / "old/mlflow/mlflow.db"
    neighbour = f"{old.as_uri()}-2/mlflow/artifacts"
    mlflow.MlflowClient().create_experiment("neighbour", neighbour)
    assert left_behind(database, old) == [neighbour]
    assert outside(database, old) == []
    (tmp_path / "old-2/mlflow/artifacts/run").mkdir(parents=True)
    (tmp_path / "old-2/mlflow/artifacts/run/file.txt").touch()
    assert outside(database, old) == [neighbour]
    relocate(database, old, location(str(tmp_path / "new")))
    assert neighbour in locations(database)
    assert not [each for each in locations(database) if each.startswith(f"{old.as_uri()}/")]


def test_what_is_no_database_is_said(tmp_path):
    with pytest.raises(SprueError, match="there is no tracking database"):
        locations(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("words" * 1000)
    with pytest.raises(SprueError, match=r"text\.db can't be used: file is not a database"):
        locations(tmp_path / "text.db")
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(SprueError, match="no such table"):
        locations(tmp_path / "empty.db")
