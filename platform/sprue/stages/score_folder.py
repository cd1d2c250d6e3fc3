"""Scores all images of a folder on Ray with a registered detector."""

import os
from pathlib import Path

from sprue.errors import SprueError
from sprue.scoring.run import Summary, score_folder
from sprue.stages.runtime import IN_RAY_JOB, connect_ray
from sprue.store import location
from sprue.tracking.registry import find_registered

SHOWN = 20
"""Samples that could not be scored, in a message; the output has all."""


def score_on_ray(name: str, version: str, folder: str, output: str, heatmaps: bool) -> Summary:
    """Connects to Ray and scores a folder; see `sprue.scoring.run.score_folder`.

    Args:
        name: The class, as for `sprue.tracking.registry.find_model`.
        version: A number or an alias.
        folder: The images' folder or s3 URL.
        output: The scores', likewise.
        heatmaps: Whether heat maps are drawn.

    Raises:
        SprueError: If nothing can be scored, or a Ray job is given a place that only its copy of the checkout has.
    """
    if IN_RAY_JOB in os.environ:
        _require_shared(folder, output)
    root, target = location(folder), location(output)
    if not root.is_dir():
        raise SprueError(f"{root} is not a folder: give one that holds the images to score")
    registered = find_registered(name, version)
    connect_ray()
    return score_folder(registered, root, target, heatmaps)


def _require_shared(*places: str) -> None:
    copied = [place for place in places if "://" not in place and not Path(place).is_absolute()]
    advice = [f"give a path that all nodes see, or an s3 URL, for {place}" for place in copied]
    if "MLFLOW_TRACKING_URI" not in os.environ:
        advice.append("name the registry with MLFLOW_TRACKING_URI")
    if advice:
        raise SprueError(f"a Ray job runs in a copy of the checkout that is deleted afterwards; {' and '.join(advice)}")


def require_all(summary: Summary) -> None:
    """Raises SprueError if samples could not be scored; its message is a table of them and why."""
    if not summary.errors:
        return
    shown = {"sample": "reason"} | dict(list(summary.errors.items())[:SHOWN])
    width = max(map(len, shown))
    lines = [f"{name:<{width}}  {'; '.join(reason.splitlines())}" for name, reason in shown.items()]
    if len(summary.errors) > SHOWN:
        lines.append(f"and {len(summary.errors) - SHOWN} more, in the column error of {summary.scores}")
    count = f"{len(summary.errors)} of {summary.samples} samples can't be scored, the others are"
    raise SprueError("\n".join([count, *lines]))
