"""What a version's tags say of its detector, so that nobody has to load it to list it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from sprue.errors import SprueError
from sprue.inference.detector import Detector
from sprue.tracking.digests import digest_tags

SUMMARY_TAG = "sprue.summary"


class Summary(BaseModel):
    """A detector's settings and thresholds; see `sprue.inference.calibration.Calibration` for the latter."""

    alpha: float
    threshold: float
    pixel_threshold: float
    calibration_samples: int
    views: tuple[str, ...]
    fingerprint: str
    backbone: str
    input_size: int

    @classmethod
    def of(cls, detector: Detector) -> Self:
        """The summary of a detector."""
        calibration, spec = detector.calibration, detector.spec
        return cls(
            alpha=calibration.alpha,
            threshold=calibration.threshold,
            pixel_threshold=calibration.pixel_threshold,
            calibration_samples=len(calibration.scores),
            views=detector.views,
            fingerprint=spec.fingerprint,
            backbone=spec.backbone,
            input_size=spec.input_size,
        )

    @classmethod
    def read(cls, tags: Mapping[str, str], version: object) -> Self:
        """The summary in a version's tags; messages call it `version`.

        Raises:
            SprueError: If there is none.
        """
        try:
            return cls.model_validate_json(tags.get(SUMMARY_TAG, ""))
        except ValidationError as error:
            raise SprueError(f"{version} has no summary of its detector in its tags: register it anew") from error


def detector_tags(folder: Path) -> dict[str, str]:
    """The tags of a saved detector's version: the digests of its files, and its summary."""
    return digest_tags(folder) | {SUMMARY_TAG: Summary.of(Detector.load(folder)).model_dump_json()}
