"""Replicas agree on versions; nothing but the bookkeeping, by a clock of the tests."""

import pytest

from sprue.serving.agreement import LEASE_S, SWITCH_S, WAIT_S, Agreement, Term
from sprue.tracking.registry import RegisteredDetector


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def version(number, name="a"):
    return RegisteredDetector("textures", name, number, run_id="")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def agreement(clock):
    """Version 1 is served by two replicas, and 2 is its candidate."""
    agreement = Agreement(clock)
    agreement.observe([version(1)])
    agreement.observe([version(2)])
    for each in "xy":
        agreement.record(each, {})
    return agreement


def entry(agreement):
    return agreement.changes(0)["textures.a"]


def test_what_is_found_first_is_served_at_once(clock):
    agreement = Agreement(clock)
    agreement.observe([version(1), version(7, "b")])
    assert {name: each.term for name, each in agreement.changes(0).items()} == {
        "textures.a": Term(version(1), clock.now),
        "textures.b": Term(version(7, "b"), clock.now),
    }
    seen = agreement.number
    agreement.observe([version(1), version(7, "b")])
    assert agreement.changes(seen) == {}
    agreement.observe([version(1)])
    assert {name: each.term for name, each in agreement.changes(seen).items()} == {"textures.b": None}
    agreement.observe([version(1), version(8, "b")])  # a class that is new comes for all at one instant, too
    assert agreement.changes(seen)["textures.b"].term == Term(version(8, "b"), clock.now + SWITCH_S)


def test_all_switch_at_one_instant_ahead(agreement, clock):
    agreement.record("x", {version(2): ""})
    agreement.decide()
    assert (entry(agreement).term.champion, entry(agreement).candidate) == (version(1), version(2))
    agreement.record("y", {version(2): ""})
    agreement.decide()
    assert entry(agreement).term == Term(version(2), clock.now + SWITCH_S) and entry(agreement).candidate is None


def test_a_failure_is_told_to_all_and_holds_the_old_version(agreement, clock):
    agreement.record("x", {version(2): ""})
    agreement.record("y", {version(2): "damaged"})
    for _ in range(2):
        agreement.decide()
        assert (entry(agreement).term.champion, entry(agreement).failure) == (version(1), "damaged")
        seen = agreement.number
        clock.now += WAIT_S + 1
        agreement.record("x", {version(2): ""})
        agreement.record("y", {version(2): "damaged"})
    agreement.decide()
    assert agreement.changes(seen) == {}
    agreement.record("y", {version(2): ""})
    agreement.decide()
    assert (entry(agreement).term.champion, entry(agreement).failure) == (version(2), "")


def test_who_is_silent_is_not_waited_for_and_who_hangs_not_for_ever(agreement, clock):
    agreement.record("x", {version(2): ""})
    clock.now += LEASE_S - 1
    agreement.record("y", {})
    agreement.record("x", {version(2): ""})
    agreement.decide()
    assert entry(agreement).term.champion == version(1) and agreement.followers == 2
    clock.now += WAIT_S
    agreement.decide()
    assert entry(agreement).term.champion == version(1) and agreement.followers == 0  # nobody could serve it
    agreement.record("y", {})
    agreement.record("x", {version(2): ""})
    agreement.decide()
    assert entry(agreement).term.champion == version(2)


def test_a_registry_that_goes_back_withdraws_the_candidate(agreement):
    agreement.observe([version(1)])
    agreement.record("x", {version(2): ""})
    agreement.record("y", {version(2): ""})
    agreement.decide()
    assert (entry(agreement).term.champion, entry(agreement).candidate) == (version(1), None)


def test_a_new_process_takes_over_the_newest_of_what_replicas_serve(clock):
    agreement = Agreement(clock)
    agreement.adopt({"textures.a": Term(version(1), 500.0)})
    agreement.adopt({"textures.a": Term(version(2), 1000.2)})  # this one has reported_at of a switch
    agreement.adopt({"textures.a": Term(version(1), 500.0)})
    agreement.observe([version(3)])
    assert entry(agreement).term == Term(version(2), 1000.2) and entry(agreement).candidate == version(3)


def test_challengers_come_and_go_beside_what_is_served(agreement):
    assert entry(agreement).challenger is None
    agreement.observe([version(2)], [version(3)])
    assert (entry(agreement).challenger, entry(agreement).candidate) == (version(3), version(2))
    seen = agreement.number
    agreement.observe([version(2)], [version(3), version(9, "b")])
    assert agreement.changes(seen) == {}
    for each in "xy":
        agreement.record(each, {version(2): ""})
    agreement.decide()
    assert (entry(agreement).term.champion, entry(agreement).challenger) == (version(2), version(3))
    agreement.observe([version(2)])
    assert (entry(agreement).term.champion, entry(agreement).challenger) == (version(2), None)
