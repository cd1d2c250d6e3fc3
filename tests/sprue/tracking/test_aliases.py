"""Champions change one at a time, by a decision that is on record."""

import multiprocessing
import time

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from sprue.errors import SprueError
from sprue.tracking import trail
from sprue.tracking.aliases import crown, enter, holder, roll_back
from sprue.tracking.lock import class_lock
from sprue.tracking.registry import CHALLENGER, CHAMPION, CLASS_TAG


@pytest.fixture
def versions(store, tmp_path, request):
    """A class of the test's own with four registered versions; its name."""
    client, name = mlflow.MlflowClient(), request.node.name[5:45]
    client.create_registered_model(name, tags={CLASS_TAG: name})
    for _ in range(4):
        client.create_model_version(name, str(tmp_path), run_id=None)
    return name


def trail_of(name):
    return [(entry.kind, entry.before, entry.after) for entry in trail.entries(name)]


def test_the_first_version_is_champion_and_others_challenge_it(versions):
    assert enter(versions, 1) == CHAMPION
    assert enter(versions, 1) == CHAMPION
    assert enter(versions, 2) == enter(versions, 2) == CHALLENGER
    assert (holder(versions, CHAMPION), holder(versions, CHALLENGER)) == (1, 2)
    # The first one's detector is current again, as after `git checkout`.
    assert enter(versions, 1) == CHAMPION
    assert (holder(versions, CHAMPION), holder(versions, CHALLENGER)) == (1, None)
    assert trail_of(versions) == [("first", None, 1)]


def test_a_decision_about_another_champion_changes_nothing(versions):
    enter(versions, 1)
    enter(versions, 2)
    crown(versions, 2, 1, "promoted", "better", {"auroc": 0.9})
    assert (holder(versions, CHAMPION), holder(versions, CHALLENGER)) == (2, None)
    with pytest.raises(SprueError, match="version 2 has become champion in the meantime"):
        crown(versions, 3, 1, "promoted", "better")
    assert holder(versions, CHAMPION) == 2
    assert trail_of(versions) == [("first", None, 1), ("promoted", 1, 2)]
    last = trail.entries(versions)[-1]
    assert (last.reason, last.challenger) == ("better", 2)
    assert "promoted" in str(last) and "1 -> 2" in str(last)
    experiment = mlflow.MlflowClient().get_experiment_by_name(trail.EXPERIMENT).experiment_id
    logged = mlflow.MlflowClient().search_runs([experiment], f"tags.`sprue.class` = '{versions}'")
    assert [run.data.metrics for run in logged if "promoted" in run.info.run_name] == [{"auroc": 0.9}]


def test_rolling_back_goes_one_champion_back_each_time(versions):
    enter(versions, 1)
    crown(versions, 2, 1, "promoted", "better")
    crown(versions, 4, 2, "forced", "the plant wants it")
    assert roll_back(versions, "too many alarms") == 2
    assert roll_back(versions, "still") == 1
    with pytest.raises(SprueError, match="there is no champion before version 1"):
        roll_back(versions, "still")
    crown(versions, 3, 1, "promoted", "better")
    mlflow.MlflowClient().delete_model_version(versions, "1")
    with pytest.raises(SprueError, match="there is no champion before version 3"):
        roll_back(versions, "its files are gone")
    assert holder(versions, CHAMPION) == 3


def test_a_champion_that_came_back_has_the_one_between_before_it(versions):
    enter(versions, 1)
    crown(versions, 2, 1, "promoted", "better")
    crown(versions, 1, 2, "forced", "the old one after all")
    crown(versions, 3, 1, "promoted", "better")
    assert [roll_back(versions, "no") for _ in range(3)] == [1, 2, 1]


def test_a_change_in_the_registry_s_own_page_is_found(versions):
    client = mlflow.MlflowClient()
    enter(versions, 1)
    client.set_registered_model_alias(versions, CHAMPION, "3")
    assert roll_back(versions, "who did that?") == 1
    client.delete_registered_model_alias(versions, CHAMPION)
    assert enter(versions, 4) == CHAMPION
    assert trail_of(versions) == [
        ("first", None, 1), ("external", 1, 3), ("rolled back", 3, 1), ("external", 1, None), ("first", None, 4)
    ]  # fmt: skip


def _promote(uri, name, version, results):
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        crown(name, version, 1, "promoted", "better")
        results.put(version)
    except (SprueError, MlflowException) as error:  # the registry's own failures too, which the test would wait for
        results.put(str(error))


def test_of_promotions_at_once_one_wins_and_the_others_are_told(versions):
    enter(versions, 1)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_promote, args=(mlflow.get_tracking_uri(), versions, version, results))
        for version in (2, 3, 4)
    ]
    for process in processes:
        process.start()
    told = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    (winner,) = (each for each in told if isinstance(each, int))
    assert sum("in the meantime" in str(each) for each in told) == 2, told
    assert holder(versions, CHAMPION) == winner
    assert trail_of(versions) == [("first", None, 1), ("promoted", 1, winner)]


def test_a_lock_that_is_held_names_its_holder_and_is_given_back(versions):
    with class_lock(versions):
        started = time.monotonic()
        told = r"held by .*, process \d+, .*delete the registered model sprue-lock-"
        with pytest.raises(SprueError, match=told), class_lock(versions, patience_s=0.3):
            pytest.fail("two hold it")
        assert time.monotonic() - started < 20
    with pytest.raises(KeyError), class_lock(versions):
        raise KeyError
    with class_lock(versions, patience_s=0.0):
        assert f"sprue-lock-{versions}" in {model.name for model in mlflow.MlflowClient().search_registered_models()}
    assert f"sprue-lock-{versions}" not in {model.name for model in mlflow.MlflowClient().search_registered_models()}
