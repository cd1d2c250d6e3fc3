"""What is calibrated, saved and served is one object with one answer.

Shapes: B pictures, S side of the input, C channels, H rows, W columns.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from skimage import data
from upath import UPath

from defectflow import build_flow
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.backbone import load_backbone, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import BATCH, Detector, Scoring, score_features
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input
from sprue.inference.spec import FeatureSpec

SIDE = 96


def crops(count, seed):
    """Pictures of a photograph, all of different sizes."""
    rng = np.random.default_rng(seed)
    texture = data.brick()
    return [
        Image.fromarray(texture[top : top + height, left : left + width]).convert("RGB")
        for top, left, height, width in zip(
            *rng.integers(0, 300, (2, count)), *rng.integers(80, 200, (2, count)), strict=True
        )
    ]


@pytest.fixture(scope="module")
def engine():
    return build_engine(resolve(FeatureSpec(input_size=SIDE, blocks=(2, 3), scales=(1.0, 0.5))))


@pytest.fixture(scope="module", params=["latent", "likelihood"])
def detector(request, engine):
    """A detector with random couplings, calibrated on 30 crops."""
    spec = resolve(FeatureSpec(input_size=SIDE, blocks=(2, 3), scales=(1.0, 0.5)))
    maps = engine(np.stack([model_input(image, SIDE) for image in crops(40, seed=0)]))
    torch.manual_seed(0)
    flow = build_flow("patchflow", channels=[each.shape[1] for each in maps], adapted=64, bottleneck=8, steps=2)
    flow.fit_adaptor([[torch.from_numpy(each[:10]).float() for each in maps]])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scoring = Scoring(request.param, top=0.05)
    scores, _, evidence = score_features(flow.eval(), scoring, [each[10:] for each in maps])
    return Detector("brick", spec, "patchflow", flow, scoring, Calibration.fit(scores, evidence, alpha=0.05))


def assert_same(one, other):
    for name in ("score_B", "p_value_B", "is_anomalous_B", "picture_score_BV", "evidence_BVHW"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_a_saved_detector_predicts_the_same_to_the_bit(detector, engine, tmp_path):
    images = crops(BATCH + 3, seed=1)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector")
    own_engine = loaded.build_engine()
    assert_same(loaded.predict(images, own_engine), detector.predict(images, engine))
    assert loaded.spec.fingerprint == detector.spec.fingerprint
    assert (loaded.class_name, loaded.flow_name, loaded.scoring) == ("brick", "patchflow", detector.scoring)
    assert loaded.calibration == detector.calibration
    loaded.save(tmp_path / "again")
    for file in (tmp_path / "detector").iterdir():
        if file.name != "detector.json":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_saved_detector_keeps_the_colours_that_its_weights_expect(detector, tmp_path):
    """Weights from the hub may expect others than those that timm has for the backbone's name alone."""
    colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert load_backbone(detector.spec).mean[0] == 0.5
    replace(detector, spec=replace(detector.spec, **colours)).save(tmp_path)
    loaded = Detector.load(tmp_path).spec
    assert load_backbone(loaded).mean.flatten().tolist() == pytest.approx(colours["mean"])
    assert load_backbone(loaded).std.flatten().tolist() == pytest.approx(colours["std"])
    assert loaded.fingerprint != detector.spec.fingerprint
    assert resolve(loaded) == loaded


