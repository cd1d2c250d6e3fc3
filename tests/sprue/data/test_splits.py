import hashlib
from collections import Counter

import pytest
from pydantic import ValidationError

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.splits import FEWEST, assign_splits, few_counts, lowest_alpha, minimum_total, split_counts
from sprue.errors import SprueError
from sprue.inference.calibration import calibration_samples_needed

PROMISE = CalibrationSettings(alpha=0.05)
SETTINGS = ManifestSettings(validation=0.05)


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


@pytest.mark.parametrize(
    ("total", "counts"),
    [(60, (19, 3, 38)), (91, (19, 5, 67)), (104, (19, 5, 80)), (300, (19, 15, 266)), (762, (39, 38, 685))],
)
def test_counts_are_the_rounded_fractions(total, counts):
    assert split_counts(SETTINGS, total, 19) == counts
    assert Counter(assign_splits("tile", digests(total), SETTINGS, PROMISE)) == dict(
        zip(("calibration", "validation", "train"), counts, strict=True)
    )


def test_a_fraction_is_taken_as_the_decimal_that_was_written():
    # 0.07 * 100 is 7.000000000000001 in binary.
    assert split_counts(ManifestSettings(calibration=0.07), 100, 1)[0] == 7


def test_the_split_depends_on_content_and_seed_and_not_on_order():
    forwards = dict(zip(digests(120), assign_splits("tile", digests(120), SETTINGS, PROMISE), strict=True))
    backwards = dict(zip(digests(120)[::-1], assign_splits("tile", digests(120)[::-1], SETTINGS, PROMISE), strict=True))
    other = dict(
        zip(
            digests(120),
            assign_splits("tile", digests(120), SETTINGS.model_copy(update={"seed": 1}), PROMISE),
            strict=True,
        )
    )
    assert forwards == backwards
    assert forwards != other


def test_adding_images_moves_few_others():
    before = assign_splits("tile", digests(200), SETTINGS, PROMISE)
    after = assign_splits("tile", digests(210), SETTINGS, PROMISE)[:200]
    moved = sum(old != new for old, new in zip(before, after, strict=True))
    # The two borders move by 1 and 2 ranks in 210; a fresh shuffle would move about 90.
    assert moved <= 6


def test_identical_images_share_a_split():
    repeated = digests(100) + digests(40)
    splits = assign_splits("tile", repeated, SETTINGS, PROMISE)
    assert splits[100:] == splits[:40]
    # Copies do not count: they add nothing to a calibration.
    assert Counter(splits[:100]) == {"train": 76, "calibration": 19, "validation": 5}


def test_too_few_names_class_count_and_need():
    with pytest.raises(SprueError) as caught:
        assign_splits("bottle", digests(11), SETTINGS, PROMISE)
    message = str(caught.value)
    for part in (
        "'bottle' has 11 good",
        "at least 12 distinct ones are needed",
        "28 for alpha=0.05",
        "Add good images",
    ):
        assert part in message
    assert len(assign_splits("bottle", digests(12), SETTINGS, PROMISE)) == 12
    conditional = CalibrationSettings(guarantee="conditional")
    with pytest.raises(SprueError, match=r"12 distinct ones are needed, and 68 for alpha=0.05 with confidence 0.95\."):
        assign_splits("bottle", digests(11), SETTINGS, conditional)


def test_copies_do_not_make_up_for_too_few():
    with pytest.raises(SprueError, match=r"22 good training images \(11 of them distinct\), but at least 12"):
        assign_splits("bottle", digests(11) * 2, SETTINGS, PROMISE)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        (SETTINGS, 0.05),
        (SETTINGS, 0.2),
        (ManifestSettings(calibration=0.6, validation=0.3), 0.3),
        (ManifestSettings(calibration=0.01, validation=0.01), 0.5),
        (ManifestSettings(calibration=0.45, validation=0.45), 0.5),
    ],
)
def test_the_stated_need_suffices_and_one_less_takes_from_the_fractions(settings, alpha):
    least = calibration_samples_needed(alpha)
    need, promise = minimum_total(settings, least), CalibrationSettings(alpha=alpha)
    splits = Counter(assign_splits("tile", digests(need), settings, promise))
    assert splits["train"] >= 8
    assert splits["validation"] >= 1
    assert splits["calibration"] >= least
    assert split_counts(settings, need - 1, least)[2] < 8
    if need - 1 < FEWEST:
        with pytest.raises(SprueError, match=f"but at least {need} distinct ones are needed. Add"):
            assign_splits("tile", digests(need - 1), settings, promise)
    else:
        splits = Counter(assign_splits("tile", digests(need - 1), settings, promise))
        assert splits["validation"] == 1 and splits["train"] >= 8


@pytest.mark.parametrize(
    ("total", "counts", "alpha"),
    [(12, (3, 1, 8), 0.25), (17, (8, 1, 8), 1 / 9), (20, (9, 1, 10), 0.1), (27, (13, 1, 13), 1 / 14)],
)
def test_few_images_calibrate_with_half_and_train_on_eight_at_least(total, counts, alpha):
    splits = Counter(assign_splits("toy", digests(total), SETTINGS, PROMISE))
    assert (splits["calibration"], splits["validation"], splits["train"]) == counts
    assert few_counts(SETTINGS, total, 19) == counts
    assert lowest_alpha(PROMISE, counts[0]) == alpha


@pytest.mark.parametrize("wanted", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("guarantee", ["marginal", "conditional"])
def test_the_lowest_alpha_can_be_promised_and_no_lower_one(guarantee, wanted):
    settings = CalibrationSettings(alpha=wanted, guarantee=guarantee)
    for count in range(3, 120):
        alpha = lowest_alpha(settings, count)
        assert alpha >= wanted
        assert calibration_samples_needed(alpha, guarantee) <= count
        if alpha > wanted:
            assert calibration_samples_needed(max(wanted, alpha - 2e-5), guarantee) > count


def test_no_images_at_all_is_too_few():
    with pytest.raises(SprueError, match="has 0 good training images"):
        assign_splits("tile", [], SETTINGS, PROMISE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calibration": 0}, "calibration"),
        ({"calibration": "0.2"}, "calibration"),
        ({"validation": 1.0}, "validation"),
        ({"validation": float("nan")}, "validation"),
        ({"seed": 0.5}, "seed"),
        ({"calibration": 0.6, "validation": 0.4}, "must sum to less than 1"),
        ({"layout": "coco"}, "layout"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        ManifestSettings(**values)


def test_validation_leaves_enough_to_train_on():
    assert split_counts(ManifestSettings(validation=0.15), 200, 19) == (19, 30, 151)
    assert split_counts(ManifestSettings(validation=0.15), 29, 19) == (19, 2, 8)


def test_a_large_class_trains_on_what_validation_does_not_need():
    assert split_counts(ManifestSettings(validation=0.15), 5000, 19) == (250, 40, 4710)
