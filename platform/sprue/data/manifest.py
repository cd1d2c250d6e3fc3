"""The manifest: a row for each usable image; and the skipped files and the refused classes, with the reasons."""

import io
import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import fastparquet
import pandas as pd
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.decisions import without_dropped
from sprue.data.inspection import Inspection, inspect_images
from sprue.data.layouts import GOOD, LAYOUTS, ImageRecord, SkippedFile
from sprue.data.near_duplicates import shared_digests, without_near_duplicates
from sprue.data.samples import complete_samples, samples_of
from sprue.data.splits import CALIBRATION, TEST, TRAIN, assign_splits, lowest_alpha
from sprue.errors import SprueError
from sprue.store import KeptBytes, write_bytes

COLUMNS = (
    "dataset",
    "class_name",
    "split",
    "label",
    "defect_type",
    "sample_id",
    "view",
    "path",
    "mask_path",
    "sha256",
    "width",
    "height",
)
TEXT_COLUMNS = tuple(name for name in COLUMNS if name not in ("label", "width", "height"))
_METADATA_KEY = "sprue.manifest"


@dataclass(frozen=True)
class Manifest:
    """A dataset's images, classes and splits; later stages read nothing else of the folders.

    Attributes:
        dataset: The dataset's name.
        settings: Layout, fractions and seed.
        frame: A row for each image, sorted by class, sample and view; columns as in ``COLUMNS``: ``split`` is train,
            calibration, validation or test, ``label`` 0 (good) or 1 (defective) of the sample, ``defect_type``
            "good" or the defect's name, ``view`` empty for samples of one image, ``path`` and ``mask_path`` (empty
            if there is none) relative to the root, ``width`` and ``height`` in stored pixels. All samples of a
            class have the same views.
        skipped: Skipped files and samples, sorted by path.
        refused: The classes that have no rows because nothing can be trained on them: what each needs.
    """

    dataset: str
    settings: ManifestSettings
    frame: pd.DataFrame
    skipped: tuple[SkippedFile, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(self.frame["class_name"].unique())

    def select(self, class_name: str, split: str) -> pd.DataFrame:
        """Rows of one class and split in the manifest's order, numbered from 0; there may be none.

        Raises:
            SprueError: If the class is unknown.
        """
        if class_name not in self.classes:
            raise SprueError(f"class {class_name!r} is not in the manifest, which holds {', '.join(self.classes)}")
        chosen = (self.frame["class_name"] == class_name) & (self.frame["split"] == split)
        return self.frame[chosen].reset_index(drop=True)

    def calibration(self, class_name: str, settings: CalibrationSettings) -> CalibrationSettings:
        """A class's settings: where its calibration samples are few, ``alpha`` is the lowest that they can promise.

        Copies of a sample do not count: they say nothing new.
        """
        alpha = lowest_alpha(settings, len(set(samples_of(self.select(class_name, CALIBRATION)))))
        return settings.model_copy(update={"alpha": alpha})

    def write(self, path: UPath) -> None:
        """Writes a Parquet file; equal manifests give equal files."""
        about = {
            "dataset": self.dataset,
            "settings": self.settings.model_dump(),
            "skipped": [asdict(entry) for entry in self.skipped],
            "refused": dict(self.refused),
        }
        parquet = KeptBytes()
        fastparquet.write(
            "manifest",
            self.frame,
            compression="ZSTD",
            has_nulls=False,
            write_index=False,
            object_encoding=dict.fromkeys(TEXT_COLUMNS, "utf8"),
            custom_metadata={_METADATA_KEY: json.dumps(about, sort_keys=True)},
            open_with=lambda *_: parquet,
        )
        write_bytes(path, parquet.getvalue())

    @classmethod
    def read(cls, path: UPath) -> Self:
        """Reads a file of `write`.

        Raises:
            SprueError: If it is missing or no manifest.
        """
        if not path.is_file():
            raise SprueError(f"there is no manifest at {path}; run the manifest stage first")
        try:
            parquet = fastparquet.ParquetFile(io.BytesIO(path.read_bytes()), verify=True)
            about = json.loads(parquet.key_value_metadata[_METADATA_KEY])
        except (fastparquet.util.ParquetException, OSError, KeyError, ValueError) as error:
            raise SprueError(f"{path} is no manifest; run the manifest stage again") from error
        skipped = tuple(SkippedFile(**entry) for entry in about["skipped"])
        settings = ManifestSettings(**about["settings"])
        return cls(about["dataset"], settings, _typed(parquet.to_pandas()), skipped, about["refused"])


def build_manifest(root: UPath, dataset: str, settings: ManifestSettings, calibration: CalibrationSettings) -> Manifest:
    """Reads a dataset's folders, decodes every image once and splits the good training samples.

    Skips damaged images, files that are no images, training images that are also test images or copies of one, images
    that `settings` drops, and samples that lack a view because of this. A sample with a damaged mask stays, without
    ground truth. A class is refused, and the others go on, if a mask has another size than its image, its samples share
    no view, or it has too few for its splits. Equal files and settings give equal manifests.

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
    class_names = sorted({record.class_name for record in records})
    records, dropped = without_dropped(records, settings)
    found = inspect_images(root, {path: None for record in records for path in (record.path, record.mask_path) if path})
    skipped += [SkippedFile(path, inspection.damage) for path, inspection in found.items() if inspection.damage]
    records = [record for record in records if not found[record.path].damage]
    refused = layout.empty_classes(root) | _wrong_masks(records, found)
    records, leaked = _without_leaks(records, found)
    records, copied = without_near_duplicates(records, found, settings.keep)
    skipped += dropped + leaked + copied
    rows: list[dict[str, Any]] = []
    for name in class_names:
        of_class = [record for record in records if record.class_name == name]
        try:
            complete, incomplete = complete_samples(of_class)
            skipped += incomplete
            split_of = _split_training(name, complete, found, skipped, settings, calibration)
        except SprueError as error:
            refused.setdefault(name, str(error))
        if name not in refused:
            rows += _rows(dataset, complete, found, split_of)
    if not rows:
        raise SprueError("\n".join(reason for _, reason in sorted(refused.items())))
    frame = _typed(pd.DataFrame(rows, columns=list(COLUMNS)))
    return Manifest(dataset, settings, frame, tuple(sorted(skipped)), refused)


def _wrong_masks(records: list[ImageRecord], found: dict[str, Inspection]) -> dict[str, str]:
    """The classes with masks of another size than their image, and what is wrong."""
    problems: dict[str, list[str]] = defaultdict(list)
    for record in records:
        image, mask = found[record.path], found.get(record.mask_path)
        if mask and not mask.damage and (mask.width, mask.height) != (image.width, image.height):
            problems[record.class_name].append(
                f"mask {record.mask_path} is {mask.width}x{mask.height}, "
                f"its image {record.path} is {image.width}x{image.height}"
            )
    return {
        name: f"class {name!r} has masks of another size than their image: {'; '.join(of_class)}. Correct or remove "
        "these masks."
        for name, of_class in problems.items()
    }


def _without_leaks(
    records: list[ImageRecord], found: dict[str, Inspection]
) -> tuple[list[ImageRecord], list[SkippedFile]]:
    """Skips training images that are also test images, of any class."""
    tested = {found[record.path].sha256: record.path for record in reversed(records) if record.split == TEST}
    kept, leaked = [], []
    for record in records:
        twin = tested.get(found[record.path].sha256) if record.split == TRAIN else None
        if twin:
            leaked.append(SkippedFile(record.path, f"identical to the test image {twin}"))
        else:
            kept.append(record)
    return kept, leaked


def _split_training(
    class_name: str,
    records: list[ImageRecord],
    found: dict[str, Inspection],
    skipped: list[SkippedFile],
    settings: ManifestSettings,
    calibration: CalibrationSettings,
) -> dict[str, str]:
    """Split of each training sample of a class; raises a SprueError if there are too few."""
    what = "samples" if any(record.view for record in records) else "images"
    digests_of: dict[str, list[str]] = defaultdict(list)
    shared = shared_digests(records, found)
    for record in records:
        if record.split == TRAIN:
            digests_of[record.sample_id].append(shared[record.path])
    contents = ["".join(digests) for digests in digests_of.values()]
    try:
        assigned = assign_splits(class_name, contents, settings, calibration, what)
    except SprueError as error:
        raise SprueError(f"{error}{_skipped_training_files(class_name, skipped)}") from error
    return dict(zip(digests_of, assigned, strict=True))


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


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Casts the columns, so that built and read manifests are equal."""
    return frame.astype({name: "str" if name in TEXT_COLUMNS else "int64" for name in COLUMNS})
