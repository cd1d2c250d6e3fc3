"""A version's record says what made it, and an image's file which versions were made with it."""

import hashlib

import pandas as pd
import pytest

from sprue.errors import SprueError
from sprue.release.aliases import assign_alias
from sprue.tracking.lineage import Lineage, NoRecordError, describe, is_logged, uses
from sprue.tracking.provenance import provenance
from sprue.tracking.registry import find_registered, model_name, register
from sprue.tracking.runs import FitRun
from sprue.tracking.server import experiment_id
from sprue.training.record import FitRecord


def images_of(folder, *numbers):
    """Image files, and their rows as in a manifest."""
    rows = []
    for number in numbers:
        path = folder / f"{number:03}.png"
        path.write_bytes(f"image {number}".encode())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        split = "test" if number == 2 else "train"
        rows.append({"split": split, "sample_id": str(number), "view": "", "sha256": digest, "path": path.name})
    return pd.DataFrame(rows).assign(width=64)


@pytest.fixture
def registered(store, plan, tmp_path, monkeypatch):
    """Registers a class with its record; returns its run and the lineage."""
    monkeypatch.setenv("SPRUE_COMMIT", "c0ffee")

    def register_class(dataset, class_name, key, *numbers):
        spec = plan.model_copy(update={"dataset": dataset, "class_name": class_name})
        tags = provenance(spec.manifest, spec.features.fingerprint)
        run = FitRun.open(experiment_id(dataset, store), class_name, spec.key, spec.params, tags)
        facts = FitRecord(spec, 2, [{"epoch": 1, "train_nll": 1.5}], "c0ffee", 2, {}).facts
        lineage = Lineage((facts,), "d41d8.dir", images_of(tmp_path, *numbers))
        lineage.log(run.run_id, key)
        version = register(dataset, class_name, str(tmp_path), run.run_id, key, {}, "")
        assign_alias(model_name(dataset, class_name), version)
        return run, lineage

    return register_class


def test_a_record_reads_back_as_it_was(registered, plan):
    run, lineage = registered("read", "brick", "k1", 1, 2)
    assert is_logged(run.run_id, "k1") and not is_logged(run.run_id, "k2")
    read = Lineage.read(find_registered("read.brick", "champion"))
    assert (read.fits, read.dvc) == (lineage.fits, lineage.dvc)
    columns = ["split", "sample_id", "view", "sha256", "path"]
    assert read.images.to_dict("list") == lineage.images[columns].to_dict("list")
    assert read.spec["train"] == [list(sample) for sample in plan.train]


def test_two_detectors_of_one_fit_have_a_record_each(registered):
    registered("twice", "brick", "k1", 1)
    registered("twice", "brick", "k2", 1, 3)
    counts = [len(Lineage.read(find_registered("twice.brick", version)).images) for version in ("1", "2")]
    assert counts == [1, 2]


def test_a_version_is_described_in_words(registered, plan):
    run, _ = registered("words", "brick", "k1", 1, 2, 3)
    facts = describe(find_registered("words.brick", "1"))
    assert facts["version"] == "words.brick version 1 champion"
    assert facts["dataset"] == f"words, DVC d41d8.dir, manifest {'0' * 64}"
    assert facts["images"] == "2 train, 1 test"
    assert facts["features"].startswith("backbone tf_efficientnet_lite0, weights package:")
    assert facts["flow"].startswith("patchflow: channels [5], maps [0], steps 1")
    spec = plan.model_copy(update={"dataset": "words"})
    assert facts["fit"].startswith(f"{spec.key} with 2 CPU threads: epochs 3, ")
    assert facts["settings"] == "the recipe's own"
    assert facts["code"] == "commit c0ffee"
    assert "torch==" in facts["packages"] and "cores" in facts["machine"]
    assert (facts["job"], facts["cluster"]) == ("none", "none")
    assert facts["run"].startswith(run.run_id)
    assert facts["detector"] == "k1"


def test_an_image_tells_which_versions_used_it_for_what(registered, tmp_path):
    registered("one", "uses", "k1", 2, 4)
    registered("two", "uses", "k1", 2)
    registered("two", "uses", "k2", 4)
    found, without_record = uses(tmp_path / "002.png")
    ours = [use for use in found if use.model_name.endswith(".uses")]
    assert [(use.model_name, use.version, use.aliases, use.split, use.path) for use in ours] == [
        ("one.uses", 1, ("champion",), "test", "002.png"),
        ("two.uses", 1, ("champion",), "test", "002.png"),
    ]
    assert "one.uses version 1 champion" in str(ours[0]) and "test" in str(ours[0])
    assert ours[0].split == "test"
    assert not [name for name in without_record if ".uses " in name]
    (tmp_path / "other.png").write_bytes(b"unknown")
    assert uses(tmp_path / "other.png")[0] == []


def test_a_version_without_a_record_is_named(store, tmp_path):
    register("by-hand", "brick", str(tmp_path), "", "k1", {}, "")
    with pytest.raises(NoRecordError, match=r"by-hand\.brick version 1 was not registered by the pipeline"):
        Lineage.read(find_registered("by-hand.brick", "1"))
    (tmp_path / "a.png").write_bytes(b"a")
    assert "by-hand.brick version 1" in uses(tmp_path / "a.png")[1]
    assert issubclass(NoRecordError, SprueError)
