"""Champions change one at a time, by a decision that is on record."""

import multiprocessing
import subprocess
import sys
from contextlib import nullcontext

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from sprue.errors import SprueError
from sprue.release import aliases, audit_log
from sprue.release.aliases import assign_alias, promote, reconcile_changed, roll_back, version_for_alias
from sprue.tracking import lock
from sprue.tracking.lock import alias_lock
from sprue.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    CLASS_TAG,
    DATASET_TAG,
    champions,
    find_model,
    find_registered,
    register,
)


@pytest.fixture
def versions(store, tmp_path, request):
    """A model of the test's own with four versions; its name."""
    client, class_name = mlflow.MlflowClient(), request.node.name[5:45]
    name = f"plant.{class_name}"
    client.create_registered_model(name, tags={DATASET_TAG: "plant", CLASS_TAG: class_name})
    for _ in range(4):
        client.create_model_version(name, str(tmp_path), run_id=None)
    return name


def log_of(name):
    return [(entry.kind, entry.before, entry.after) for entry in audit_log.entries(name)]


def test_the_first_version_is_champion_and_others_challenge_it(versions):
    assert assign_alias(versions, 1) == CHAMPION
    assert assign_alias(versions, 1) == CHAMPION
    assert assign_alias(versions, 2) == assign_alias(versions, 2) == CHALLENGER
    assert (version_for_alias(versions, CHAMPION), version_for_alias(versions, CHALLENGER)) == (1, 2)
    # The first one's detector is current again, as after `git checkout`.
    assert assign_alias(versions, 1) == CHAMPION
    assert (version_for_alias(versions, CHAMPION), version_for_alias(versions, CHALLENGER)) == (1, None)
    assert log_of(versions) == [("first", None, 1)]


def test_a_decision_about_another_champion_changes_nothing(versions):
    assign_alias(versions, 1)
    assign_alias(versions, 2)
    promote(versions, 2, 1, "promoted", "better", {"auroc": 0.9})
    assert (version_for_alias(versions, CHAMPION), version_for_alias(versions, CHALLENGER)) == (2, None)
    with pytest.raises(SprueError, match="version 2 has become champion in the meantime"):
        promote(versions, 3, 1, "promoted", "better")
    assert version_for_alias(versions, CHAMPION) == 2
    assert log_of(versions) == [("first", None, 1), ("promoted", 1, 2)]
    last = audit_log.entries(versions)[-1]
    assert (last.reason, last.challenger) == ("better", 2)
    assert "promoted" in str(last) and "1 -> 2" in str(last)
    experiment = mlflow.MlflowClient().get_experiment_by_name(audit_log.EXPERIMENT).experiment_id
    logged = mlflow.MlflowClient().search_runs([experiment], f"tags.`sprue.model` = '{versions}'")
    assert [run.data.metrics for run in logged if "promoted" in run.info.run_name] == [{"auroc": 0.9}]


def test_rolling_back_goes_one_champion_back_each_time(versions):
    assign_alias(versions, 1)
    promote(versions, 2, 1, "promoted", "better")
    promote(versions, 4, 2, "forced", "the plant wants it")
    assert roll_back(versions, "too many alarms") == 2
    assert roll_back(versions, "still") == 1
    with pytest.raises(SprueError, match="there is no champion before version 1"):
        roll_back(versions, "still")
    promote(versions, 3, 1, "promoted", "better")
    mlflow.MlflowClient().delete_model_version(versions, "1")
    with pytest.raises(SprueError, match="there is no champion before version 3"):
        roll_back(versions, "its files are gone")
    assert version_for_alias(versions, CHAMPION) == 3


def test_a_champion_that_came_back_has_the_one_between_before_it(versions):
    assign_alias(versions, 1)
    promote(versions, 2, 1, "promoted", "better")
    promote(versions, 1, 2, "forced", "the old one after all")
    promote(versions, 3, 1, "promoted", "better")
    assert [roll_back(versions, "no") for _ in range(3)] == [1, 2, 1]


def test_a_change_in_the_registry_s_own_page_is_found(versions):
    client = mlflow.MlflowClient()
    assign_alias(versions, 1)
    client.set_registered_model_alias(versions, CHAMPION, "3")
    assert roll_back(versions, "who did that?") == 1
    client.delete_registered_model_alias(versions, CHAMPION)
    reconcile_changed(versions)
    assert log_of(versions) == [
        ("first", None, 1), ("external", 1, 3), ("rolled back", 3, 1), ("external", 1, None)
    ]  # fmt: skip
    assert ["noticed by" in entry.by for entry in audit_log.entries(versions)] == [False, True, False, True]


def test_changes_of_all_models_are_found_and_others_are_not_locked(versions, store, monkeypatch):
    assign_alias(versions, 1)
    reconcile_changed()
    mlflow.MlflowClient().set_registered_model_alias(versions, CHAMPION, "2")
    locked = []
    monkeypatch.setattr(aliases, "alias_lock", lambda model: nullcontext(locked.append(model)))
    for _ in range(2):
        reconcile_changed()
    assert locked == [versions]
    assert log_of(versions) == [("first", None, 1), ("external", 1, 2)]


