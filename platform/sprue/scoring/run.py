"""Scores all samples of a folder that have no row yet, and writes their rows in parts.

The output's folder belongs to one class and one folder of images. Below it, ``version-<number>/scores/`` holds parts
(see `sprue.scoring.parts`), ``version-<number>/heatmaps/`` a PNG for each sample if asked, and
``version-<number>/summary.json`` appears when all samples have a row.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from upath import UPath

from sprue.data.layouts import SkippedFile
from sprue.errors import SprueError
from sprue.features.extraction import PROGRESS_SECONDS
from sprue.inference.detector import Detector
from sprue.scoring.drawing import heatmap_path
from sprue.scoring.parts import Part, PartSummary, divide, read_names, stored_parts, summaries, write_part
from sprue.scoring.pipeline import score_parts
from sprue.scoring.rows import Row, Rows, as_table
from sprue.scoring.samples import list_samples
from sprue.store import read_json, write_json
from sprue.tracking.registry import RegisteredDetector, load_detector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What is known of all samples of a folder.

    Attributes:
        model: The registered model's name.
        version: Its version.
        detector: Digest of its files.
        source: The folder of the images.
        scores: The folder of the parts.
        samples: Number of samples.
        stored: How many of them had a row before.
        anomalous: How many are anomalous.
        errors: Why samples could not be scored, by their names.
        skipped: Files that are no samples, and why.
        images_per_second: Images of this run a second, with its start-up; None if there was nothing to do.
    """

    model: str
    version: int
    detector: str
    source: str
    scores: str
    samples: int
    stored: int
    anomalous: int
    errors: dict[str, str]
    skipped: list[SkippedFile]
    images_per_second: float | None

    def __str__(self) -> str:
        """One line."""
        rate = "" if self.images_per_second is None else f", {self.images_per_second:.1f} images/s"
        return (
            f"{self.model} version {self.version}: {self.samples} samples ({self.stored} stored before), "
            f"{self.samples - len(self.errors)} scored, {self.anomalous} anomalous, {len(self.errors)} unreadable"
            f"{rate}; {self.scores}"
        )


def score_folder(registered: RegisteredDetector, root: UPath, output: UPath, heatmaps: bool = False) -> Summary:
    """Scores all samples below a folder that have no row yet, on the cluster that Ray is connected to.

    Every node must be able to read the images and the registry. Afterwards there is a row for each sample that the
    folder holds, and for no other. Logs the number of images about every ten seconds.

    Args:
        registered: The version that scores.
        root: The folder of the images, local or remote.
        output: The folder of the scores, likewise.
        heatmaps: Whether heat maps are drawn.

    Raises:
        SprueError: If the folder holds no samples, the output belongs to other images or another class or is among the
            images, or the detector can't be loaded.
    """
    detector, digest = load_detector(registered), registered.digest
    samples, skipped = list_samples(root, detector.views)
    _claim(output, root, registered)
    folder = output / f"version-{registered.version}"
    scores, parts = folder / "scores", divide(samples, digest)
    # Parts that another run writes meanwhile, of files that have come since, are not this run's to delete.
    before_run = stored_parts(scores)
    stored = summaries([scores / part.name for part in parts], heatmaps)
    missing = [part for part in parts if part.name not in stored]
    before = sum(each.samples for each in stored.values())
    logger.info("%s: %d samples, %d stored, %d to score", registered, len(samples), before, len(samples) - before)
    if skipped:
        logger.info("%d files are skipped, such as %s: %s", len(skipped), skipped[0].path, skipped[0].reason)
    rate = None
    if missing:
        (folder / "summary.json").unlink(missing_ok=True)
        written, rate = _Run(registered, detector, digest, root, folder, heatmaps).score(missing)
        stored |= written
    _remove_others(folder, parts, before_run, drawn={part.name for part in missing} if heatmaps else set())
    found = [stored[part.name] for part in parts]
    summary = Summary(
        model=registered.model_name,
        version=registered.version,
        detector=digest,
        source=str(root),
        scores=str(scores),
        samples=len(samples),
        stored=before,
        anomalous=sum(each.anomalous for each in found),
        errors={name: error for each in found for name, error in each.errors.items()},
        skipped=skipped,
        images_per_second=rate,
    )
    write_json(folder / "summary.json", asdict(summary))
    return summary


def _claim(output: UPath, root: UPath, registered: RegisteredDetector) -> None:
    """Writes what an output's folder is for, unless it says so already."""
    if f"{output}/".startswith(f"{str(root).rstrip('/')}/"):
        raise SprueError(f"the output {output} is among the images; give a folder outside of {root}")
    path, owner = output / "source.json", {"source": str(root), "model": registered.model_name}
    if not path.is_file():
        write_json(path, owner)
    elif (found := read_json(path, made_by="score")) != owner:
        raise SprueError(
            f"{output} has the scores that {found.get('model')} gave the images in {found.get('source')}; "
            "give another output"
        )


def _remove_others(folder: UPath, parts: Sequence[Part], before_run: Sequence[UPath], drawn: Collection[str]) -> None:
    """Deletes old parts whose samples are gone or have changed, and their heat maps.

    Of the samples of the parts named in `drawn`, there are new heat maps.
    """
    current = {part.name for part in parts}
    redrawn = {sample.name for part in parts if part.name in drawn for sample in part.samples}
    old = [path for path in before_run if path.name not in current]
    for path in old:
        for name in read_names(path):
            if name not in redrawn:
                (folder / heatmap_path(name)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if old:
        logger.info("%d parts are deleted: their images have changed or are gone", len(old))


@dataclass(frozen=True)
class _Run:
    """What it takes to score parts."""

    registered: RegisteredDetector
    detector: Detector
    digest: str
    root: UPath
    folder: UPath
    heatmaps: bool

    def score(self, parts: Sequence[Part]) -> tuple[dict[str, PartSummary], float]:
        """Scores parts, and writes each when it is complete; their summaries, and images a second."""
        rows = Rows(self.registered, self.digest, self.detector.views, self.detector.calibration)
        scored = score_parts(self.registered, self.detector, self.root, parts, self.folder if self.heatmaps else None)
        of_part: dict[str, dict[str, Row]] = defaultdict(dict)
        waiting, written = {part.name: part for part in parts}, {}
        views, unstable = len(self.detector.views), set()
        total, done, started = views * sum(len(part.samples) for part in parts), 0, time.perf_counter()
        logged = started
        for record, figures in scored:
            name, row = record["part"], rows.row(record, figures)
            of_part[name][row["sample"]] = row
            if not record["final"]:
                unstable.add(name)
            if len(of_part[name]) == len(waiting[name].samples):
                written[name] = self._write(waiting.pop(name), of_part.pop(name), name not in unstable)
            done, now = done + views, time.perf_counter()
            if now - logged >= PROGRESS_SECONDS or done == total:
                logger.info("%d of %d images, %.1f images/s", done, total, done / (now - started))
                logged = now
        return written, total / (time.perf_counter() - started)

    def _write(self, part: Part, rows: dict[str, Row], final: bool) -> PartSummary:
        table = as_table([rows[sample.name] for sample in part.samples])
        failed = table[table["error"] != ""]
        errors = dict(zip(failed["sample"], failed["error"], strict=True))
        summary = PartSummary(len(table), int(table["is_anomalous"].sum()), errors, self.heatmaps, final)
        write_part(self.folder / "scores" / part.name, table, summary)
        return summary
