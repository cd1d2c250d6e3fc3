"""A store is backed up while it is used; what is restored elsewhere works without the old one."""

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from click.testing import CliRunner

from sprue.cli import main
from sprue.errors import SprueError
from sprue.operations.archive import Archive
from sprue.operations.backup import back_up, stored_files
from sprue.operations.restore import restore
from sprue.release import audit_log
from sprue.release.aliases import promote, version_for_alias
from sprue.release.decision_store import FOLDER, DecisionStore
from sprue.serving.loading import Loader
from sprue.store import location
from sprue.tracking import locations
from sprue.tracking.lock import alias_lock
from sprue.tracking.registry import champions
from sprue.tracking.server import connect


@pytest.fixture
def archive(tmp_path):
    return Archive(location(str(tmp_path / "backups")))


def sprue(*arguments):
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # which MLflow has set in this process
    done = CliRunner().invoke(main, arguments, prog_name="sprue", catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def score(store, image):
    (row,) = json.loads(sprue("--store", str(store), "score", str(image), "--class", "brick", "--json"))
    return row["score"]


def hide(store):
    """Renames a store away, as long as a test takes."""
    hidden = Path(store.path).with_name("hidden")
    Path(store.path).rename(hidden)
    return hidden


def test_a_restored_store_works_without_the_old_one(plant, tmp_path, monkeypatch):
    expected = score(plant.folder, plant.image)
    lineage = json.loads(sprue("--store", str(plant.folder), "lineage", "brick", "--json"))
    made = json.loads(sprue("--store", str(plant.folder), "backup", "backups", "--json"))
    assert made["has_registry"] and made["files"] >= made["copied"] > 10  # equal files are kept once
    assert json.loads(sprue("--store", str(plant.folder), "backup", "backups", "--json"))["copied"] <= 1

    hidden = hide(plant.folder)
    try:
        # Nothing of the old store is in a cache.
        monkeypatch.setenv("SPRUE_CACHE", str(tmp_path / "cache"))
        new = tmp_path / "new" / "störe 2"
        words = sprue("restore", "backups", "--to", str(new))
        assert "1 models, 1 entries in the audit log" in words and "1 loaded: plant.brick version 1" in words
        assert score(new, plant.image) == expected
        assert json.loads(sprue("--store", str(new), "lineage", "brick", "--json")) == lineage
        assert json.loads(sprue("--store", str(new), "reproduce", "brick", "--json"))["equal"] is True
        assert "first       - -> 1" in sprue("--store", str(new), "audit", "brick")
        assert DecisionStore(location(str(new)) / FOLDER).find("r1")[0].version == 1
        (champion,) = champions()
        served = Loader(threads=1)(champion)
        assert served.champion.version == 1
        # The package names the backbone's weights, which MLflow reads.
        monkeypatch.setattr(sys, "path", list(sys.path))  # to which MLflow adds the model's own copy of sprue
        python_function = mlflow.pyfunc.load_model("models:/plant.brick@champion").metadata.flavors["python_function"]
        assert python_function["config"]["weights"].startswith(f"{new.as_uri()}/mlflow/artifacts/")
        # A restored store can be backed up and restored in its turn.
        sprue("--store", str(new), "backup", "others")
        sprue("restore", "others", "--to", "third")
    finally:
        hidden.rename(Path(plant.folder.path))


def test_a_damaged_file_is_named_and_nothing_is_restored(plant, archive, tmp_path, monkeypatch):
    back_up(plant.folder, archive)
    file = archive.read().files["plant/fits/brick/fit.json"]
    path = Path(archive.folder.path, "objects", file.sha256[:2], file.sha256)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + b" ")
    with pytest.raises(SprueError, match=r"plant/fits/brick/fit\.json is damaged in the backup: the bytes of "):
        restore(archive, location(str(tmp_path / "new")))
    # What an archive has lost is copied again, though it has not changed since the last backup.
    path.write_bytes(sound[:9])
    back_up(plant.folder, archive)
    restore(archive, location(str(tmp_path / "sound")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # which MLflow has set
    path.unlink()
    with pytest.raises(SprueError, match=r"plant/fits/brick/fit\.json is missing in the backup"):
        restore(archive, location(str(tmp_path / "new")))
    assert not [each for each in tmp_path.iterdir() if "new" in each.name]
    back_up(plant.folder, archive)
    restore(archive, location(str(tmp_path / "new")))


def test_what_can_not_be_done_is_said(plant, archive, tmp_path, monkeypatch):
    new = location(str(tmp_path / "new"))
    with pytest.raises(SprueError, match=r"there is no backup in .*backups; make one with `sprue backup`"):
        restore(archive, new)
    summary = back_up(plant.folder, archive)
    with pytest.raises(SprueError, match=f"has no backup 'other'; it has: {summary.name}"):
        restore(archive, new, "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SprueError, match="full is not empty: a backup is restored to a new folder"):
        restore(archive, location(str(tmp_path / "full")))
    with pytest.raises(SprueError, match="can't be in the store itself"):
        back_up(plant.folder, Archive(plant.folder / "backups"))
    with pytest.raises(SprueError, match="there is no store"):
        back_up(new, archive)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(SprueError, match=r"the registry is the server http://127\.0\.0\.1:9, whose database and files"):
        back_up(plant.folder, archive)
    assert not back_up(plant.folder, archive, with_registry=False).has_registry


def test_a_backup_can_not_write_outside_of_the_new_store(plant, archive, tmp_path):
    name = back_up(plant.folder, archive).name
    path = Path(archive.folder.path, "backups", f"{name}.json")
    content = json.loads(path.read_text())
    for outside in ("../outside", "/tmp/outside", "a/../../outside"):
        path.write_text(json.dumps(content | {"files": {outside: next(iter(content["files"].values()))}}))
        with pytest.raises(SprueError, match="is no path in a store"):
            restore(archive, location(str(tmp_path / "new")))
    path.write_text(json.dumps(content | {"formats": {"manifest": 99}}))
    with pytest.raises(SprueError, match="which writes newer formats of: manifest; update sprue"):
        restore(archive, location(str(tmp_path / "new")))


def test_an_archive_may_be_in_an_object_store(plant, tmp_path, s3_bucket):
    archive = Archive(location(f"s3://{s3_bucket}/backups"))
    back_up(plant.folder, archive)
    assert restore(archive, location(str(tmp_path / "new"))).champions == ["plant.brick version 1"]


def test_no_half_of_a_promotion_is_in_a_backup(plant, archive, tmp_path, monkeypatch):
    """The alias and its entry in the audit log are changed one after the other, under a lock."""
    version, model = plant.register("k2"), "plant.brick"
    waits, finished = threading.Event(), []
    monkeypatch.setattr(locations, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: waits.set()))
    thread = threading.Thread(target=lambda: finished.append(back_up(plant.folder, archive)))
    client = mlflow.MlflowClient()
    with alias_lock(model):
        client.set_registered_model_alias(model, "champion", str(version))
        thread.start()
        assert waits.wait(60)
        assert not finished
        audit_log.History.read(model).append("forced", 1, version, "words", version)
    thread.join(60)
    assert finished
    restore(archive, location(str(tmp_path / "new")))
    assert version_for_alias(model, "champion") == version == audit_log.entries(model)[-1].after
    assert not mlflow.MlflowClient().search_registered_models("name LIKE 'sprue-lock-%'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # which MLflow has set
    connect(plant.folder)
    promote(model, 1, version, "forced", "back to the first")


def test_a_lock_that_stays_is_named(plant, tmp_path):
    with (
        alias_lock("plant.brick"),
        pytest.raises(SprueError, match=r"the aliases of plant\.brick are locked: held by .* delete the registered"),
    ):
        locations.snapshot(Path(plant.folder.path, locations.DATABASE), tmp_path / "copy.db", patience_s=0)


def test_what_is_not_a_result_is_left_out(tmp_path):
    for name in (
        "plant/manifest.parquet",
        "plant/.manifest.parquet.17",
        "plant/runs/brick/epoch.json",
        "plant/.evaluation.17/report.html",
        "mlflow/mlflow.db",
        "mlflow/mlflow.db-journal",
        "mlflow/artifacts/run/artifacts/.hidden",
        "stack/secrets.json",
        "stack/postgres/PG_VERSION",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [name for name, _, _ in stored_files(location(str(tmp_path)))]
    assert names == ["mlflow/artifacts/run/artifacts/.hidden", "plant/manifest.parquet"]
