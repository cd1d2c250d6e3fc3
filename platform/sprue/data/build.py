"""Builds the manifest of a dataset's folders."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import pandas as pd
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.decisions import without_dropped
from sprue.data.folds import assign_folds
from sprue.data.inspection import Inspection, inspect_images
from sprue.data.layouts import GOOD, LAYOUTS, ImageRecord, SkippedFile
from sprue.data.manifest import COLUMNS, Manifest, typed
from sprue.data.masks import WHITE
from sprue.data.near_duplicates import shared_digests, without_near_duplicates
from sprue.data.samples import Sample, by_class, by_sample, complete_samples
from sprue.data.splits import TEST, TRAIN, VALIDATION, assign_splits
from sprue.errors import SprueError

FAINT = 0.25
"""Fraction of the full scale: 14-bit values in 16 bits stay below, and 12-bit values become 16 grey levels."""


def build_manifest(root: UPath, dataset: str, settings: ManifestSettings, calibration: CalibrationSettings) -> Manifest:
    """Reads a dataset's folders, decodes every image once and splits the good training samples, or makes folds of them.

    Skips damaged images, files that are no images, images that `settings` drops, samples that lack a view because of
    this, training samples that are also test samples or copies of one, and copies of a sample that calibrates. A sample
    with a damaged mask stays, without ground truth. A class is refused, and the others go on, if a mask has another
    size than its image or values but no white, its images of more than 8 bits use little of their scale, its samples
    share no view, or it has too few for its splits. Equal files and settings give equal manifests.

    Args:
        root: Folder of the dataset, local or remote.
        dataset: Its name.
        settings: Layout, fractions and seed.
        calibration: What is to be guaranteed, which asks for a number of calibration samples.

    Raises:
        SprueError: If the folders do not follow the layout, `settings` keeps or drops an image that does not exist, or
            all classes are refused.
    """
    layout = LAYOUTS[settings.layout]
    records, skipped = layout.read(root)
    class_names = {record.class_name for record in records}
    records, dropped = without_dropped(records, settings)
    found = inspect_images(
        root,
        images=dict.fromkeys(record.path for record in records),
        masks=dict.fromkeys(record.mask_path for record in records if record.mask_path),
    )
    skipped += [SkippedFile(path, inspection.damage) for path, inspection in found.items() if inspection.damage]
    records = [record for record in records if not found[record.path].damage]
    complete, incomplete, unlike = complete_samples(records)
    refused = unlike | layout.empty_classes(root) | _faint(records, found) | _wrong_masks(records, found)
    complete, leaked = _without_leaks(complete, found)
    complete, copied = without_near_duplicates(complete, found, settings.keep)
    skipped += dropped + incomplete + leaked + copied
    classes = by_class(complete)
    rows: list[dict[str, Any]] = []
    for name in sorted(class_names.difference(refused)):
        of_class = classes.get(name, [])
        contents = shared_digests(of_class, found)
        try:
            split_of = _split_training(name, of_class, contents, skipped, settings, calibration)
        except SprueError as error:
            refused[name] = str(error)
            continue
        repeated = _repeated(contents, split_of)
        skipped += repeated
        gone = {entry.path for entry in repeated}
        rows += _rows(dataset, [record for record in of_class if record.sample_id not in gone], found, split_of)
    if not rows:
        raise SprueError("\n".join(reason for _, reason in sorted(refused.items())))
    frame = typed(pd.DataFrame(rows, columns=list(COLUMNS)))
    return Manifest(dataset, settings, frame, tuple(sorted(skipped)), refused)


def _wrong_masks(records: list[ImageRecord], found: dict[str, Inspection]) -> dict[str, str]:
    """The classes with masks that can't be compared with their image, and what is wrong."""
    problems: dict[str, list[str]] = defaultdict(list)
    for record in records:
        image, mask = found[record.path], found.get(record.mask_path)
        if not mask or mask.damage:
            continue
        if (mask.width, mask.height) != (image.width, image.height):
            problems[record.class_name].append(
                f"mask {record.mask_path} is {mask.width}x{mask.height}, "
                f"its image {record.path} is {image.width}x{image.height}"
            )
        if mask.peak and mask.peak < WHITE:
            problems[record.class_name].append(
                f"the largest value of mask {record.mask_path} is {100 * mask.peak:.2g} % of white, "
                "and black and white are read: write anomalous pixels as white (255 of 8 bits)"
            )
    return {
        name: f"class {name!r} has wrong masks: {'; '.join(of_class)}. Correct or remove these masks."
        for name, of_class in problems.items()
    }


