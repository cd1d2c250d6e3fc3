"""What people said about decisions: kept beside them, and exported as labelled images.

``reviews/date=<day of the decision>/<key>.<time>.json`` holds a verdict; a later one about the same decision replaces
it, and both stay. ``reviews/files/<sha256>`` holds the images and masks of reviewed samples, which are not deleted with
the decisions' own.
"""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from upath import UPath

from sprue.data.layouts import GOOD
from sprue.errors import SprueError
from sprue.formats import REVIEW
from sprue.inference.images import DAMAGE, FORMATS, open_image
from sprue.release.decision_store import Decision, DecisionStore
from sprue.store import write_bytes, write_json

DEFECTIVE = "defective"

Verdict = Literal["good", "defective", "unsure"]
ExportKind = Literal["promotion", "training"]


@dataclass(frozen=True)
class Review:
    """A verdict on a decision.

    Attributes:
        decision: The decision.
        verdict: What the sample is.
        reviewer: Name of the key; empty where the service has no keys.
        at: When, UTC.
        views: Names of the sample's images; ``("",)`` for one.
        masks: SHA-256 of each image's mask; empty where nothing is marked.
    """

    decision: Decision
    verdict: Verdict
    reviewer: str
    at: datetime
    views: tuple[str, ...]
    masks: tuple[str, ...]


@dataclass(frozen=True)
class ReviewStore:
    """The reviews in the folder or s3 URL in which decisions are kept."""

    folder: UPath

    def add(self, review: Review, masks: Sequence[bytes]) -> None:
        """Keeps a review, after the images and masks that it tells of; a mask is empty where nothing is marked.

        Raises:
            SprueError: If the decision's images were not kept or are gone.
        """
        images = DecisionStore(self.folder).read_images(review.decision)
        files = zip((*review.decision.images, *review.masks), (*images, *masks), strict=True)
        for digest, data in files:
            if digest and not self._file(digest).exists():
                write_bytes(self._file(digest), data)
        values = asdict(review) | {"decision": review.decision.as_json(), "at": review.at.isoformat()}
        name = f"{review.decision.key}.{review.at:%Y%m%dT%H%M%S%f}.json"
        write_json(self._day(review.decision.at.date()) / name, REVIEW.stamped(values))

    def reviewed(self, day: date) -> dict[str, UPath]:
        """The last review's file of each reviewed decision of a day, by the decision's key."""
        folder = self._day(day)
        return {path.name.partition(".")[0]: path for path in sorted(folder.glob("*.json"), key=lambda each: each.name)}

    def latest(self, model_name: str) -> list[Review]:
        """The last review of each sample of a class, oldest first; a sample that was scored twice counts once."""
        folder = self.folder / "reviews"
        days = [path for path in (folder.iterdir() if folder.is_dir() else ()) if path.name.startswith("date=")]
        paths = [path for day in days for path in day.glob("*.json")]
        found = sorted((read_review(path) for path in paths), key=lambda each: each.at)
        return list({each.decision.images: each for each in found if each.decision.model_name == model_name}.values())

    def read_file(self, digest: str) -> bytes:
        """An image or a mask of a review; raises SprueError if it is gone or another."""
        path = self._file(digest)
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise SprueError(f"{path} is gone or damaged: restore it, or delete the review that names it")
        return data

    def _day(self, day: date) -> UPath:
        return self.folder / "reviews" / f"date={day}"

    def _file(self, digest: str) -> UPath:
        return self.folder / "reviews" / "files" / digest


