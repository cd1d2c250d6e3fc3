"""The service's responses, as JSON and in its OpenAPI description."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Base64Bytes, BaseModel, ConfigDict, Field

from sprue.config import Guarantee
from sprue.release.decision_store import Kept
from sprue.release.reviews import Verdict


class ModelVersion(BaseModel):
    """A version of a registered model."""

    name: str = Field(description="Name of the registered model", examples=["textures.brick"])
    version: int = Field(description="Its version", examples=[3])
    digest: str = Field(
        description="SHA-256 of the digests of the version's files: of the detector with its threshold",
        examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"],
    )


class ImageScore(BaseModel):
    """The score of one of a sample's images."""

    view: str
    score: float = Field(description="The higher, the less likely, given the sample's other images")


class AnomalyMap(BaseModel):
    """The position scores of one image, at the feature maps' resolution; bilinearly upsampled, its anomaly map."""

    view: str = Field(description="Empty where samples have one image")
    rows: int
    columns: int
    scores: str = Field(description="Rows of 32-bit floats, little-endian, in base64")


class Score(BaseModel):
    """The champion's result for a sample: an image of a part, or an image of each of its views."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "dataset": "textures",
                "class_name": "brick",
                "score": 0.8123,
                "p_value": 0.0099,
                "alpha": 0.05,
                "is_anomalous": True,
                "threshold": 0.5312,
                "model": {
                    "name": "textures.brick",
                    "version": 3,
                    "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                },
            }
        }
    )

    dataset: str
    class_name: str
    score: float = Field(description="The higher, the less likely as a good part")
    p_value: float = Field(description="Fraction of good parts that score at least as high (split-conformal)")
    alpha: float = Field(description="Fraction of good parts that may be called anomalous")
    is_anomalous: bool = Field(
        description="Whether the score is above the threshold; under the marginal guarantee, whether p_value is at "
        "most alpha"
    )
    threshold: float = Field(description="The score above which a sample is anomalous")
    model: ModelVersion
    images: list[ImageScore] | None = Field(default=None, description="Each image's score, where a sample has several")
    heatmap_view: str | None = Field(default=None, description="The view that the heat map is of")
    heatmap_png: str | None = Field(
        default=None,
        description="With `heatmap=true`: the image under its heat map, with the predicted mask outlined, a PNG in "
        "base64",
    )
    predicted_mask_fraction: float | None = Field(
        default=None,
        description="With `heatmap=true`: fraction of the image's pixels in the predicted mask; for a good part at "
        "most alpha is expected",
    )
    maps: list[AnomalyMap] | None = Field(default=None, description="With `maps=true`: one for each image")


class FeatureSummary(BaseModel):
    """The features that a champion reads."""

    fingerprint: str = Field(description="Identifies the feature spec; classes with the same one share a backbone")
    backbone: str
    input_size: int = Field(description="Side in pixels of the square that images are resized to")


class ServedClass(BaseModel):
    """A class that can be scored."""

    dataset: str
    class_name: str
    model: ModelVersion
    since: AwareDatetime = Field(description="When all replicas began to serve this version, as far as they remember")
    alpha: float
    threshold: float
    pixel_threshold: float = Field(description="The predicted mask is where the anomaly map is above it")
    views: list[str] | None = Field(default=None, description="Names of a sample's images, where it has several")
    calibration_samples: int = Field(description="Good samples behind the p-values; none is below 1/(n+1)")
    features: FeatureSummary


class ServedClasses(BaseModel):
    """All classes that can be scored."""

    classes: list[ServedClass]


class ClassCalibration(BaseModel):
    """What a class's scores and anomaly maps are compared with."""

    model: ModelVersion
    scores: list[float] = Field(description="Scores of the held-out good samples, ascending")
    alpha: float
    threshold: float
    guarantee: Guarantee = Field(description="What alpha promises of the decisions")
    confidence: float = Field(description="Of the conditional guarantee")
    folds: int = Field(description="Flows whose folds gave the scores; 1 where a calibration set was held out")
    low: float = Field(description="Median of good position scores; the heat map begins there")
    high: float = Field(description="99.9 % quantile of good position scores; half of the heat map's scale")
    pixel_threshold: float = Field(description="The predicted mask is where the anomaly map is above it")


class PastReview(BaseModel):
    """What somebody said about a decision."""

    verdict: Verdict
    reviewer: str = Field(description="Name of the key; empty where the service has no keys")
    at: AwareDatetime


class PastDecision(BaseModel):
    """A decision that was kept."""

    key: str = Field(description="Identifies the decision")
    at: AwareDatetime
    request_id: str
    station: str
    model: ModelVersion
    score: float
    p_value: float
    alpha: float
    threshold: float
    is_anomalous: bool
    kept: Kept = Field(description="Why the images are kept; empty if they are not")
    images: list[str] = Field(description="SHA-256 of each image, in the views' order")
    review: PastReview | None = Field(default=None, description="The last verdict")


class PastDecisions(BaseModel):
    """The last decisions about a class, newest first."""

    decisions: list[PastDecision]


class NewReview(BaseModel):
    """A verdict on a decision."""

    model_config = ConfigDict(extra="forbid")

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="The decision's")]
    at: AwareDatetime = Field(description="When the decision was made")
    verdict: Verdict
    masks: list[Base64Bytes] = Field(
        default=[],
        description="Where the defect is: a PNG of each image's size in base64, white where it is defective, in "
        "the views' order; empty for a view without a mark",
    )


class Liveness(BaseModel):
    """The service runs."""

    status: Literal["alive"]


class Readiness(BaseModel):
    """Whether every champion of the registry is served, as far as they have been loaded.

    A degraded service still scores, with the champions that it has. Strangers see that it is ready, and nothing else.
    """

    status: Literal["ready", "degraded"]
    classes: int | None = Field(default=None, description="Number of classes that are served")
    loaded: int | None = Field(default=None, description="Number of classes that are loaded; others are on demand")
    loaded_bytes: int | None = Field(default=None, description="Memory of the flows that are loaded")
    engines: int | None = Field(default=None, description="Number of backbones that are loaded, which classes share")
    failures: dict[str, str] | None = Field(
        default=None, description="Why a champion could not be loaded, by its model's name"
    )
    registry_error: str | None = Field(default=None, description="Why the registry could not be read the last time")
    registry_age_s: float | None = Field(default=None, description="Seconds since the registry was read the last time")
    keys_error: str | None = Field(default=None, description="Why the file of keys could not be read the last time")
    decisions_error: str | None = Field(
        default=None, description="Why decisions could not be kept, or old ones not be deleted, the last time"
    )
