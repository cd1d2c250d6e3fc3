"""What a flow adds to its baseline, the Gaussian, on the same features and the same test samples.

Shapes: N samples, V views of a sample, C channels, H rows, W columns of a map.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from defectflow import Gaussian, GaussianConfig
from sprue.config import ScoringSettings
from sprue.evaluation.curves import Curve
from sprue.evaluation.metrics import Estimate, aupro_difference, auroc_difference
from sprue.evaluation.pixels import PixelCounts
from sprue.evaluation.truth import GroundTruth
from sprue.inference.detector import Detector, best_device, score_features
from sprue.inference.precision import use_full_precision
from sprue.inference.spec import FeatureSpec

FIT_BATCH = 16
"""Samples that the Gaussian's statistics take together."""

SIDE = 384
"""Pixels of the image's side that the Gaussian's features are of, as near as the stored features have it: as in the
recipe ``gaussian-cpu``. Larger images are better for some parts and far worse for others."""

COMPARED = {"sample_auroc": "AUROC", "pixel_aupro": "AUPRO"}
"""The metrics that are compared, and their names in words."""

Batches = Callable[[int], Iterator[list[Tensor]]]
"""Batches of at most so many training samples' stored maps [B, C, H, W], those of the first view, then of the second
..., as `sprue.training.dataloader.DataLoader.ordered` gives them; called once for each view."""


@dataclass(frozen=True)
class Comparison:
    """A metric of the Gaussian, and how much higher the flow's is, with the interval of a paired bootstrap."""

    gaussian: float
    difference: Estimate


def baseline_maps(spec: FeatureSpec) -> tuple[int, ...]:
    """Indices of the maps that the Gaussian reads: every block's of the image at the size nearest to `SIDE`.

    A flow may read fewer or coarser maps; the Gaussian of these is often a weaker one, and would flatter the flow.
    """
    blocks = len(spec.blocks)
    scale = min(range(len(spec.scales)), key=lambda index: abs(spec.scales[index] * spec.input_size - SIDE))
    return tuple(range(scale * blocks, (scale + 1) * blocks))


def compare(
    detector: Detector,
    training: Batches,
    test: Iterable[Sequence[NDArray[np.float16]]],
    scores_N: NDArray[np.float32],
    labels_N: NDArray[np.integer[Any]],
    counts: PixelCounts,
    truth: GroundTruth,
) -> dict[str, Comparison]:
    """Fits the Gaussian of a detector's features, and compares the two on the test samples.

    Each view has a Gaussian of its own; a sample's score is the highest of its images'. Of a batch of training maps
    nothing is kept but sums.

    Args:
        detector: The detector of a flow.
        training: The training samples; of their maps, only `baseline_maps` are read.
        test: The test samples' maps [B, C, H, W] in batches, those of the first view, then of the second ...; as of
            `training`, `baseline_maps` are read.
        scores_N: The detector's scores of them.
        labels_N: 1 for a defective sample, 0 for a good one.
        counts: The detector's counts of pixels.
        truth: Where the defects are.

    Returns:
        By the metrics' names in `COMPARED`, those that exist.

    Raises:
        ValueError: If no Gaussian can be fitted to the training maps.
    """
    if isinstance(detector.flow, Gaussian) or len(np.unique(labels_N)) < 2:
        return {}
    use_full_precision()
    gaussians = [_fit_view(detector, view, training) for view in range(detector.flow.views)]
    scored = [_score(gaussians, maps) for maps in test]
    gaussian_N = np.concatenate([scores_NV.max(1) for scores_NV, _ in scored])
    found = {
        "sample_auroc": Comparison(
            float(Curve.of_scores(gaussian_N, labels_N).area()), auroc_difference(scores_N, gaussian_N, labels_N)
        )
    }
    if counts.is_defective_N.any():
        of_gaussian = truth.count(np.concatenate([positions_NVHW for _, positions_NVHW in scored]))
        found["pixel_aupro"] = Comparison(
            float(of_gaussian.aupro), aupro_difference(counts, of_gaussian, truth.groups_M)
        )
    return {name: each for name, each in found.items() if np.isfinite(each.difference.value)}


def _fit_view(detector: Detector, view: int, training: Batches) -> Gaussian:
    """The Gaussian of a view's training images."""
    device, channels = best_device(), detector.flow.config.channels
    own = slice(view * len(channels), (view + 1) * len(channels))
    gaussian = Gaussian(GaussianConfig(channels=channels, maps=baseline_maps(detector.spec))).to(device)
    gaussian.fit_adaptor([map_BCHW.to(device).float() for map_BCHW in batch[own]] for batch in training(FIT_BATCH))
    return gaussian


def _score(
    gaussians: Sequence[Gaussian], maps: Sequence[NDArray[np.float16]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The scores [N, V] and position scores [N, V, H, W] of test samples, by the Gaussian of each view."""
    count = len(maps) // len(gaussians)
    of_views = [
        score_features(gaussian, ScoringSettings(), maps[view * count : (view + 1) * count])
        for view, gaussian in enumerate(gaussians)
    ]
    scores_NV = np.stack([scores_N for scores_N, _, _ in of_views], axis=1)
    return scores_NV, np.concatenate([positions_N1HW for _, _, positions_N1HW in of_views], axis=1)


def as_metrics(comparisons: Mapping[str, Comparison]) -> dict[str, float]:
    """The Gaussian's metrics, and the differences with their intervals, by names for the metrics file and MLflow."""
    found = {}
    for name, each in comparisons.items():
        found[f"gaussian_{name}"] = each.gaussian
        found[f"{name}_over_gaussian"] = each.difference.value
        found[f"{name}_over_gaussian_low"] = each.difference.low
        found[f"{name}_over_gaussian_high"] = each.difference.high
    return found


def in_words(flow_name: str, metrics: Mapping[str, float]) -> str:
    """What a flow adds to the Gaussian, in a line; `metrics` are those of `as_metrics`, and perhaps others.

    >>> comparison = Comparison(0.706, Estimate(0.131, 0.092, 0.17))
    >>> in_words("csflow", as_metrics({"sample_auroc": comparison})).split(": ")[1]
    'it adds 13.1 points of AUROC (95 % interval 9.2 to 17.0; the Gaussian has 70.6 %).'
    >>> comparison = Comparison(0.746, Estimate(-0.01, -0.03, 0.01))
    >>> in_words("csflow", as_metrics({"sample_auroc": comparison})).split(" (")[0]
    'csflow against the Gaussian of the same features: it adds nothing to AUROC that this test split can show'
    """
    if flow_name == "gaussian":
        return "This detector is the Gaussian that the flows are held against."
    parts = [_part(title, name, metrics) for name, title in COMPARED.items() if f"gaussian_{name}" in metrics]
    if not parts:
        return f"What {flow_name} adds to the Gaussian takes good and defective test samples to say."
    return f"{flow_name} against the Gaussian of the same features: it {'; it '.join(parts)}."


def _part(title: str, name: str, metrics: Mapping[str, float]) -> str:
    points, low, high = (100 * metrics[f"{name}_over_gaussian{end}"] for end in ("", "_low", "_high"))
    interval = f"95 % interval {low:.1f} to {high:.1f}"
    gaussian = f"the Gaussian has {100 * metrics[f'gaussian_{name}']:.1f} %"
    if low > 0:
        return f"adds {points:.1f} points of {title} ({interval}; {gaussian})"
    if high < 0:
        return f"loses {-points:.1f} points of {title} ({interval}; {gaussian})"
    return f"adds nothing to {title} that this test split can show ({points:.1f} points, {interval}; {gaussian})"
