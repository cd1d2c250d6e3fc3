"""Splits the good training samples into calibration, validation and training.

The samples of a class are ranked by a seeded digest of their content: the first are for calibration, the next for
validation, the rest for training. A rank depends on the sample alone. So added samples move only those near the two
borders, and identical samples always share a split.

A class with too few samples for the fractions and the wanted false-alarm rate is still split, down to `FEWEST` samples:
fewer calibrate, and the rate that its detector can promise is higher; see `lowest_alpha`.

With cross-conformal calibration there are folds instead; see `sprue.data.folds`.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.errors import SprueError
from sprue.inference.calibration import calibration_samples_needed

TRAIN, CALIBRATION, VALIDATION, TEST = "train", "calibration", "validation", "test"

MINIMUM_VALIDATION = 1
MAXIMUM_VALIDATION = 40
"""Enough to tell epochs apart; 76 more training images raised CS-Flow's AUROC on the tiles by 0.9 points (one seed)."""
MINIMUM_TRAIN = 8
FEWEST = 12
"""Distinct good samples without which a class is refused: 8 to train on, 1 to validate and 3 to calibrate, which can
promise a false-alarm rate of 25 %."""


def split_counts(settings: ManifestSettings, total: int, least_calibration: int) -> tuple[int, int, int]:
    """Numbers of calibration, validation and training samples out of ``total``.

    Calibration may get more than its fraction, because small classes still need ``least_calibration`` samples;
    validation gets at most `MAXIMUM_VALIDATION`.

    >>> split_counts(ManifestSettings(), 100, least_calibration=19), split_counts(ManifestSettings(), 1000, 19)
    ((19, 15, 66), (50, 40, 910))
    >>> split_counts(ManifestSettings(), 30, least_calibration=19)
    (19, 3, 8)
    """
    calibration = max(math.ceil(_decimal(settings.calibration) * total), least_calibration)
    spare = total - calibration - MINIMUM_TRAIN
    validation = max(MINIMUM_VALIDATION, min(wanted_validation(settings, total), spare))
    return calibration, validation, total - calibration - validation


def wanted_validation(settings: ManifestSettings, total: int) -> int:
    """How many of ``total`` samples validate, where enough are left to train on.

    >>> wanted_validation(ManifestSettings(), 100), wanted_validation(ManifestSettings(), 1000)
    (15, 40)
    """
    return min(round(_decimal(settings.validation) * total), MAXIMUM_VALIDATION)


def minimum_total(settings: ManifestSettings, least_calibration: int) -> int:
    """The fewest distinct good samples that can be split.

    >>> minimum_total(ManifestSettings(), least_calibration=19)
    28
    """
    total = least_calibration + MINIMUM_VALIDATION + MINIMUM_TRAIN
    while split_counts(settings, total, least_calibration)[2] < MINIMUM_TRAIN:
        total += 1
    return total


def few_counts(settings: ManifestSettings, total: int, least_calibration: int) -> tuple[int, int, int]:
    """Numbers of calibration, validation and training samples where ``total`` is below `minimum_total`.

    One sample validates. Half of the others calibrate, but no more than `split_counts` would take, and no more than
    leave `MINIMUM_TRAIN` to train on.

    >>> few_counts(ManifestSettings(), 20, least_calibration=19), few_counts(ManifestSettings(), 12, 19)
    ((9, 1, 10), (3, 1, 8))
    """
    others = total - MINIMUM_VALIDATION
    wanted, _, _ = split_counts(settings, total, least_calibration)
    calibration = min(wanted, others // 2, others - MINIMUM_TRAIN)
    return calibration, MINIMUM_VALIDATION, others - calibration


def lowest_alpha(settings: CalibrationSettings, calibration: int) -> float:
    """The false-alarm rate of a class: ``alpha``, or the lowest that its number of calibration samples can promise.

    A conformal p-value of n calibration samples is at least ``1 / (n + 1)``. The conditional guarantee needs
    ``1 - (1 - alpha) ** n >= confidence``, too; see `calibration_samples_needed`. That rate is rounded up.

    >>> lowest_alpha(CalibrationSettings(), calibration=19), lowest_alpha(CalibrationSettings(), calibration=9)
    (0.05, 0.1)
    >>> lowest_alpha(CalibrationSettings(guarantee="conditional"), calibration=9)
    0.28313
    """
    if calibration >= _least(settings):
        return settings.alpha
    marginal = 1 / (calibration + 1)
    if settings.guarantee == "marginal":
        return marginal
    return max(marginal, math.ceil(1e5 * (1 - (1 - settings.confidence) ** (1 / calibration))) / 1e5)


def ranked(digests: Iterable[str], seed: int) -> list[str]:
    """Digests in the order of a seeded digest of each."""
    return sorted(digests, key=lambda digest: (hashlib.sha256(f"{seed}:{digest}".encode()).digest(), digest))


def assign_splits(
    class_name: str,
    digests: Sequence[str],
    settings: ManifestSettings,
    calibration: CalibrationSettings,
    what: str = "images",
) -> list[str]:
    """The split of each good training sample of one class: calibration, validation or train.

    Samples are given by the hexadecimal digests of their contents; equal digests share a split. The guarantee of the
    calibration asks for a minimum of calibration samples; a class that lacks them gets fewer, see `few_counts`. The
    error calls the samples `what`.

    Raises:
        SprueError: If there are too few distinct samples for any detector.

    >>> digests = [str(number) for number in range(100)]
    >>> splits = assign_splits("brick", digests, ManifestSettings(), CalibrationSettings())
    >>> {name: splits.count(name) for name in ("train", "calibration", "validation")}
    {'train': 66, 'calibration': 19, 'validation': 15}
    """
    distinct = ranked(set(digests), settings.seed)
    least = _least(calibration)
    needed = minimum_total(settings, least)
    if len(distinct) < min(needed, FEWEST):
        duplicates = f" ({len(distinct)} of them distinct)" if len(distinct) < len(digests) else ""
        enough = f", and {needed} for {promise(calibration)}" if needed > FEWEST else ""
        raise SprueError(
            f"class {class_name!r} has {len(digests)} good training {what}{duplicates}, but at least "
            f"{min(needed, FEWEST)} distinct ones are needed{enough}. Add good {what}."
        )
    counts = split_counts if len(distinct) >= needed else few_counts
    held_out, validation, train = counts(settings, len(distinct), least)
    ordered = [CALIBRATION] * held_out + [VALIDATION] * validation + [TRAIN] * train
    split_of = dict(zip(distinct, ordered, strict=True))
    return [split_of[digest] for digest in digests]


def promise(settings: CalibrationSettings) -> str:
    """The guarantee in a few words.

    >>> promise(CalibrationSettings()), promise(CalibrationSettings(guarantee="conditional"))
    ('alpha=0.05', 'alpha=0.05 with confidence 0.95')
    """
    confidence = f" with confidence {settings.confidence}" if settings.guarantee == "conditional" else ""
    return f"alpha={settings.alpha}{confidence}"


def _least(settings: CalibrationSettings) -> int:
    return calibration_samples_needed(settings.alpha, settings.guarantee, settings.confidence)


def _decimal(value: float) -> Fraction:
    # 0.07 means 7/100, not its neighbour in binary: ceil(0.07 * 100) would be 8.
    return Fraction(repr(value))