def _faint(records: list[ImageRecord], found: dict[str, Inspection]) -> dict[str, str]:
    """The classes whose images of more than 8 bits all stay far below the full scale, and what to do."""
    peaks: dict[str, float] = {}
    for record in records:
        peak = found[record.path].peak
        if peak is not None:
            peaks[record.class_name] = max(peak, peaks.get(record.class_name, 0.0))
    return {
        name: f"class {name!r} has images of more than 8 bits, of which none goes beyond {100 * peak:.2g} % of the "
        "full scale (65535 of integers, 1 of floats), so that few grey levels would be left: scale all by one factor. "
        "Many cameras of 10 to 14 bits can align their values to the highest bit (MSB)."
        for name, peak in peaks.items()
        if peak < FAINT
    }


def _without_leaks(
    records: list[ImageRecord], found: dict[str, Inspection]
) -> tuple[list[ImageRecord], list[SkippedFile]]:
    """Skips training samples that are also test samples, of any class: all their images are the same."""
    tested: dict[Sample, ImageRecord] = {}
    for images in by_sample(record for record in records if record.split == TEST).values():
        tested.setdefault(_digests(images, found), images[0])
    leaked = []
    for sample_id, images in by_sample(record for record in records if record.split == TRAIN).items():
        if twin := tested.get(_digests(images, found)):
            leaked.append(SkippedFile(sample_id, f"identical to the test image {twin.path}"))
    gone = {entry.path for entry in leaked}
    return [record for record in records if record.sample_id not in gone], leaked


def _digests(images: list[ImageRecord], found: dict[str, Inspection]) -> Sample:
    return tuple(found[image.path].sha256 for image in images)


def _split_training(
    class_name: str,
    records: list[ImageRecord],
    contents: dict[str, str],
    skipped: list[SkippedFile],
    settings: ManifestSettings,
    calibration: CalibrationSettings,
) -> dict[str, str]:
    """Split or fold of each training sample of a class; raises a SprueError if there are too few."""
    what = "samples" if any(record.view for record in records) else "images"
    digests = list(contents.values())
    try:
        if calibration.folds:
            assigned = assign_folds(class_name, digests, calibration.folds, settings, what)
        else:
            assigned = assign_splits(class_name, digests, settings, calibration, what)
    except SprueError as error:
        raise SprueError(f"{error}{_skipped_training_files(class_name, skipped)}") from error
    return dict(zip(contents, assigned, strict=True))


def _repeated(contents: dict[str, str], split_of: dict[str, str]) -> list[SkippedFile]:
    """The samples that are copies of one that calibrates, for scores that count twice are not exchangeable."""
    first: dict[str, str] = {}
    return [
        SkippedFile(sample_id, f"a copy of {first[content]}, which calibrates")
        for sample_id, content in contents.items()
        if split_of[sample_id] not in (TRAIN, VALIDATION) and first.setdefault(content, sample_id) != sample_id
    ]


def _skipped_training_files(class_name: str, skipped: list[SkippedFile]) -> str:
    entries = [entry for entry in sorted(skipped) if entry.path.startswith(f"{class_name}/{TRAIN}/")]
    if not entries:
        return ""
    return f" Skipped training files: {len(entries)}, the first {entries[0].path} ({entries[0].reason})."


def _rows(
    dataset: str, records: list[ImageRecord], found: dict[str, Inspection], split_of: dict[str, str]
) -> list[dict[str, Any]]:
    """The rows of a class, by sample and view."""
    # These samples lose all masks, because a view without its mask would count as good.
    unmasked = {record.sample_id for record in records if record.mask_path and found[record.mask_path].damage}
    rows = [_row(dataset, record, found[record.path], split_of, unmasked) for record in records]
    return sorted(rows, key=lambda row: (row["sample_id"], row["view"]))


def _row(
    dataset: str, record: ImageRecord, image: Inspection, split_of: dict[str, str], unmasked: Collection[str]
) -> dict[str, Any]:
    return asdict(record) | {
        "dataset": dataset,
        "split": TEST if record.split == TEST else split_of[record.sample_id],
        "label": int(record.defect_type != GOOD),
        "mask_path": "" if record.sample_id in unmasked else record.mask_path,
        "sha256": image.sha256,
        "width": image.width,
        "height": image.height,
    }