def read_review(path: UPath) -> Review:
    """Reads a review; raises SprueError if the file is none, or has another format."""
    try:
        values = REVIEW.current(json.loads(path.read_bytes()), path)
        lists = {name: tuple(values["decision"][name]) for name in ("files", "images")}
        decision = Decision(**values["decision"] | lists | {"at": datetime.fromisoformat(values["decision"]["at"])})
        tuples = {name: tuple(values[name]) for name in ("views", "masks")}
        return Review(**values | tuples | {"decision": decision, "at": datetime.fromisoformat(values["at"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SprueError(f"{path} is no review: {error}") from error


def mask_digests(masks: Sequence[bytes], images: Sequence[bytes]) -> tuple[str, ...]:
    """SHA-256 of each mask, empty where a mask is.

    Raises:
        SprueError: If a mask is no PNG of its image's size, or damaged.
    """
    found = []
    for mask, image in zip(masks, images, strict=True):
        if mask and _facts(mask) != ("png", _facts(image)[1]):
            raise SprueError("a mask is a PNG of its image's size")
        if mask:
            open_image(mask, "a mask")
        found.append(hashlib.sha256(mask).hexdigest() if mask else "")
    return tuple(found)


def export(store: ReviewStore, model_name: str, folder: Path, kind: ExportKind) -> dict[str, int]:
    """Writes a class's reviewed samples as labelled images; returns how many of each label, and how many it deleted.

    ``promotion``: ``good`` and ``defective``, as `sprue.data.labelled.read_labelled` reads them, masks in
    ``.masks/defective`` and who said what when in ``reviews.csv``; the folder has to be new. ``training``: the good
    ones alone, into the folder itself, which may be a dataset's ``<class>/train/good``; what an earlier export
    wrote there is deleted if its verdict is another now. Unsure ones are skipped.

    Raises:
        SprueError: If there is nothing to export, a file is gone, or a promotion set's folder is not empty.
    """
    labels = (GOOD, DEFECTIVE) if kind == "promotion" else (GOOD,)
    latest = store.latest(model_name)
    reviews = [each for each in latest if each.verdict in labels]
    others = () if kind == "promotion" else [each for each in latest if each.verdict not in labels]
    deleted = sum(_delete_sample(folder, _name(review)) for review in others)
    if not reviews and not deleted:
        raise SprueError(f"{model_name} has no reviewed sample to export: review some on the inspection page first")
    if kind == "promotion" and folder.is_dir() and any(folder.iterdir()):
        raise SprueError(f"{folder} is not empty: name a new folder, so that no older verdict stays in it")
    counts = dict.fromkeys(labels, 0)
    for review in reviews:
        target = folder / review.verdict if kind == "promotion" else folder
        _write_sample(store, review, target / _name(review))
        if kind == "promotion":
            _write_masks(store, review, folder / ".masks" / review.verdict)
        counts[review.verdict] += 1
    if deleted:
        counts["deleted"] = deleted
    if kind == "promotion":
        _write_table(reviews, folder / "reviews.csv")
    return counts


def _name(review: Review) -> str:
    """A sample's name: of its images' digests, so that it is the same in each export."""
    return "review-" + hashlib.sha256("".join(review.decision.images).encode()).hexdigest()[:16]


def _write_sample(store: ReviewStore, review: Review, path: Path) -> None:
    """An image under the sample's name, or a folder with one for each view."""
    for view, digest in zip(review.views, review.decision.images, strict=True):
        data = store.read_file(digest)
        name = f"{path.name}/{view}" if len(review.views) > 1 else path.name
        write_bytes(UPath(path.parent / f"{name}.{_facts(data)[0]}"), data)


def _delete_sample(folder: Path, name: str) -> bool:
    """Deletes what `_write_sample` wrote under a name, and says whether there was anything."""
    found = [folder / name] if (folder / name).is_dir() else list(folder.glob(f"{name}.*"))
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return bool(found)


def _write_masks(store: ReviewStore, review: Review, folder: Path) -> None:
    for view, digest in zip(review.views, review.masks, strict=True):
        if digest:
            name = f"{_name(review)}/{view}" if len(review.views) > 1 else _name(review)
            write_bytes(UPath(folder / f"{name}_mask.png"), store.read_file(digest))


def _write_table(reviews: Sequence[Review], path: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("sample", "verdict", "reviewer", "at", "request_id", "station", "version", "p_value"))
    for each in reviews:
        decision = each.decision
        facts: tuple[Any, ...] = (decision.request_id, decision.station, decision.version, decision.p_value)
        table.writerow((_name(each), each.verdict, each.reviewer, each.at.isoformat(), *facts))
    write_bytes(UPath(path), text.getvalue().encode())


def _facts(image: bytes) -> tuple[str, tuple[int, int]]:
    """Format and size, from the header alone."""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            return (opened.format or "").lower(), opened.size
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise SprueError("it is no image") from error
