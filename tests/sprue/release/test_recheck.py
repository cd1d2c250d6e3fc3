"""The nightly check of champions; `tests/sprue/serving/test_decisions.py` has it on what a service has decided."""

from datetime import date

from upath import UPath

from sprue.release.decision_store import DecisionStore
from sprue.release.recheck import recheck
from sprue.tracking.registry import RegisteredDetector


def test_a_champion_that_can_not_be_read_stops_no_other(store, tmp_path):
    champions = [RegisteredDetector("plant", name, 1, "no-run", {}) for name in ("first", "second")]
    found = list(recheck(champions, DecisionStore(UPath(tmp_path)), date(2026, 1, 1), replays=0))
    assert [each.model_name for each in found] == ["plant.first", "plant.second"]
    assert all(each.findings for each in found)
