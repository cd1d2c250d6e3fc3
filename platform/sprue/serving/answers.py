"""Puts predictions into words, figures and pictures.

Shapes: H rows, W columns of the picture.
"""

import io
from urllib.parse import quote

from PIL import Image

from sprue.inference.detector import Predictions
from sprue.inference.heatmap import heat, overlay
from sprue.serving.lineup import Served
from sprue.serving.schemas import FeatureSummary, ModelVersion, PictureScore, Score, ServedClass


def heatmap_png(served: Served, predictions: Predictions, image: Image.Image, view: int) -> tuple[bytes, float | None]:
    """The picture of a view at its own size with its heat laid over it, as a PNG; the share of it that is marked.

    Detectors of earlier releases mark nothing, and say so with None.
    """
    calibration = served.detector.calibration
    map_HW = predictions.anomaly_map(0, (image.height, image.width), view)
    marked_HW = calibration.marked(map_HW)
    buffer = io.BytesIO()
    # Level 1 is three to five times as fast as the default and costs a fifth more bytes.
    overlay(image, heat(map_HW, calibration), marked_HW).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue(), None if calibration.pixel_threshold is None else float(marked_HW.mean())


def score(served: Served, predictions: Predictions) -> Score:
    """What a champion says of one sample."""
    calibration, views = served.detector.calibration, served.detector.views
    pictures = [
        PictureScore(view=view, score=float(score_of_view))
        for view, score_of_view in zip(views, predictions.picture_score_BV[0], strict=True)
    ]
    return Score(
        class_name=served.champion.class_name,
        score=float(predictions.score_B[0]),
        p_value=float(predictions.p_value_B[0]),
        alpha=calibration.alpha,
        is_anomalous=bool(predictions.is_anomalous_B[0]),
        threshold=calibration.threshold,
        model=version(served),
        pictures=pictures if len(views) > 1 else None,
    )


def shown_view(served: Served, predictions: Predictions, asked: str | None) -> int:
    """Place of the view whose heat map is shown: the one that is asked for, else the one with the highest score."""
    return int(predictions.picture_score_BV[0].argmax()) if asked is None else served.detector.views.index(asked)


def version(served: Served) -> ModelVersion:
    """The registered version that a class is served with."""
    return ModelVersion(name=served.champion.model_name, version=served.champion.version)


def summary(served: Served) -> ServedClass:
    """A class as the service lists it."""
    calibration, spec = served.detector.calibration, served.detector.spec
    return ServedClass(
        class_name=served.champion.class_name,
        model=version(served),
        alpha=calibration.alpha,
        threshold=calibration.threshold,
        pixel_threshold=calibration.pixel_threshold,
        views=list(served.detector.views) if len(served.detector.views) > 1 else None,
        calibration_pictures=len(calibration.scores),
        features=FeatureSummary(fingerprint=spec.fingerprint, backbone=spec.backbone, input_size=spec.input_size),
    )


def figures(score: Score) -> dict[str, str]:
    """The figures as headers; names are percent-encoded, as headers are Latin-1."""
    headers = {
        "X-Sprue-Class": quote(score.class_name),
        "X-Sprue-Score": repr(score.score),
        "X-Sprue-P-Value": repr(score.p_value),
        "X-Sprue-Alpha": repr(score.alpha),
        "X-Sprue-Threshold": repr(score.threshold),
        "X-Sprue-Is-Anomalous": str(score.is_anomalous).lower(),
        "X-Sprue-Model": quote(score.model.name),
        "X-Sprue-Model-Version": str(score.model.version),
    }
    if score.heatmap_view is not None:
        headers["X-Sprue-View"] = quote(score.heatmap_view)
    if score.marked_share is not None:
        headers["X-Sprue-Marked-Share"] = repr(score.marked_share)
    return headers


def wants_png(accept: str) -> bool:
    """Whether a client asks for a PNG rather than JSON: it names image/png or image/*, and not JSON before it.

    >>> wants_png("image/png"), wants_png("*/*"), wants_png("application/json, image/png;q=0.5")
    (True, False, False)
    """
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    return next(
        (kind != "application/json" for kind in kinds if kind in ("image/png", "image/*", "application/json")), False
    )
