"""The manifest: one row per usable picture, and everything that was left out of it, with the reason."""

import io
import json
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

import fastparquet
import pandas as pd
from upath import UPath

from sprue.data.layouts import GOOD, LAYOUTS, LeftOut, PictureRecord
from sprue.data.pictures import Inspection, inspect_pictures
from sprue.data.samples import complete_samples
from sprue.data.splits import TEST, TRAIN, SplitConfig, assign_splits
from sprue.errors import SprueError
from sprue.store import KeptBytes, write_bytes

TEXT_COLUMNS = (
    "dataset",
    "class_name",
    "split",
    "defect_type",
    "sample_id",
    "view",
    "path",
    "mask_path",
    "sha256",
)
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
_METADATA_KEY = "sprue.manifest"


@dataclass(frozen=True)
class Manifest:
    """A dataset as everything after it sees it.

    Args:
        dataset: The dataset's name.
        splits: How the good training pictures were divided.
        frame: One row per picture, sorted by class, sample and view; columns as in ``COLUMNS``: ``split`` is train,
            calibration, validation or test, ``label`` 0 (good) or 1 (defective) of the sample, ``defect_type``
            "good" or the defect's name, ``view`` empty for single-view samples, ``path`` and ``mask_path`` (empty
            if there is none) relative to the root, ``width`` and ``height`` in stored pixels. Every sample of a
            class has the same views.
        left_out: Files that take no part, sorted by path.
    """

    dataset: str
    splits: SplitConfig
    frame: pd.DataFrame
    left_out: tuple[LeftOut, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(self.frame["class_name"].unique())

    def select(self, class_name: str, split: str) -> pd.DataFrame:
        """Rows of one class and split, numbered from 0.

        Args:
            class_name: One of `classes`.
            split: train, calibration, validation or test.

        Returns:
            The rows in the manifest's order; none if the class has no pictures in this split.

        Raises:
            SprueError: The class is unknown.
        """
        if class_name not in self.classes:
            raise SprueError(f"Class {class_name!r} is not in the manifest: it holds {', '.join(self.classes)}.")
        chosen = (self.frame["class_name"] == class_name) & (self.frame["split"] == split)
        return self.frame[chosen].reset_index(drop=True)

    def write(self, path: UPath) -> None:
        """Writes Parquet; the same manifest gives the same bytes.

        Args:
            path: The file; its folder is made if missing.
        """
        about = {
            "dataset": self.dataset,
            "splits": asdict(self.splits),
            "left_out": [asdict(entry) for entry in self.left_out],
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
        """Reads what `write` wrote.

        Args:
            path: The Parquet file.

        Raises:
            SprueError: The file is missing or is no manifest.
        """
        if not path.is_file():
            raise SprueError(f"There is no manifest at {path}: run the manifest stage first.")
        try:
            parquet = fastparquet.ParquetFile(io.BytesIO(path.read_bytes()), verify=True)
            about = json.loads(parquet.key_value_metadata[_METADATA_KEY])
        except (fastparquet.util.ParquetException, OSError, KeyError, ValueError) as error:
            raise SprueError(f"{path} is no manifest: write it anew with the manifest stage.") from error
        left_out = tuple(LeftOut(**entry) for entry in about["left_out"])
        return cls(about["dataset"], SplitConfig(**about["splits"]), _typed(parquet.to_pandas()), left_out)


def build_manifest(root: UPath, dataset: str, splits: SplitConfig, alpha: float, layout: str = "mvtec") -> Manifest:
    """Reads a dataset's folders, decodes every picture once and divides the good training samples.

    Damaged pictures, files that are no pictures and training pictures that are also in the test split are left
    out and listed, and so are samples that lack a view for it. A damaged mask is left out, its sample is kept without
    ground truth.

    Args:
        root: Folder of the dataset, local or remote.
        dataset: Name recorded in the manifest.
        splits: Fractions and seed.
        alpha: The false-alarm rate wanted, which says how many calibration pictures a class needs at least.
        layout: Folder convention, a key of ``LAYOUTS``.

    Returns:
        The manifest, the same for the same files and settings.

    Raises:
        SprueError: The folders do not follow the layout, a mask has another size than its picture, or a class
            has too few pictures for its splits.
    """
    if layout not in LAYOUTS:
        raise SprueError(f"Layout {layout!r} is unknown: choose one of {', '.join(sorted(LAYOUTS))}.")
    records, left_out = LAYOUTS[layout].read(root)
    found = inspect_pictures(
        root, {path: None for record in records for path in (record.path, record.mask_path) if path}
    )
    left_out += [LeftOut(path, inspection.damage) for path, inspection in found.items() if inspection.damage]
    class_names = sorted({record.class_name for record in records})
    records = [record for record in records if not found[record.path].damage]
    _check_masks(records, found)
    records, leaked = _without_leaks(records, found)
    left_out += leaked
    records, incomplete = complete_samples(records)
    left_out += incomplete
    what = "samples" if any(record.view for record in records) else "pictures"
    assign = partial(assign_splits, config=splits, alpha=alpha, what=what)
    split_of = _split_training(records, found, class_names, left_out, assign)
    unmasked = {record.sample_id for record in records if record.mask_path and found[record.mask_path].damage}
    rows = [_row(dataset, record, found, split_of, unmasked) for record in records]
    rows.sort(key=lambda row: (row["class_name"], row["sample_id"], row["view"]))
    frame = _typed(pd.DataFrame(rows, columns=list(COLUMNS)))
    return Manifest(dataset, splits, frame, tuple(sorted(left_out)))


def _check_masks(records: list[PictureRecord], found: dict[str, Inspection]) -> None:
    problems = []
    for record in records:
        picture, mask = found[record.path], found.get(record.mask_path)
        if mask and not mask.damage and (mask.width, mask.height) != (picture.width, picture.height):
            problems.append(
                f"mask {record.mask_path} is {mask.width}x{mask.height}, "
                f"its picture {record.path} is {picture.width}x{picture.height}"
            )
    if problems:
        raise SprueError(
            f"Masks of another size than their picture: {'; '.join(problems)}. Redraw or remove these masks."
        )


def _without_leaks(
    records: list[PictureRecord], found: dict[str, Inspection]
) -> tuple[list[PictureRecord], list[LeftOut]]:
    """Takes training pictures out that are also test pictures, whatever their class."""
    tested = {found[record.path].sha256: record.path for record in reversed(records) if record.split == TEST}
    kept, leaked = [], []
    for record in records:
        twin = tested.get(found[record.path].sha256) if record.split == TRAIN else None
        if twin:
            leaked.append(LeftOut(record.path, f"identical to the test picture {twin}"))
        else:
            kept.append(record)
    return kept, leaked


def _split_training(
    records: list[PictureRecord],
    found: dict[str, Inspection],
    class_names: list[str],
    left_out: list[LeftOut],
    assign: Callable[[str, list[str]], list[str]],
) -> dict[str, str]:
    """Split of each training sample; raises one SprueError for all classes with too few."""
    views: dict[str, dict[str, list[str]]] = {name: defaultdict(list) for name in class_names}
    for record in records:
        if record.split == TRAIN:
            views[record.class_name][record.sample_id].append(found[record.path].sha256)
    split_of: dict[str, str] = {}
    problems = []
    for class_name, digests_of in views.items():
        try:
            assigned = assign(class_name, ["".join(digests) for digests in digests_of.values()])
        except SprueError as error:
            problems.append(f"{error}{_left_out_of_training(class_name, left_out)}")
        else:
            split_of.update(zip(digests_of, assigned, strict=True))
    if problems:
        raise SprueError("\n".join(problems))
    return split_of


def _left_out_of_training(class_name: str, left_out: list[LeftOut]) -> str:
    entries = [entry for entry in sorted(left_out) if entry.path.startswith(f"{class_name}/{TRAIN}/")]
    if not entries:
        return ""
    return f" Left out of its training pictures: {len(entries)}, the first {entries[0].path} ({entries[0].reason})."


def _row(
    dataset: str,
    record: PictureRecord,
    found: dict[str, Inspection],
    split_of: dict[str, str],
    unmasked: Collection[str],
) -> dict[str, Any]:
    """A picture's row; a sample in ``unmasked`` has no ground truth, as a view without mask would count as good."""
    picture = found[record.path]
    return {
        "dataset": dataset,
        "class_name": record.class_name,
        "split": TEST if record.split == TEST else split_of[record.sample_id],
        "label": int(record.defect_type != GOOD),
        "defect_type": record.defect_type,
        "sample_id": record.sample_id,
        "view": record.view,
        "path": record.path,
        "mask_path": "" if record.sample_id in unmasked else record.mask_path,
        "sha256": picture.sha256,
        "width": picture.width,
        "height": picture.height,
    }


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The one set of column types, whether built or read."""
    return frame.astype({name: "str" if name in TEXT_COLUMNS else "int64" for name in COLUMNS})
