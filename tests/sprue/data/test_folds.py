"""Folds of the good samples: balanced, stable, disjoint from what they calibrate."""

import pandas as pd
import pytest

from sprue.config import ManifestSettings
from sprue.data.folds import assign_folds, fold_of
from sprue.data.manifest import Manifest
from sprue.data.splits import MINIMUM_TRAIN
from sprue.errors import SprueError

SETTINGS = ManifestSettings()
DIGESTS = [f"{number:x}" for number in range(103)]


def manifest_of(digests, splits):
    """A manifest of a class with a sample for each digest."""
    rows = pd.DataFrame({"class_name": "brick", "split": splits, "sha256": digests})
    return Manifest("plant", SETTINGS, rows.assign(sample_id=[str(number) for number in range(len(digests))]))


def counts(assigned, folds):
    return [sum(fold_of(split) == fold for split in assigned) for fold in range(1, folds + 1)]


def test_folds_are_balanced_and_follow_the_seed():
    assigned = assign_folds("brick", DIGESTS, 5, SETTINGS)
    assert sum(counts(assigned, 5)) == 103 and max(counts(assigned, 5)) - min(counts(assigned, 5)) <= 1
    assert assign_folds("brick", DIGESTS, 5, SETTINGS) == assigned
    assert assign_folds("brick", DIGESTS, 5, ManifestSettings(seed=1)) != assigned


def test_an_added_sample_moves_only_those_near_a_border():
    before = assign_folds("brick", DIGESTS, 5, SETTINGS)
    after = assign_folds("brick", [*DIGESTS, "added"], 5, SETTINGS)
    # At each border of a fold, and at each end of its validation.
    assert sum(old != new for old, new in zip(before, after, strict=False)) <= 10


def test_identical_samples_share_a_fold():
    assigned = assign_folds("brick", [*DIGESTS, *DIGESTS], 4, SETTINGS)
    assert assigned[: len(DIGESTS)] == assigned[len(DIGESTS) :]


@pytest.mark.parametrize(("count", "folds"), [(40, 5), (103, 3), (20, 20)])
def test_every_sample_is_left_out_of_one_fit_and_validates_at_most_one(count, folds):
    # Each content twice: copies go together.
    digests = [*DIGESTS[:count], *DIGESTS[:count]]
    assigned = assign_folds("brick", digests, folds, SETTINGS)
    manifest = manifest_of(digests, assigned)
    left_out, validated = [], []
    for fold in range(1, folds + 1):
        train, validation = (set(rows["sha256"]) for rows in manifest.fit_rows("brick", fold))
        own = set(manifest.folds("brick")[fold - 1]["sha256"])
        assert len(train) >= MINIMUM_TRAIN and validation
        assert sorted([*train, *validation, *own]) == sorted(set(digests))
        left_out += own
        validated += validation
    assert sorted(left_out) == sorted(set(digests))
    assert len(set(validated)) == len(validated)


@pytest.mark.parametrize(("count", "folds", "needed"), [(12, 2, 22), (30, 40, 40), (8, 5, 13)])
def test_too_few_samples_say_how_many_are_needed(count, folds, needed):
    with pytest.raises(SprueError, match=rf"'brick' has {count} distinct .* {folds} folds .* need {needed}\."):
        assign_folds("brick", DIGESTS[:count], folds, SETTINGS)
    assert len(assign_folds("brick", DIGESTS[:needed], folds, SETTINGS)) == needed
