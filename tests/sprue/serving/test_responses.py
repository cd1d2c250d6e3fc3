"""Responses hold the detector's values.

Shapes: H rows, W columns of an image.
"""

import io
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from sprue.inference.heatmap import heat, overlay
from sprue.serving import responses
from sprue.serving.model_cache import ServedModel, SharedEngine
from sprue.tracking.registry import RegisteredDetector
from sprue.tracking.summary import SUMMARY_TAG, Summary

CHAMPION = RegisteredDetector("textures", "gräs 2", 3, "run")


@pytest.fixture
def served(tiny_detector, tiny_engine):
    return ServedModel(CHAMPION, tiny_detector(), SharedEngine(tiny_engine(), 32))


@pytest.fixture
def served_views(tiny_detector, tiny_engine):
    return ServedModel(CHAMPION, tiny_detector(views=("top", "left")), SharedEngine(tiny_engine(), 32))


def predict(served: ServedModel):
    inputs = np.random.default_rng(0).integers(0, 256, (len(served.detector.views), 32, 32, 3), np.uint8)
    return served.detector.predict_inputs(inputs, served.engine)


def test_a_score_is_the_predictions_of_one_sample(served):
    predictions, calibration = predict(served), served.detector.calibration
    assert responses.score(served, predictions).model_dump(exclude_none=True) == {
        "dataset": "textures",
        "class_name": "gräs 2",
        "score": float(predictions.score_B[0]),
        "p_value": predictions.p_value_B[0],
        "alpha": calibration.alpha,
        "is_anomalous": bool(predictions.is_anomalous_B[0]),
        "threshold": calibration.threshold,
        "model": {"name": "textures.gräs 2", "version": 3, "digest": CHAMPION.digest},
    }


def test_a_sample_of_several_views_has_a_score_for_each(served_views):
    predictions = predict(served_views)
    images = responses.score(served_views, predictions).images
    assert [(each.view, each.score) for each in images] == list(
        zip(("top", "left"), predictions.image_score_BV[0].tolist(), strict=True)
    )
    highest = int(predictions.image_score_BV[0].argmax())
    assert responses.shown_view(served_views, predictions, None) == highest
    assert responses.shown_view(served_views, predictions, "left") == 1


def test_the_heat_map_has_the_images_size_and_the_predicted_masks_fraction(served_views):
    predictions, image = predict(served_views), Image.new("RGB", (50, 40), (90, 90, 90))
    png, fraction = responses.heatmap_png(served_views, predictions, image, view=1)
    calibration, map_HW = served_views.detector.calibration, predictions.anomaly_map(0, (40, 50), view=1)
    predicted_mask_HW = map_HW > calibration.pixel_threshold
    assert 0 < fraction == predicted_mask_HW.mean() < 1
    expected = overlay(image, heat(map_HW, calibration), predicted_mask_HW)
    assert np.array_equal(Image.open(io.BytesIO(png)), expected)


def test_headers_hold_the_scores_values(served):
    score = responses.score(served, predict(served))
    headers = responses.score_headers(score)
    assert all(value.isascii() for value in headers.values())
    assert {name: unquote(value) for name, value in headers.items()} == {
        "X-Sprue-Dataset": "textures",
        "X-Sprue-Class": "gräs 2",
        "X-Sprue-Score": repr(score.score),
        "X-Sprue-P-Value": repr(score.p_value),
        "X-Sprue-Alpha": repr(score.alpha),
        "X-Sprue-Threshold": repr(score.threshold),
        "X-Sprue-Is-Anomalous": str(score.is_anomalous).lower(),
        "X-Sprue-Model": "textures.gräs 2",
        "X-Sprue-Model-Version": "3",
        "X-Sprue-Model-Digest": CHAMPION.digest,
    }
    score.heatmap_view, score.predicted_mask_fraction = "Öse 1", 0.25
    more = responses.score_headers(score)
    assert (unquote(more["X-Sprue-View"]), more["X-Sprue-Predicted-Mask-Fraction"]) == ("Öse 1", "0.25")


def test_the_list_of_classes_has_views_only_where_there_are_several(served, served_views):
    lone, several = (
        responses.summary(replace(each.champion, tags={SUMMARY_TAG: Summary.of(each.detector).model_dump_json()}), 1e9)
        for each in (served, served_views)
    )
    assert (lone.views, several.views) == (None, ["top", "left"])
    assert lone.since.isoformat() == "2001-09-09T01:46:40+00:00"
    assert (lone.dataset, lone.class_name, lone.model.name) == ("textures", "gräs 2", "textures.gräs 2")
    calibration, spec = served.detector.calibration, served.detector.spec
    assert (lone.threshold, lone.pixel_threshold) == (calibration.threshold, calibration.pixel_threshold)
    assert lone.calibration_samples == len(calibration.scores)
    assert (lone.features.fingerprint, lone.features.input_size) == (spec.fingerprint, 32)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [("", False), ("IMAGE/PNG", True), ("text/html, image/*;q=0.8, */*", True), ("application/json, image/png", False)],
)
def test_png_is_sent_where_it_is_preferred(accept, expected):
    assert responses.wants_png(accept) == expected
