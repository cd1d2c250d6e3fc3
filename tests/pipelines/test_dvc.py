"""The pipeline under DVC, as a user drives it: what runs again, what does not, and versions that come and go."""

import json
import re
import shutil
import signal
from dataclasses import replace
from urllib.parse import parse_qs

import mlflow
import pytest
import yaml
from click.testing import CliRunner

from sprue.cli import main

STAGES = ["manifest", "features", "search", "fit", "evaluate", "register"]


def ran(output, dataset="tiny"):
    """Stages of a dataset that ``dvc repro`` ran, in their order."""
    found = [line.split("'")[1].split("@") for line in output.splitlines() if line.startswith("Running stage '")]
    return [stage for stage, of_dataset in found if of_dataset == dataset]


@pytest.fixture(scope="module")
def first_version(checkout, ray_head, tmp_path_factory):
    """A checkout whose images are under DVC and whose stages have run once; what ``dvc repro`` said."""
    version = checkout.copy(tmp_path_factory.mktemp("first") / "checkout")
    version = replace(version, environment={**version.environment, "RAY_ADDRESS": ray_head.address})
    version.dvc("add", "data/tiny")
    said = version.dvc("repro")
    version.commit("The first version")
    return version, said


@pytest.fixture
def version(first_version, tmp_path):
    """A copy of the first version for one test to change."""
    return first_version[0].copy(tmp_path / "checkout")


def champions(folder):
    """Versions of the registry's champions by model."""
    uri = f"sqlite:///{folder}/store/mlflow/mlflow.db"
    models = mlflow.MlflowClient(uri, uri).search_registered_models()
    return {model.name: int(model.aliases["champion"]) for model in models}


def test_repro_runs_every_stage(first_version):
    version, said = first_version
    assert ran(said) == STAGES
    assert "76 extracted, 0 were stored already" in said
    assert champions(version.folder) == {"tiny.brick": 1, "tiny.grass": 1}
    fit = json.loads((version.folder / "store/tiny/fits/brick/fit.json").read_text())
    assert fit["commit"] == version.git("rev-parse", "HEAD~")


def test_a_version_says_what_it_is_and_shows_what_was_found(first_version):
    version, _ = first_version
    uri = f"sqlite:///{version.folder}/store/mlflow/mlflow.db"
    client = mlflow.MlflowClient(uri, uri)
    found = client.get_model_version_by_alias("tiny.brick", "champion")
    assert "patchflow against the Gaussian of the same features: it " in found.description
    assert "patchflow fitted on" in found.description and "anomalous, on average over calibrations" in found.description
    (query,) = re.findall(r"!\[.+\]\(get-artifact\?(\S+)\)", found.description)
    asked = parse_qs(query)
    assert asked["run_uuid"] == [found.run_id]
    folder, _, name = asked["path"][0].rpartition("/")
    assert folder == f"overview/{found.tags['sprue.detector']}" and name == "heatmaps.png"
    assert asked["path"][0] in [file.path for file in client.list_artifacts(found.run_id, folder)]


