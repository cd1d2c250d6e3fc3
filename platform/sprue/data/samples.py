"""Samples: the views of one part, in one order, with none missing.

A sample's views are the pictures that share its sample_id; a single-view sample is one picture, of the view "".
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import pandas as pd

from sprue.data.layouts import LeftOut, PictureRecord
from sprue.errors import SprueError

Sample = tuple[str, ...]
"""Digests of a sample's pictures, in the order of its class's views."""


def complete_samples(records: Sequence[PictureRecord]) -> tuple[list[PictureRecord], list[LeftOut]]:
    """Takes samples that lack a view of their class out, and pictures of views that are not the class's.

    A class's views are those that at least half of its samples have, so that a stray file spoils no more than
    itself.

    Args:
        records: The usable pictures.

    Returns:
        The pictures of whole samples, and what is left out.

    Raises:
        SprueError: A class has no such view.
    """
    samples: dict[str, dict[str, list[PictureRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        samples[record.class_name][record.sample_id].append(record)
    kept: list[PictureRecord] = []
    left_out: list[LeftOut] = []
    for class_name, of_class in samples.items():
        views = _views(class_name, list(of_class.values()))
        for sample_id, pictures in of_class.items():
            missing = sorted(views - {picture.view for picture in pictures})
            if missing:
                left_out.append(LeftOut(sample_id, f"the sample has no usable picture of view {', '.join(missing)}"))
                continue
            kept += [picture for picture in pictures if picture.view in views]
            left_out += [
                LeftOut(picture.path, "a view that most samples of its class do not have")
                for picture in pictures
                if picture.view not in views
            ]
    return kept, left_out


def _views(class_name: str, samples: list[list[PictureRecord]]) -> set[str]:
    counts = Counter(picture.view for pictures in samples for picture in pictures)
    views = {view for view, count in counts.items() if 2 * count >= len(samples)}
    if not views:
        raise SprueError(
            f"class {class_name!r}: no view is found in half of its {len(samples)} samples: give the pictures of one "
            f"view the same name in all samples' folders; there are {', '.join(sorted(counts)[:3])} ..."
        )
    return views


def samples_of(rows: pd.DataFrame) -> tuple[Sample, ...]:
    """The samples of one class's manifest rows, in the rows' order.

    >>> rows = pd.DataFrame({"sample_id": ["a", "a", "b", "b"], "sha256": ["a0", "a1", "b0", "b1"]})
    >>> samples_of(rows)
    (('a0', 'a1'), ('b0', 'b1'))
    """
    return tuple(tuple(digests) for _, digests in rows.groupby("sample_id", sort=False)["sha256"])


def views_of(rows: pd.DataFrame) -> tuple[str, ...]:
    """Names of the views of one class's manifest rows, in their order; one empty name for single-view samples."""
    return tuple(rows["view"].unique())
