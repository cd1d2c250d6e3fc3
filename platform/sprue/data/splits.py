"""Which good training pictures calibrate, validate and train.

The pictures of a class are ranked by a seeded digest of their content: the first go to calibration, the
next to validation, the rest to training. A rank depends on the picture alone, so adding pictures moves
only those near the two borders, and identical pictures always share a split.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from sprue.errors import SprueError
from sprue.inference.calibration import pictures_needed

TRAIN, CALIBRATION, VALIDATION, TEST = "train", "calibration", "validation", "test"
SPLITS = (TRAIN, CALIBRATION, VALIDATION, TEST)

MINIMUM_VALIDATION = 1
MINIMUM_TRAIN = 8


@dataclass(frozen=True)
class SplitConfig:
    """How the good training pictures of a class are divided.

    Args:
        seed: Another seed gives another division.
        calibration: Fraction of the good pictures that turn scores into p-values.
        validation: Fraction held out for early stopping and search.

    Raises:
        SprueError: A value is out of range.
    """

    seed: int = 0
    calibration: float = 0.05
    validation: float = 0.05

    def __post_init__(self) -> None:
        for field in ("calibration", "validation"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise SprueError(f"{field} is {value!r}: give a number between 0 and 1, both excluded.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise SprueError(f"seed is {self.seed!r}: give a whole number.")
        if self.calibration + self.validation >= 1:
            raise SprueError(
                f"calibration ({self.calibration}) and validation ({self.validation}) leave no picture to train on: "
                "their sum must be below 1."
            )

    def counts(self, total: int, least_calibration: int) -> tuple[int, int, int]:
        """Pictures for calibration, validation and training out of ``total``.

        Small classes give calibration more than its fraction, if the false-alarm rate needs it.

        >>> SplitConfig().counts(100, least_calibration=19), SplitConfig().counts(60, least_calibration=19)
        ((19, 5, 76), (19, 3, 38))
        """
        calibration = max(math.ceil(_decimal(self.calibration) * total), least_calibration)
        validation = max(MINIMUM_VALIDATION, round(_decimal(self.validation) * total))
        return calibration, validation, total - calibration - validation

    def minimum_total(self, least_calibration: int) -> int:
        """Fewest distinct good pictures that a class can be divided with.

        >>> SplitConfig().minimum_total(least_calibration=19)
        28
        """
        total = least_calibration + MINIMUM_VALIDATION + MINIMUM_TRAIN
        while self.counts(total, least_calibration)[2] < MINIMUM_TRAIN:
            total += 1
        return total


def assign_splits(
    class_name: str, digests: Sequence[str], config: SplitConfig, alpha: float, what: str = "pictures"
) -> list[str]:
    """Assigns each good training sample of one class to calibration, validation or training.

    Args:
        class_name: Named in the error.
        digests: Hexadecimal digest of each sample's content; equal digests share a split.
        config: Fractions and seed.
        alpha: The false-alarm rate that the calibration has to be able to express.
        what: What the error calls them.

    Returns:
        A split's name per sample, in the order given.

    Raises:
        SprueError: Too few distinct samples for the fractions and alpha.

    >>> splits = assign_splits("brick", [str(number) for number in range(100)], SplitConfig(), alpha=0.05)
    >>> {name: splits.count(name) for name in ("train", "calibration", "validation")}
    {'train': 76, 'calibration': 19, 'validation': 5}
    """
    distinct = sorted(set(digests), key=lambda digest: (_rank_key(config.seed, digest), digest))
    least = pictures_needed(alpha)
    needed = config.minimum_total(least)
    if len(distinct) < needed:
        duplicates = f" ({len(distinct)} of them distinct)" if len(distinct) < len(digests) else ""
        raise SprueError(
            f"class {class_name!r} has {len(digests)} good training {what}{duplicates}, but {needed} distinct ones "
            f"are needed: at least {least} for calibration at alpha={alpha}, {MINIMUM_TRAIN} to train on and the "
            f"validation fraction of {config.validation}. Add good {what}, or raise alpha."
        )
    calibration, validation, train = config.counts(len(distinct), least)
    ordered = [CALIBRATION] * calibration + [VALIDATION] * validation + [TRAIN] * train
    split_of = dict(zip(distinct, ordered, strict=True))
    return [split_of[digest] for digest in digests]


def _rank_key(seed: int, digest: str) -> bytes:
    return hashlib.sha256(f"{seed}:{digest}".encode()).digest()


def _decimal(value: float) -> Fraction:
    # 0.07 means 7/100, not its neighbour in binary: ceil(0.07 * 100) would be 8.
    return Fraction(repr(value))