def test_metrics_have_a_row_for_each_class(first_version):
    version, _ = first_version
    header, *rows = version.dvc("metrics", "show").splitlines()
    assert "sample_auroc" in header
    assert [row.split()[0].split("/")[-1] for row in rows] == ["brick.json", "grass.json"]
    metrics = json.loads(version.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert {path.split("/")[-1] for path in metrics} == {"brick.json", "grass.json"}
    for found in metrics.values():
        assert found["data"]["test_good"] == found["data"]["test_defective"] == 4
        assert 0.5 < found["data"]["sample_auroc"] <= 1


def test_another_alpha_changes_the_evaluation_alone_and_builds_no_backbone(version):
    before = version.digests("store/tiny/features", "store/tiny/fits")
    manifest = (version.folder / "store/tiny/manifest.parquet").read_bytes()
    version.set_params({"calibration": {"alpha": 0.25}})
    said = version.dvc("repro", PYTHONPROFILEIMPORTTIME="1")
    assert ran(said) == ["manifest", "evaluate", "register"]
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", said, re.MULTILINE))
    assert "torch" in imported and "timm" not in imported
    assert said.count("version 2 is challenger") == 2
    assert (version.folder / "store/tiny/manifest.parquet").read_bytes() == manifest
    assert version.digests("store/tiny/features", "store/tiny/fits") == before
    assert json.loads((version.folder / "store/tiny/metrics/brick.json").read_text())["alpha"] == 0.25


def test_another_score_keeps_the_fits_and_changes_the_evaluation(version):
    fits, before = version.digests("store/tiny/fits"), version.digests("store/tiny/metrics")
    version.set_params({"scoring": {"top": 0.5}})
    said = version.dvc("repro")
    assert ran(said) == ["search", "fit", "evaluate", "register"]
    assert "0 of 2 classes are to be fitted" in said
    assert version.digests("store/tiny/fits") == fits
    assert version.digests("store/tiny/metrics") != before
    assert said.count("version 2 is challenger") == 2
    uri = f"sqlite:///{version.folder}/store/mlflow/mlflow.db"
    versions = mlflow.MlflowClient(uri, uri).search_model_versions("name = 'tiny.brick'")
    assert len({each.run_id for each in versions}) == 1  # one run for one fit


def test_a_replaced_registry_is_noticed(version):
    shutil.rmtree(version.folder / "store/mlflow")
    said = version.dvc("repro")
    assert ran(said) == ["register"]
    assert said.count("version 1 is champion") == 2
    assert champions(version.folder) == {"tiny.brick": 1, "tiny.grass": 1}


def test_a_second_clone_computes_nothing_again(version, object_store, bucket, tmp_path):
    version.dvc("remote", "add", "--default", "plant", f"s3://{bucket}/dvc")
    version.commit("Where the data is kept")
    version.dvc("push", **object_store)
    clone = version.clone(tmp_path / "clone")
    assert not (clone.folder / "data/tiny").exists()
    clone.dvc("pull", **object_store)
    for folder in ("data/tiny", "store/tiny/features", "store/tiny/fits"):
        assert clone.digests(folder) == version.digests(folder) != {}
    assert ran(clone.dvc("repro", "--dry")) == ["register"]
    assert clone.git("status", "--porcelain") == ""


def test_new_images_make_a_version_and_the_old_one_comes_back(version, add_images):
    watched = ("data/tiny", "store/tiny/features", "store/tiny/fits")
    before, manifest = version.digests(*watched), (version.folder / "store/tiny/manifest.parquet").read_bytes()
    lock = (version.folder / "dvc.lock").read_bytes()
    add_images(version.folder / "data/tiny/brick/train/good", "brick", 3)
    version.dvc("add", "data/tiny")
    said = version.dvc("repro", "features@tiny")
    assert ran(said) == ["manifest", "features"]
    assert "3 extracted, 76 were stored already" in said
    after = version.digests("store/tiny/features")
    old = {name: content for name, content in before.items() if name.startswith("store/tiny/features/")}
    assert old.items() < after.items()
    version.commit("Three more")
    version.git("checkout", "--quiet", "HEAD~")
    version.dvc("checkout")
    assert version.digests(*watched) == before
    assert (version.folder / "store/tiny/manifest.parquet").read_bytes() == manifest
    said = version.dvc("repro")
    # A second run of the same version only asks the registry.
    assert ran(said) == ["register"]
    assert said.count("version 1 was registered already") == 2
    assert (version.folder / "dvc.lock").read_bytes() == lock
    assert version.git("status", "--porcelain") == ""


@pytest.fixture
def sprue(version, monkeypatch):
    """The command ``sprue`` in the version's folder, in this process: what it printed."""
    monkeypatch.chdir(version.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*arguments, status=0):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == status, done.output
        return done.output

    yield run
    signal.signal(signal.SIGINT, signal.default_int_handler)  # stages have their own
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


def test_more_epochs_fit_again_and_the_challenger_is_promoted_with_a_known_lineage(version, unseen_bricks, sprue):
    version.set_params({"fit": {"epochs": 3}})
    # A dry run takes the plan to be unchanged, and register runs always.
    assert ran(version.dvc("repro", "--dry")) == ["search", "register"]
    sprue("stage", "search")
    said = sprue("stage", "evaluate", status=1)
    assert "class brick: " in said
    assert "is of another plan; run the fit stage again" in said
    assert ran(version.dvc("repro", "--dry")) == ["search", "fit", "evaluate", "register"]
    said = version.dvc("repro")
    assert "version 2 is challenger" in said
    assert "sprue promote tiny.brick --images FOLDER" in said
    assert champions(version.folder) == {"tiny.brick": 1, "tiny.grass": 1}

    seen = unseen_bricks / "good" / "seen.png"
    shutil.copy(version.folder / "data/tiny/brick/train/good/000.png", seen)
    assert "seen.png is a " in sprue("promote", "brick", "--images", str(unseen_bricks), status=1)
    seen.unlink()
    assert "version 2 is not promoted: it takes" in sprue(
        "promote", "brick", "--images", str(unseen_bricks), "--margin", "1", "--latency", "0.001", status=1
    )
    assert champions(version.folder)["tiny.brick"] == 1
    said = sprue("promote", "brick", "--images", str(unseen_bricks), "--margin", "0.5", "--latency", "60000")
    assert "24 good and 24 defective samples" in said
    assert "version 2 is champion" in said
    assert champions(version.folder) == {"tiny.brick": 2, "tiny.grass": 1}

    tracked = yaml.safe_load((version.folder / "data/tiny.dvc").read_text())["outs"][0]["md5"]
    lineage = sprue("lineage", "brick")
    assert f"DVC {tracked}" in lineage
    assert f"commit {version.git('rev-parse', 'HEAD')}" in lineage
    assert "torch==" in lineage and "epochs 3" in lineage
    uses = sprue("lineage", "--image", str(version.folder / "data/tiny/brick/train/good/000.png")).splitlines()
    assert [line.split()[:3] for line in uses] == [["tiny.brick", "version", "1"], ["tiny.brick", "version", "2"]]
    assert "the weights are equal, bit for bit" in sprue("reproduce", "brick")

    assert "version 1 is champion again" in sprue("rollback", "brick", "--reason", "the line stands still")
    assert champions(version.folder)["tiny.brick"] == 1
    entries = [line for line in sprue("audit", "brick").splitlines() if line]
    kinds = ["first", "refused", "promoted", "rolled back"]
    assert len(entries) == len(kinds) and all(f" {kind} " in line for kind, line in zip(kinds, entries, strict=True))
    assert "the line stands still" in entries[-1]
    assert [entry["kind"] for entry in json.loads(sprue("audit", "tiny.brick", "--json"))] == kinds
    assert "there is no champion before version 1" in sprue("rollback", "brick", "--reason", "again", status=1)
    assert "tiny.brick has no version '9'" in sprue("lineage", "brick", "--version", "9", status=1)
    images = [str(path) for path in sorted((unseen_bricks / "spot").iterdir())[:2]]
    (row, _) = json.loads(sprue("score", *images, "--class", "brick", "--json"))
    assert row["model"] == "tiny.brick" and row["version"] == 1 and row["score"] > 0