def test_a_detector_moves_with_its_folder_and_is_not_executable(detector, engine, tmp_path):
    detector.save(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert {file.name for file in (tmp_path / "there").iterdir()} == {
        "detector.json",
        "flow.safetensors",
        "backbone.safetensors",
    }
    moved = Detector.load(tmp_path / "there")
    images = crops(2, seed=2)
    assert_same(
        moved.predict(images, moved.build_engine("torch")),
        detector.predict(images, build_engine(detector.spec, "torch")),
    )


def test_pictures_and_their_stored_features_give_the_same_predictions(detector, engine, tmp_path):
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
    assert predictions.evidence_BVHW.shape == (5, 1, SIDE // 8, SIDE // 8)
    count = round(0.05 * (SIDE // 8) ** 2)
    top_B = np.sort(predictions.evidence_BVHW.reshape(5, -1), axis=1)[:, -count:].mean(1)
    np.testing.assert_allclose(predictions.score_B, top_B, rtol=1e-5)
    assert np.array_equal(predictions.is_anomalous_B, predictions.score_B > np.float32(detector.calibration.threshold))
    map_HW = predictions.anomaly_map(2, images[2].size[::-1])
    assert map_HW.shape == images[2].size[::-1]
    assert map_HW.max() <= predictions.evidence_BVHW[2].max()


def test_a_picture_with_a_hole_is_anomalous_and_the_map_shows_where(detector, engine):
    (image,) = crops(1, seed=5)
    defective = image.resize((160, 160))
    defective.paste((255, 0, 255), (100, 20, 140, 60))
    predictions = detector.predict([image, defective], engine)
    assert predictions.is_anomalous_B[1]
    assert predictions.score_B[1] > predictions.score_B[0]
    row, column = divmod(int(predictions.anomaly_map(1, (160, 160)).argmax()), 160)
    assert 0 <= row <= 80
    assert 80 <= column <= 160


def test_a_detector_of_an_earlier_release_scores_alike_and_marks_nothing(detector, tmp_path):
    detector.save(tmp_path)
    facts = json.loads((tmp_path / "detector.json").read_text())
    del facts["calibration"]["pixel_threshold"]
    (tmp_path / "detector.json").write_text(json.dumps(facts | {"format": 3}))
    earlier = Detector.load(tmp_path).calibration
    assert earlier.scores == detector.calibration.scores and earlier.pixel_threshold is None
    assert not earlier.marked(np.array([[1e30]], np.float32)).any()


def test_a_dnfad_of_an_earlier_release_is_the_flow_that_was_fitted(detector, tmp_path):
    settings = {"channels": (6,), "steps": 1, "position_channels": 4}
    flow = build_flow("dnfad", **settings, rectified=("local", "global"), upsampling=1).eval()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    replace(detector, flow_name="dnfad", flow=flow).save(tmp_path)
    facts = json.loads((tmp_path / "detector.json").read_text())
    for name in ("rectified", "upsampling"):
        del facts["flow"]["config"][name]
    (tmp_path / "detector.json").write_text(json.dumps(facts | {"format": 4}))
    maps = [np.random.default_rng(0).normal(size=(3, 6, 5, 5)).astype(np.float16)]
    found, expected = (score_features(each, Scoring(), maps)[0] for each in (Detector.load(tmp_path).flow, flow))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "detector.json").unlink(), "is not a saved detector"),
        (lambda folder: (folder / "flow.safetensors").unlink(), "is not a saved detector"),
        (lambda folder: (folder / "flow.safetensors").write_bytes(b"x" * 20), "is not a saved detector"),
        (lambda folder: (folder / "detector.json").write_text("{"), "is not a saved detector"),
        (
            lambda folder: (folder / "detector.json").write_text('{"format": 7}'),
            "has format 7, this version of sprue reads 3, 4, 5",
        ),
    ],
)
def test_a_damaged_folder_is_refused(detector, tmp_path, damage, match):
    detector.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(SprueError, match=match):
        Detector.load(tmp_path)


def test_other_backbone_weights_than_the_detectors_are_refused(detector, tmp_path):
    detector.save(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "backbone.safetensors")
    state["conv_stem.weight"] *= 1.001
    safetensors.torch.save_file(state, tmp_path / "backbone.safetensors")
    with pytest.raises(SprueError, match="these are other weights"):
        Detector.load(tmp_path).build_engine("torch")


def test_the_files_say_what_the_detector_is(detector, tmp_path):
    detector.save(tmp_path)
    facts = json.loads((tmp_path / "detector.json").read_text())
    assert facts["class_name"] == "brick"
    assert facts["flow"]["config"]["adapted"] == 64
    assert facts["scoring"] == {"evidence": detector.scoring.evidence, "top": 0.05}
    assert len(facts["calibration"]["scores"]) == 30


@pytest.mark.parametrize(
    ("setting", "match"),
    [({"evidence": "norm"}, "'norm' is neither"), ({"top": 0.0}, "top: 0.0 is not"), ({"top": 1.5}, "top: 1.5 is not")],
)
def test_scoring_settings_are_checked(setting, match):
    with pytest.raises(SprueError, match=match):
        Scoring(**setting)


VIEWS = ("0-top", "1-left", "2-right")


def seen_by_three(count, seed):
    """Samples of three pictures of different sizes; the second shows a part of the first, the third another crop."""
    return [
        [image, image.crop((5, 5, image.width - 9, image.height - 4)), other]
        for image, other in zip(crops(count, seed), crops(count, seed + 100), strict=True)
    ]