def test_where_the_champion_was_removed_a_version_has_to_be_promoted(versions):
    assign_alias(versions, 1)
    mlflow.MlflowClient().delete_registered_model_alias(versions, CHAMPION)
    assert assign_alias(versions, 2) == CHALLENGER
    assert assign_alias(versions, 1) == CHALLENGER
    promote(versions, 1, None, "forced", "it is wanted again")
    assert version_for_alias(versions, CHAMPION) == 1


def _promote(uri, name, version, results):
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        promote(name, version, 1, "promoted", "better")
        results.put(version)
    except (SprueError, MlflowException) as error:  # the registry's own failures too, which the test would wait for
        results.put(str(error))


def test_of_promotions_at_once_one_wins_and_the_others_fail(versions):
    assign_alias(versions, 1)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_promote, args=(mlflow.get_tracking_uri(), versions, version, results))
        for version in (2, 3, 4)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    (winner,) = (each for each in answers if isinstance(each, int))
    assert sum("in the meantime" in str(each) for each in answers) == 2, answers
    assert version_for_alias(versions, CHAMPION) == winner
    assert log_of(versions) == [("first", None, 1), ("promoted", 1, winner)]


def test_a_lock_names_its_owner_and_is_released(versions):
    with alias_lock(versions):
        message = r"held by .*, process \d+ of .*delete the registered model sprue-lock-"
        with pytest.raises(SprueError, match=message), alias_lock(versions, patience_s=0.3):
            pytest.fail("two hold it")
    with pytest.raises(KeyError), alias_lock(versions):
        raise KeyError
    with alias_lock(versions, patience_s=0.0):
        assert f"sprue-lock-{versions}" in {model.name for model in mlflow.MlflowClient().search_registered_models()}
    assert f"sprue-lock-{versions}" not in {model.name for model in mlflow.MlflowClient().search_registered_models()}


HOLD = """
import sys, time, mlflow
from sprue.tracking.lock import alias_lock
mlflow.set_tracking_uri(sys.argv[2])
with alias_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_whose_process_was_killed_is_broken_at_once(versions):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, versions, mlflow.get_tracking_uri()], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(SprueError, match=f"process {holder.pid} of"), alias_lock(versions, patience_s=0.3):
            pytest.fail("two hold it")
        holder.kill()
        holder.wait()
        with alias_lock(versions, patience_s=0.0):
            pass


def test_a_lock_that_nobody_renews_is_broken_later(versions, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    mlflow.MlflowClient().create_registered_model(
        f"sprue-lock-{versions}", description="held by a@b, process 1 of c, d"
    )
    with pytest.raises(SprueError, match="held by a@b"), alias_lock(versions, patience_s=0.5):
        pytest.fail("two hold it")
    with alias_lock(versions, patience_s=5.0):
        pass


def test_a_lock_that_is_renewed_is_kept(versions, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    monkeypatch.setattr(lock, "RENEW_S", 0.2)
    with alias_lock(versions), pytest.raises(SprueError, match="renewed"), alias_lock(versions, patience_s=2.5):
        pytest.fail("two hold it")
    assert f"sprue-lock-{versions}" not in {model.name for model in mlflow.MlflowClient().search_registered_models()}


def test_datasets_with_a_class_of_one_name_have_champions_of_their_own(store, tmp_path):
    for dataset, count in (("coated", 1), ("raw", 2)):
        for number in range(count):
            version = register(dataset, "bolt", str(tmp_path), "", f"key-{number}", {}, "")
            assign_alias(f"{dataset}.bolt", version)
    promote("raw.bolt", 2, 1, "forced", "the plant wants it")

    assert (version_for_alias("coated.bolt", CHAMPION), version_for_alias("raw.bolt", CHAMPION)) == (1, 2)
    ours = [(each.dataset, each.class_name, each.version) for each in champions() if each.class_name == "bolt"]
    assert ours == [("coated", "bolt", 1), ("raw", "bolt", 2)]
    assert log_of("coated.bolt") == [("first", None, 1)]
    assert log_of("raw.bolt") == [("first", None, 1), ("forced", 1, 2)]
    assert [entry.model for entry in audit_log.entries() if entry.model.endswith(".bolt")] == [
        "coated.bolt", "raw.bolt", "raw.bolt"
    ]  # fmt: skip
    with alias_lock("raw.bolt"), alias_lock("coated.bolt", patience_s=0.0):
        assert audit_log.entries("raw.bolt")[-1].number == 2


def test_a_class_s_name_is_enough_where_one_dataset_has_it(store, tmp_path):
    for dataset, class_name in (("north", "nut"), ("south", "nut"), ("south", "washer")):
        assign_alias(f"{dataset}.{class_name}", register(dataset, class_name, str(tmp_path), "", "key", {}, ""))
    assert (find_model("washer"), find_model("south.washer")) == ("south.washer", "south.washer")
    assert find_registered("washer", CHAMPION).model_name == "south.washer"
    assert find_registered("north.nut", CHAMPION).dataset == "north"
    for find in (find_model, lambda name: find_registered(name, CHAMPION)):
        with pytest.raises(SprueError, match=r"class 'nut' is ambiguous: write north\.nut or south\.nut"):
            find("nut")
        with pytest.raises(SprueError, match=r"there is no class 'screw'; there are: .*north\.nut.*south\.washer"):
            find("screw")
