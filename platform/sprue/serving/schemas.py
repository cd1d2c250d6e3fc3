"""The service's answers, as JSON and in its OpenAPI description."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelVersion(BaseModel):
    """A registered model's version."""

    name: str = Field(description="Name of the registered model", examples=["brick"])
    version: int = Field(description="Version that holds the alias champion", examples=[3])


class PictureScore(BaseModel):
    """What it says of one of a sample's pictures."""

    view: str
    score: float = Field(description="The higher, the less likely, given the sample's other pictures")


class Score(BaseModel):
    """What the champion of a class says of a sample: a picture of a part, or a picture of each of its views."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "class_name": "brick",
                "score": 0.8123,
                "p_value": 0.0099,
                "alpha": 0.05,
                "is_anomalous": True,
                "threshold": 0.5312,
                "model": {"name": "brick", "version": 3},
            }
        }
    )

    class_name: str
    score: float = Field(description="The higher, the less likely as a good part")
    p_value: float = Field(description="Share of good parts that score at least as high (split-conformal)")
    alpha: float = Field(description="Share of good parts that may be called anomalous")
    is_anomalous: bool = Field(description="Whether p_value is at most alpha, which is: score above threshold")
    threshold: float = Field(description="The score above which a sample is anomalous")
    model: ModelVersion
    pictures: list[PictureScore] | None = Field(
        default=None, description="Where a sample has several, each one's score"
    )
    heatmap_view: str | None = Field(default=None, description="The view that the heat map is of")
    heatmap_png: str | None = Field(
        default=None,
        description="With `heatmap=true`: the picture with its heat map laid over it and what is marked outlined, a "
        "PNG in base64",
    )
    marked_share: float | None = Field(
        default=None,
        description="With `heatmap=true`: share of the picture's pixels that are marked; of a good part's at most "
        "alpha are expected to be",
    )


class FeatureSummary(BaseModel):
    """What a class's champion reads."""

    fingerprint: str = Field(description="Names the feature spec; classes with the same one share a backbone")
    backbone: str
    input_size: int = Field(description="Side in pixels of the square that pictures are resized to")


class ServedClass(BaseModel):
    """A class that can be scored."""

    class_name: str
    model: ModelVersion
    alpha: float
    threshold: float
    pixel_threshold: float | None = Field(
        default=None, description="The evidence above which a pixel of the heat map is marked"
    )
    views: list[str] | None = Field(default=None, description="Where a sample has several pictures: their order")
    calibration_pictures: int = Field(description="Good samples that p-values are made of; none is below 1/(n+1)")
    features: FeatureSummary


class ServedClasses(BaseModel):
    """All classes that can be scored."""

    classes: list[ServedClass]


class Health(BaseModel):
    """Whether the service serves what the registry names.

    A degraded service answers all the same: with the champions that it has.
    """

    status: Literal["ok", "degraded"]
    classes: int = Field(description="Classes that are served")
    engines: int = Field(description="Backbones that they share")
    failures: dict[str, str] = Field(description="Classes whose champion could not be loaded, and why")
    registry_error: str | None = Field(default=None, description="Why the registry could not be read the last time")


class ErrorDetail(BaseModel):
    """An error, for programs and for people."""

    code: str
    message: str


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail
