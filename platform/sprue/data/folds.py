"""Folds of the good samples, for cross-conformal calibration: each calibrates one flow, and trains the others.

As in `sprue.data.splits`, a seeded digest of their content ranks a class's samples. A fold is a part of this ranking,
so that added samples move only those near the folds' borders, and identical samples always share a fold. The first of a
fold validate the flow before: a fold's own samples must have no say in which epoch of its flow is kept.
"""

import itertools
import math
import re
from collections.abc import Sequence

from sprue.config import ManifestSettings
from sprue.data.splits import MINIMUM_TRAIN, MINIMUM_VALIDATION, ranked, wanted_validation
from sprue.errors import SprueError

VALIDATING = "-validation"
"""Ends the split of those samples of a fold that validate the flow of the fold before it."""


def fold_split(fold: int, validates: bool = False) -> str:
    """What the manifest calls the split of a fold's samples; folds are counted from 1.

    >>> fold_split(2), fold_split(2, validates=True)
    ('fold-2', 'fold-2-validation')
    """
    return f"fold-{fold}{VALIDATING if validates else ''}"


def fold_of(split: str) -> int | None:
    """The fold that a split is of; None if it is of none.

    >>> fold_of("fold-2-validation"), fold_of("train")
    (2, None)
    """
    found = re.match(r"fold-(\d+)", split)
    return int(found[1]) if found else None


def validates(split: str, fold: int, folds: int) -> bool:
    """Whether samples of a split validate the flow that a fold calibrates, of so many folds.

    >>> validates("fold-1-validation", fold=5, folds=5), validates("fold-2-validation", fold=5, folds=5)
    (True, False)
    """
    return split == fold_split(fold % folds + 1, validates=True)


def assign_folds(
    class_name: str, digests: Sequence[str], folds: int, settings: ManifestSettings, what: str = "images"
) -> list[str]:
    """The fold of each good training sample of one class, as a split's name.

    Samples are given by the hexadecimal digests of their contents; equal digests share a split. The error calls the
    samples `what`.

    Raises:
        SprueError: If too few distinct samples would be left to fit each flow.

    >>> assigned = assign_folds("brick", [str(number) for number in range(100)], 5, ManifestSettings())
    >>> [(assigned.count(fold_split(fold)), assigned.count(fold_split(fold, True))) for fold in (1, 2, 5)]
    [(5, 15), (5, 15), (5, 15)]
    """
    distinct = ranked(set(digests), settings.seed)
    total = len(distinct)
    if not _enough(total, folds, settings):
        needed = next(count for count in itertools.count(total) if _enough(count, folds, settings))
        raise SprueError(
            f"class {class_name!r} has {total} distinct good training {what}, but {folds} folds "
            f"(calibration.folds) need {needed}. Add good {what}, or set calibration.folds to null."
        )
    split_of: dict[str, str] = {}
    for fold in range(1, folds + 1):
        members = distinct[(fold - 1) * total // folds : fold * total // folds]
        count = _validation_count(total, len(members), settings)
        split_of |= {digest: fold_split(fold, rank < count) for rank, digest in enumerate(members)}
    return [split_of[digest] for digest in digests]


def _validation_count(total: int, fold: int, settings: ManifestSettings) -> int:
    return max(MINIMUM_VALIDATION, min(wanted_validation(settings, total), fold))


def _enough(total: int, folds: int, settings: ManifestSettings) -> bool:
    """Whether each fold has a sample, and the flow of the largest enough to train on."""
    largest = math.ceil(total / folds)
    return total >= folds and total - largest - _validation_count(total, largest, settings) >= MINIMUM_TRAIN
