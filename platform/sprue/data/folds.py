"""Folds of the good samples, for cross-conformal calibration: each calibrates one flow, and trains the others.

As in `sprue.data.splits`, a seeded digest of their content ranks a class's samples. A fold is a part of this ranking,
so that added samples move only those near the folds' borders, and identical samples always share a fold.
"""

import itertools
import math
from collections.abc import Sequence

from sprue.config import ManifestSettings
from sprue.data.samples import Sample
from sprue.data.splits import MINIMUM_TRAIN, MINIMUM_VALIDATION, ranked, wanted_validation
from sprue.errors import SprueError


def fold_split(fold: int) -> str:
    """What the manifest calls a fold's split; folds are counted from 1.

    >>> fold_split(2)
    'fold-2'
    """
    return f"fold-{fold}"


def is_fold(split: str) -> bool:
    """Whether a split is a fold."""
    return split.startswith("fold-")


def assign_folds(
    class_name: str, digests: Sequence[str], folds: int, settings: ManifestSettings, what: str = "images"
) -> list[str]:
    """The fold of each good training sample of one class, as a split's name.

    Samples are given by the hexadecimal digests of their contents; equal digests share a fold. The error calls the
    samples `what`.

    Raises:
        SprueError: If too few distinct samples would be left to fit each flow.

    >>> assigned = assign_folds("brick", [str(number) for number in range(100)], 5, ManifestSettings())
    >>> [assigned.count(fold_split(fold)) for fold in range(1, 6)]
    [20, 20, 20, 20, 20]
    """
    distinct = ranked(set(digests), settings.seed)
    total = len(distinct)
    if not _enough(total, folds, settings):
        needed = next(count for count in itertools.count(total) if _enough(count, folds, settings))
        raise SprueError(
            f"class {class_name!r} has {total} distinct good training {what}, but {folds} folds "
            f"(calibration.folds) need {needed}. Add good {what}, or set calibration.folds to null."
        )
    split_of = {digest: fold_split(1 + rank * folds // total) for rank, digest in enumerate(distinct)}
    return [split_of[digest] for digest in digests]


def samples_of_fit(
    folds: Sequence[Sequence[Sample]], fold: int, settings: ManifestSettings
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """The training and the validation samples of the flow that a fold calibrates.

    Some samples of the next fold validate: the fold's own must have no say in which epoch is kept. All other samples
    train.

    Args:
        folds: The samples of each fold, in the manifest's order.
        fold: Counted from 1.
        settings: The validation's fraction, and the seed.

    >>> folds = [[("a",), ("b",)], [("c",), ("d",)], [("e",), ("f",)]]
    >>> samples_of_fit(folds, 3, ManifestSettings())
    ((('b',), ('c',), ('d',)), (('a',),))
    """
    following = fold % len(folds)
    of_content = {"".join(sample): sample for sample in folds[following]}
    count = _validation_count(sum(map(len, folds)), len(folds[following]), settings)
    chosen = {of_content[content] for content in ranked(of_content, settings.seed)[:count]}
    others = [sample for index, samples in enumerate(folds) if index != fold - 1 for sample in samples]
    return (
        tuple(sample for sample in others if sample not in chosen),
        tuple(sample for sample in folds[following] if sample in chosen),
    )


def _validation_count(total: int, fold: int, settings: ManifestSettings) -> int:
    return max(MINIMUM_VALIDATION, min(wanted_validation(settings, total), fold))


def _enough(total: int, folds: int, settings: ManifestSettings) -> bool:
    """Whether each fold has a sample, and the flow of the largest enough to train on."""
    largest = math.ceil(total / folds)
    return total >= folds and total - largest - _validation_count(total, largest, settings) >= MINIMUM_TRAIN