@pytest.fixture(scope="module")
def multi_view(engine):
    """A detector of three views with random couplings that tell each other, calibrated on 19 samples."""
    spec = resolve(FeatureSpec(input_size=SIDE, blocks=(2, 3), scales=(1.0, 0.5)))
    pictures = [image for sample in seen_by_three(29, seed=0) for image in sample]
    maps = engine(np.stack([model_input(image, SIDE) for image in pictures]))
    by_view = [each[view::3] for view in range(3) for each in maps]
    torch.manual_seed(0)
    flow = build_flow("multiflow", channels=[each.shape[1] for each in maps], views=3, hidden=8, steps=2)
    flow.fit_adaptor([[torch.from_numpy(each[:10]).float() for each in by_view]])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scores, _, evidence = score_features(flow.eval(), Scoring(top=0.05), [each[10:] for each in by_view])
    calibration = Calibration.fit(scores, evidence, alpha=0.05)
    return Detector("brick", spec, "multiflow", flow, Scoring(top=0.05), calibration, VIEWS)


def test_a_detector_of_views_is_saved_and_reads_samples_as_it_reads_stored_features(multi_view, engine, tmp_path):
    samples = seen_by_three(7, seed=1)  # 21 pictures: more than a batch
    multi_view.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector")
    assert loaded.views == VIEWS
    expected = multi_view.predict(samples, engine)
    assert_same(loaded.predict(samples, loaded.build_engine()), expected)

    names = [[f"{3 * sample + view:064x}" for view in range(3)] for sample in range(7)]
    inputs_NSS3 = np.stack([model_input(image, SIDE) for sample in samples for image in sample])
    for start in (0, 15):
        part = slice(start, start + 15 if not start else None)
        write_part(UPath(tmp_path), np.ravel(names)[part].tolist(), engine(inputs_NSS3[part]))
    stored = FeatureTable(UPath(tmp_path)).read_samples(names, 3)
    # Other batches round otherwise.
    from_features = multi_view.predict_features(stored)
    np.testing.assert_allclose(from_features.evidence_BVHW, expected.evidence_BVHW, rtol=1e-4)

    assert expected.evidence_BVHW.shape[:2] == expected.picture_score_BV.shape == (7, 3)
    np.testing.assert_array_equal(expected.score_B, expected.picture_score_BV.max(1))
    last = expected[6:7]
    alone = multi_view.predict(samples[6:], engine)
    np.testing.assert_allclose(last.picture_score_BV, alone.picture_score_BV, rtol=1e-4)
    for view, image in enumerate(samples[6]):
        map_HW = last.anomaly_map(0, image.size[::-1], view)
        assert map_HW.shape == image.size[::-1]
        assert map_HW.max() <= last.evidence_BVHW[0, view].max()


def test_a_view_is_judged_with_the_others_and_in_its_place(multi_view, engine):
    (top, left, right), (other, *_) = seen_by_three(2, seed=2)
    scores = multi_view.predict([[top, left, right], [top, left, other], [left, top, right]], engine).picture_score_BV
    # Another picture at the right changes what is thought of all views, and so do changed places.
    assert (scores[0] != scores[1]).all()
    assert (scores[0] != scores[2]).all()


def test_a_sample_of_another_number_of_pictures_is_refused(multi_view, detector, engine):
    one, two = crops(2, seed=3)
    with pytest.raises(
        SprueError, match=r"brick: sample 1 has 2 pictures; its detector reads 3 0-top, 1-left, 2-right"
    ):
        multi_view.predict([[one, one, one], [one, two]], engine)
    with pytest.raises(SprueError, match=r"sample 0 has 1 pictures; its detector reads 3"):
        multi_view.predict([one], engine)
    with pytest.raises(SprueError, match=r"sample 0 has 2 pictures; its detector reads 1$"):
        detector.predict([[one, two]], engine)


@pytest.mark.parametrize(
    ("name", "config", "views", "advice"),
    [
        ("patchflow", {}, VIEWS, "have 3 pictures each, and patchflow reads 1; choose the flow multiflow"),
        ("multiflow", {"views": 2}, VIEWS, "have 3 pictures each, and multiflow reads 2; set flow.views to 3"),
        ("multiflow", {"views": 2}, ("",), "have 1 pictures each, and multiflow reads 2; choose a flow of single"),
    ],
)
def test_a_flow_of_another_number_of_views_is_refused(detector, name, config, views, advice):
    flow = build_flow(name, channels=(8,), **({"adapted": 8} if name == "patchflow" else config))
    with pytest.raises(SprueError, match=f"class brick: its samples {advice}"):
        Detector("brick", detector.spec, name, flow, Scoring(), detector.calibration, views)
