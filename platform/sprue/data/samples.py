"""Samples: one part in one image or in several views.

A sample's images share its sample_id. A sample of one image has one view, with the name "".
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import pandas as pd

from sprue.data.layouts import ImageRecord, SkippedFile
from sprue.errors import SprueError

Sample = tuple[str, ...]
"""Digests of a sample's images, in the order of the views."""


def by_class(records: Iterable[ImageRecord]) -> dict[str, list[ImageRecord]]:
    """The images of each class."""
    classes: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        classes[record.class_name].append(record)
    return classes


def by_sample(records: Iterable[ImageRecord]) -> dict[str, list[ImageRecord]]:
    """The images of each sample, in the order of the views."""
    samples: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.sample_id, record.view)):
        samples[record.sample_id].append(record)
    return samples


def complete_samples(
    records: Sequence[ImageRecord],
) -> tuple[list[ImageRecord], list[SkippedFile], dict[str, str]]:
    """Skips samples that lack a view of their class, and images of other views.

    A class's views are those that at least half of its samples have, so that a stray file is skipped alone. Returns the
    images of complete samples, the skipped samples and images, and, by class, what is wrong where there is no such
    view.
    """
    kept: list[ImageRecord] = []
    skipped: list[SkippedFile] = []
    refused: dict[str, str] = {}
    for class_name, of_class in by_class(records).items():
        samples = by_sample(of_class)
        try:
            views = _views(class_name, list(samples.values()))
        except SprueError as error:
            refused[class_name] = str(error)
            continue
        for sample_id, images in samples.items():
            missing = sorted(views - {image.view for image in images})
            if missing:
                skipped.append(SkippedFile(sample_id, f"the sample has no usable image of view {', '.join(missing)}"))
                continue
            kept += [image for image in images if image.view in views]
            skipped += [
                SkippedFile(image.path, "a view that most samples of its class do not have")
                for image in images
                if image.view not in views
            ]
    return kept, skipped, refused


def _views(class_name: str, samples: list[list[ImageRecord]]) -> set[str]:
    counts = Counter(image.view for images in samples for image in images)
    views = {view for view, count in counts.items() if 2 * count >= len(samples)}
    if not views:
        raise SprueError(
            f"class {class_name!r}: no view is found in half of its {len(samples)} samples: give the images of one "
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
    """Names of the views of one class's manifest rows, in order; ``("",)`` for samples of one image."""
    return tuple(rows["view"].unique())
