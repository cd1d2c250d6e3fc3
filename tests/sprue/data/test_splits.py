import hashlib
from collections import Counter

import pytest

from sprue.data.splits import SplitConfig, assign_splits
from sprue.errors import SprueError
from sprue.inference.calibration import pictures_needed

ALPHA = 0.05


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


@pytest.mark.parametrize(
    ("total", "counts"),
    [(60, (19, 3, 38)), (91, (19, 5, 67)), (104, (19, 5, 80)), (300, (19, 15, 266)), (762, (39, 38, 685))],
)
def test_counts_are_the_rounded_fractions(total, counts):
    assert SplitConfig().counts(total, 19) == counts
    assert Counter(assign_splits("tile", digests(total), SplitConfig(), ALPHA)) == dict(
        zip(("calibration", "validation", "train"), counts, strict=True)
    )


def test_a_fraction_is_taken_as_the_decimal_that_was_written():
    # 0.07 * 100 is 7.000000000000001 in binary.
    assert SplitConfig(calibration=0.07).counts(100, 1)[0] == 7


def test_the_split_depends_on_content_and_seed_and_not_on_order():
    forwards = dict(zip(digests(120), assign_splits("tile", digests(120), SplitConfig(), ALPHA), strict=True))
    backwards = dict(
        zip(digests(120)[::-1], assign_splits("tile", digests(120)[::-1], SplitConfig(), ALPHA), strict=True)
    )
    other = dict(zip(digests(120), assign_splits("tile", digests(120), SplitConfig(seed=1), ALPHA), strict=True))
    assert forwards == backwards
    assert forwards != other


def test_adding_pictures_moves_few_others():
    before = assign_splits("tile", digests(200), SplitConfig(), ALPHA)
    after = assign_splits("tile", digests(210), SplitConfig(), ALPHA)[:200]
    moved = sum(old != new for old, new in zip(before, after, strict=True))
    # The two borders move by 1 and 2 places in 210; a fresh shuffle would move about 90.
    assert moved <= 6


def test_identical_pictures_share_a_split():
    repeated = digests(100) + digests(40)
    splits = assign_splits("tile", repeated, SplitConfig(), ALPHA)
    assert splits[100:] == splits[:40]
    # Copies do not count: they would tell a calibration nothing new.
    assert Counter(splits[:100]) == {"train": 76, "calibration": 19, "validation": 5}


def test_too_few_names_class_count_and_need():
    with pytest.raises(SprueError) as caught:
        assign_splits("bottle", digests(27), SplitConfig(), ALPHA)
    message = str(caught.value)
    for part in ("'bottle' has 27 good", "but 28 distinct ones are needed", "at least 19", "alpha=0.05", "raise alpha"):
        assert part in message
    assert len(assign_splits("bottle", digests(28), SplitConfig(), ALPHA)) == 28


def test_copies_do_not_make_up_for_too_few():
    with pytest.raises(SprueError, match=r"50 good training pictures \(25 of them distinct\), but 28"):
        assign_splits("bottle", digests(25) * 2, SplitConfig(), ALPHA)


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        (SplitConfig(), 0.05),
        (SplitConfig(), 0.2),
        (SplitConfig(calibration=0.6, validation=0.3), 0.3),
        (SplitConfig(calibration=0.01, validation=0.01), 0.5),
        (SplitConfig(calibration=0.45, validation=0.45), 0.5),
    ],
)
def test_the_stated_need_suffices_and_one_less_does_not(config, alpha):
    need = config.minimum_total(pictures_needed(alpha))
    splits = Counter(assign_splits("tile", digests(need), config, alpha))
    assert splits["train"] >= 8
    assert splits["validation"] >= 1
    assert splits["calibration"] >= pictures_needed(alpha)
    with pytest.raises(SprueError, match=f"but {need} distinct"):
        assign_splits("tile", digests(need - 1), config, alpha)


def test_no_pictures_at_all_is_too_few():
    with pytest.raises(SprueError, match="has 0 good training pictures"):
        assign_splits("tile", [], SplitConfig(), ALPHA)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calibration": 0}, "calibration is 0"),
        ({"calibration": "0.2"}, "calibration is '0.2'"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"validation": float("nan")}, "validation is nan"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"calibration": 0.6, "validation": 0.4}, "leave no picture to train on"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(SprueError, match=message):
        SplitConfig(**values)
