"""The manifest: a row for each usable image; and the skipped files and the refused classes, with the reasons."""

import io
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Self

import fastparquet
import pandas as pd
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.folds import fold_of, validates
from sprue.data.layouts import SkippedFile
from sprue.data.samples import Sample, samples_of
from sprue.data.splits import CALIBRATION, TEST, TRAIN, VALIDATION, lowest_alpha
from sprue.errors import SprueError
from sprue.formats import MANIFEST
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
            calibration, validation or test; with cross-conformal calibration, instead of the first three, fold-1,
            fold-1-validation, fold-2 ..., see `sprue.data.folds`; ``label`` 0 (good) or 1 (defective) of the sample,
            ``defect_type`` "good" or the defect's name, ``view`` empty for samples of one image, ``path`` and
            ``mask_path`` (empty if there is none) relative to the root, ``width`` and ``height`` in stored pixels.
            All samples of a class have the same views.
        skipped: Skipped files and samples, sorted by path.
        refused: The classes that have no rows because nothing can be trained on them: what each needs.
    """

    dataset: str
    settings: ManifestSettings
    frame: pd.DataFrame
    skipped: tuple[SkippedFile, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _rows(self) -> dict[str, pd.DataFrame]:
        """The rows of each class: found once, for a search through all rows for each class takes quadratic time."""
        return {str(name): rows for name, rows in self.frame.groupby("class_name")}

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(self._rows)

    def rows(self, class_name: str) -> pd.DataFrame:
        """All rows of a class, in the manifest's order and with its numbers.

        Raises:
            SprueError: If the class is unknown.
        """
        if class_name not in self._rows:
            raise SprueError(f"class {class_name!r} is not in the manifest, which holds {', '.join(self.classes)}")
        return self._rows[class_name]

    def of_class(self, class_name: str) -> Self:
        """The manifest of one class alone, to be sent to another process.

        Raises:
            SprueError: If the class is unknown.
        """
        return type(self)(self.dataset, self.settings, self.rows(class_name))

    def select(self, class_name: str, split: str) -> pd.DataFrame:
        """Rows of one class and split in the manifest's order, numbered from 0; there may be none.

        Raises:
            SprueError: If the class is unknown.
        """
        rows = self.rows(class_name)
        return rows[rows["split"] == split].reset_index(drop=True)

    def folds(self, class_name: str) -> list[pd.DataFrame]:
        """The rows of each fold of a class, in order; none where a calibration set is held out.

        Raises:
            SprueError: If the class is unknown.
        """
        rows = self.rows(class_name)
        return [of_fold.reset_index(drop=True) for _, of_fold in rows.groupby(rows["split"].map(fold_of))]

    def fit_rows(self, class_name: str, fold: int | None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The rows that train a fit of a class, and those that validate it.

        `fold` is what the fit leaves out, for it calibrates the flow; None where a calibration set is held out.
        """
        if fold is None:
            return self.select(class_name, TRAIN), self.select(class_name, VALIDATION)
        folds = self.folds(class_name)
        others = pd.concat([of_fold for index, of_fold in enumerate(folds, 1) if index != fold], ignore_index=True)
        chosen = others["split"].map(lambda split: validates(split, fold, len(folds)))
        return others[~chosen].reset_index(drop=True), others[chosen].reset_index(drop=True)

    def calibration_rows(self, class_name: str) -> pd.DataFrame:
        """The rows that calibrate a class: of its calibration split, or of all folds in turn; none are copies.

        Raises:
            SprueError: If the class is unknown.
        """
        folds = self.folds(class_name)
        return pd.concat(folds, ignore_index=True) if folds else self.select(class_name, CALIBRATION)

    def rows_of(self, class_name: str, samples: Collection[Sample]) -> pd.DataFrame:
        """The rows of some samples of a class, in the manifest's order."""
        rows = self.rows(class_name)
        rows = rows[rows["split"] != TEST]
        wanted = set(samples)
        chosen = rows.groupby("sample_id", sort=False)["sha256"].transform(lambda digests: tuple(digests) in wanted)
        return rows[chosen.astype(bool)].reset_index(drop=True)

    def calibration(self, class_name: str, settings: CalibrationSettings) -> CalibrationSettings:
        """A class's settings: where its calibration samples are few, ``alpha`` is the lowest that they can promise."""
        alpha = lowest_alpha(settings, len(samples_of(self.calibration_rows(class_name))))
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
            custom_metadata={_METADATA_KEY: json.dumps(MANIFEST.stamped(about), sort_keys=True)},
            open_with=lambda *_: parquet,
        )
        write_bytes(path, parquet.getvalue())

    @classmethod
    def read(cls, path: UPath) -> Self:
        """Reads a file of `write`.

        Raises:
            SprueError: If it is missing, no manifest, or of another format.
        """
        if not path.is_file():
            raise SprueError(f"there is no manifest at {path}; run the manifest stage first")
        try:
            parquet = fastparquet.ParquetFile(io.BytesIO(path.read_bytes()), verify=True)
            about = MANIFEST.current(json.loads(parquet.key_value_metadata[_METADATA_KEY]), path)
        except (fastparquet.util.ParquetException, OSError, KeyError, ValueError) as error:
            raise SprueError(f"{path} is no manifest; run the manifest stage again") from error
        skipped = tuple(SkippedFile(**entry) for entry in about["skipped"])
        settings = ManifestSettings(**about["settings"])
        return cls(about["dataset"], settings, typed(parquet.to_pandas()), skipped, about["refused"])


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Casts the columns, so that built and read manifests are equal."""
    return frame.astype({name: "str" if name in TEXT_COLUMNS else "int64" for name in COLUMNS})
