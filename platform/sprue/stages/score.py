"""Scores image files in this process with a registered detector."""

from pathlib import Path
from typing import Any

from sprue.data.labelled import read_sample
from sprue.tracking.backbones import registered_engine
from sprue.tracking.registry import RegisteredDetector, load_detector


def score_files(registered: RegisteredDetector, paths: list[Path]) -> list[dict[str, Any]]:
    """One row of results for each sample.

    Args:
        registered: The version that scores.
        paths: An image of each sample; a folder with an image of each view where samples have several.

    Raises:
        SprueError: If a file can't be read or a view is missing.
    """
    detector = load_detector(registered)
    samples = [read_sample(path, detector.views) for path in paths]
    predictions = detector.predict(samples, registered_engine(detector))
    return [
        {
            "sample": str(path),
            "score": float(predictions.score_B[index]),
            "p_value": float(predictions.p_value_B[index]),
            "is_anomalous": bool(predictions.is_anomalous_B[index]),
            "threshold": detector.calibration.threshold,
            "model": registered.model_name,
            "version": registered.version,
        }
        for index, path in enumerate(paths)
    ]
