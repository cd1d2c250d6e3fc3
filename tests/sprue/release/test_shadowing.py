"""A challenger's decisions about live samples, held against the champion's: two stores as the service writes them."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from sprue.release.decision_store import FOLDER as DECISIONS
from sprue.release.decision_store import Decision, DecisionStore, rows_of
from sprue.release.shadowing import FOLDER, Shadowing, read_shadowing
from sprue.store import location

NIGHT = datetime(2026, 11, 29, 23, 59, 58, tzinfo=UTC)


def decided(number, version, is_anomalous, class_name="brick"):
    """The decision about a sample; one a second, over midnight, and all with one identifier."""
    return Decision(
        request_id="line-1",
        at=NIGHT + timedelta(seconds=number),
        station="",
        dataset="textures",
        class_name=class_name,
        version=version,
        files=("flow.safetensors:ab",),
        engine="openvino",
        score=2.0 if is_anomalous else 0.5,
        p_value=0.01 if is_anomalous else 0.5,
        alpha=0.05,
        threshold=1.0,
        is_anomalous=is_anomalous,
        latency_s=0.02,
        batch=1,
        images=("cd" * 32,),
    )


def write(folder, decisions):
    store = DecisionStore(folder)
    for day in {each.at.date() for each in decisions}:
        store.write_part(day, "part", rows_of([each for each in decisions if each.at.date() == day]))


@pytest.fixture
def store(tmp_path):
    """Version 2 shadows version 1 in the seconds 0 to 5, and version 3 in the sixth."""
    store = location(str(tmp_path))
    champion = [False, False, True, True, False, False, True, True]
    challenger = [False, True, True, False, True, True]
    answered = [decided(number, 3 if number == 6 else 1, value) for number, value in enumerate(champion)]
    write(store / DECISIONS, [*answered, decided(0, 1, True, "grass")])
    shadowed = [decided(number, 2, value) for number, value in enumerate(challenger)]
    write(store / FOLDER, [*shadowed, decided(6, 2, False), decided(0, 2, False, "grass")])
    return store


def test_samples_that_both_have_decided_about_are_counted(store):
    found = read_shadowing(store, "textures.brick", 2, 1)
    assert replace(found, alarms=()) == Shadowing(6, both=1, challenger_alone=3, champion_alone=1)
    assert found.excess == 2 / 6
    hours = [each.rpartition("/")[0].partition("images/")[2] for each in found.alarms]
    assert hours == ["date=2026-11-30/hour=00"] * 2 + ["date=2026-11-29/hour=23"]
    assert read_shadowing(store, "textures.brick", 2, 3) == Shadowing(1, both=0, challenger_alone=0, champion_alone=1)
    assert read_shadowing(store, "textures.grass", 2, 1) == Shadowing(1, both=0, challenger_alone=0, champion_alone=1)


def test_a_challenger_that_has_shadowed_nothing_has_no_counts(store, tmp_path):
    for challenger, champion in ((4, 1), (2, 9)):
        assert read_shadowing(store, "textures.brick", challenger, champion) is None
    assert read_shadowing(location(str(tmp_path / "nothing")), "textures.brick", 2, 1) is None


def test_the_chance_is_that_of_a_fair_coin():
    assert Shadowing(100, 4, challenger_alone=5, champion_alone=0).chance == 1 / 32
    assert Shadowing(100, 4, challenger_alone=0, champion_alone=5).chance == 1
    assert replace(Shadowing(100, 4, 0, 0), both=90).chance == 1
