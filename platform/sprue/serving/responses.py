"""Converts predictions to the service's responses.

Shapes: H rows, W columns of the image.
"""

import base64
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.parse import quote

from PIL import Image

from sprue.inference import heatmap
from sprue.inference.detector import Predictions
from sprue.release.decision_store import Decision
from sprue.release.reviews import Review
from sprue.serving.errors import ApiError
from sprue.serving.model_cache import ServedModel
from sprue.serving.schemas import (
    AnomalyMap,
    ClassCalibration,
    FeatureSummary,
    ImageScore,
    ModelVersion,
    PastDecision,
    PastReview,
    Score,
    ServedClass,
)
from sprue.tracking.digests import digest_of
from sprue.tracking.registry import RegisteredDetector
from sprue.tracking.summary import Summary


def heatmap_png(served: ServedModel, predictions: Predictions, image: Image.Image, view: int) -> tuple[bytes, float]:
    """Draws the heat map over a view's image: a PNG of the image's size, and the predicted mask's fraction of it.

    The predictions are those for one sample; the image has its own size.
    """
    map_HW = predictions.anomaly_map(0, (image.height, image.width), view)
    return heatmap.heatmap_png(image, map_HW, served.detector.calibration)


def score(served: ServedModel, predictions: Predictions) -> Score:
    """The response for one sample, without its heat map."""
    calibration, views = served.detector.calibration, served.detector.views
    images = [
        ImageScore(view=view, score=float(score_of_view))
        for view, score_of_view in zip(views, predictions.image_score_BV[0], strict=True)
    ]
    return Score(
        dataset=served.champion.dataset,
        class_name=served.champion.class_name,
        score=float(predictions.score_B[0]),
        p_value=float(predictions.p_value_B[0]),
        alpha=calibration.alpha,
        is_anomalous=bool(predictions.is_anomalous_B[0]),
        threshold=calibration.threshold,
        model=version(served.champion),
        images=images if len(views) > 1 else None,
    )


def anomaly_maps(served: ServedModel, predictions: Predictions) -> list[AnomalyMap]:
    """The position scores of a sample's images."""
    return [
        AnomalyMap(
            view=view,
            rows=scores_HW.shape[0],
            columns=scores_HW.shape[1],
            scores=base64.b64encode(scores_HW.astype("<f4").tobytes()).decode(),
        )
        for view, scores_HW in zip(served.detector.views, predictions.position_scores_BVHW[0], strict=True)
    ]


def calibration(served: ServedModel) -> ClassCalibration:
    """What a class's scores and anomaly maps are compared with."""
    found = served.detector.calibration
    return ClassCalibration(
        model=version(served.champion),
        scores=list(found.scores),
        alpha=found.alpha,
        threshold=found.threshold,
        guarantee=found.guarantee,
        confidence=found.confidence,
        folds=found.folds,
        low=found.low,
        high=found.high,
        pixel_threshold=found.pixel_threshold,
    )


def past_decision(decision: Decision, review: Review | None) -> PastDecision:
    """A decision that was kept, with the last verdict on it."""
    return PastDecision(
        key=decision.key,
        at=decision.at,
        request_id=decision.request_id,
        station=decision.station,
        model=ModelVersion(name=decision.model_name, version=decision.version, digest=digest_of(decision.files)),
        score=decision.score,
        p_value=decision.p_value,
        alpha=decision.alpha,
        threshold=decision.threshold,
        is_anomalous=decision.is_anomalous,
        kept=decision.kept,
        images=list(decision.images),
        review=PastReview(verdict=review.verdict, reviewer=review.reviewer, at=review.at) if review else None,
    )


def require_view(champion: RegisteredDetector, views: Sequence[str], view: str | None) -> None:
    """Checks a requested view; raises ApiError 422 if the class's samples have none of that name."""
    if view is not None and view not in views:
        message = f"class {champion.class_name!r} has no view {view!r}; it has: {', '.join(views)}"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "unknown_view", message)


def shown_view(served: ServedModel, predictions: Predictions, requested: str | None) -> int:
    """Index of the view whose heat map is shown: the requested view, else the one with the highest score."""
    return int(predictions.image_score_BV[0].argmax()) if requested is None else served.detector.views.index(requested)


def version(champion: RegisteredDetector) -> ModelVersion:
    """The registered version of a champion."""
    return ModelVersion(name=champion.model_name, version=champion.version, digest=champion.digest)


def summary(champion: RegisteredDetector, since: float) -> ServedClass:
    """A class in the list of served classes, by its champion's tags: it need not be loaded.

    `since` is the Unix time from which it is served.
    """
    found = Summary.read(champion.tags, champion)
    return ServedClass(
        dataset=champion.dataset,
        class_name=champion.class_name,
        model=version(champion),
        since=datetime.fromtimestamp(since, UTC),
        alpha=found.alpha,
        threshold=found.threshold,
        pixel_threshold=found.pixel_threshold,
        views=list(found.views) if len(found.views) > 1 else None,
        calibration_samples=found.calibration_samples,
        features=FeatureSummary(fingerprint=found.fingerprint, backbone=found.backbone, input_size=found.input_size),
    )


def score_headers(score: Score) -> dict[str, str]:
    """The response's values as headers; names are percent-encoded, since headers are Latin-1."""
    headers = {
        "X-Sprue-Dataset": quote(score.dataset),
        "X-Sprue-Class": quote(score.class_name),
        "X-Sprue-Score": repr(score.score),
        "X-Sprue-P-Value": repr(score.p_value),
        "X-Sprue-Alpha": repr(score.alpha),
        "X-Sprue-Threshold": repr(score.threshold),
        "X-Sprue-Is-Anomalous": str(score.is_anomalous).lower(),
        "X-Sprue-Model": quote(score.model.name),
        "X-Sprue-Model-Version": str(score.model.version),
        "X-Sprue-Model-Digest": score.model.digest,
    }
    if score.heatmap_view is not None:
        headers["X-Sprue-View"] = quote(score.heatmap_view)
    if score.predicted_mask_fraction is not None:
        headers["X-Sprue-Predicted-Mask-Fraction"] = repr(score.predicted_mask_fraction)
    return headers


def timing_headers(seconds: Mapping[str, float], batch: int) -> dict[str, str]:
    """The phases of a request that the service spends on it, and how many samples were scored together.

    >>> timing_headers({"receive": 1.0, "decode": 0.01, "score": 0.02}, batch=3)
    {'Server-Timing': 'decode;dur=10.0, score;dur=20.0;desc="batch of 3"'}
    """
    decode, score = (f"{phase};dur={1e3 * seconds[phase]:.1f}" for phase in ("decode", "score"))
    return {"Server-Timing": f'{decode}, {score};desc="batch of {batch}"'}


def wants_png(accept: str) -> bool:
    """Whether an ``Accept`` header prefers PNG to JSON: it lists image/png or image/*, and not JSON before it.

    >>> wants_png("image/png"), wants_png("*/*"), wants_png("application/json, image/png;q=0.5")
    (True, False, False)
    """
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    return next(
        (kind != "application/json" for kind in kinds if kind in ("image/png", "image/*", "application/json")), False
    )
