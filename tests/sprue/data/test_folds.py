"""Folds of the good samples: balanced, stable, disjoint from what they calibrate."""

import pytest

from sprue.config import ManifestSettings
from sprue.data.folds import assign_folds, fold_split, is_fold, samples_of_fit
from sprue.data.splits import MINIMUM_TRAIN
from sprue.errors import SprueError

SETTINGS = ManifestSettings()
DIGESTS = [f"{number:x}" for number in range(103)]


def test_folds_are_balanced_and_follow_the_seed():
    assigned = assign_folds("brick", DIGESTS, 5, SETTINGS)
    counts = [assigned.count(fold_split(fold)) for fold in range(1, 6)]
    assert sum(counts) == 103 and max(counts) - min(counts) <= 1
    assert all(map(is_fold, assigned)) and not is_fold("train")
    assert assign_folds("brick", DIGESTS, 5, SETTINGS) == assigned
    assert assign_folds("brick", DIGESTS, 5, ManifestSettings(seed=1)) != assigned


def test_an_added_sample_moves_only_those_near_a_border():
    before = assign_folds("brick", DIGESTS, 5, SETTINGS)
    after = assign_folds("brick", [*DIGESTS, "added"], 5, SETTINGS)
    assert sum(old != new for old, new in zip(before, after, strict=False)) <= 5


def test_identical_samples_share_a_fold():
    assigned = assign_folds("brick", [*DIGESTS, *DIGESTS], 4, SETTINGS)
    assert assigned[: len(DIGESTS)] == assigned[len(DIGESTS) :]


@pytest.mark.parametrize(("count", "folds"), [(40, 5), (103, 3), (22, 2), (20, 20)])
def test_every_sample_is_left_out_of_one_fit_and_validates_at_most_one(count, folds):
    digests = DIGESTS[:count] if count <= 103 else DIGESTS
    assigned = assign_folds("brick", digests, folds, SETTINGS)
    of_fold = [
        [(digest,) for digest, split in zip(digests, assigned, strict=True) if split == fold_split(fold)]
        for fold in range(1, folds + 1)
    ]
    validated = []
    for fold in range(1, folds + 1):
        train, validation = samples_of_fit(of_fold, fold, SETTINGS)
        assert len(train) >= MINIMUM_TRAIN and validation
        assert sorted([*train, *validation, *of_fold[fold - 1]]) == sorted((digest,) for digest in digests)
        assert set(validation) <= set(of_fold[fold % folds])
        validated += validation
    assert len(set(validated)) == len(validated)


@pytest.mark.parametrize(("count", "folds", "needed"), [(12, 2, 22), (30, 40, 40), (8, 5, 13)])
def test_too_few_samples_say_how_many_are_needed(count, folds, needed):
    with pytest.raises(SprueError, match=rf"'brick' has {count} distinct .* {folds} folds .* need {needed}\."):
        assign_folds("brick", DIGESTS[:count], folds, SETTINGS)
    assert len(assign_folds("brick", DIGESTS[:needed], folds, SETTINGS)) == needed
