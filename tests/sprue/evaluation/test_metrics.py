"""Metrics equal scikit-learn's and their definitions evaluated by hand, with ties."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import norm
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from sprue.errors import SprueError
from sprue.evaluation import metrics, pixels
from sprue.evaluation.curves import Curve
from sprue.evaluation.evaluate import VERSION
from sprue.evaluation.metrics import (
    RANKING_METRICS,
    aupro_difference,
    auroc_difference,
    fraction,
    mean,
    pixel_estimates,
    score_estimates,
)
from sprue.evaluation.pixels import count_pixels


def values_of(estimates):
    return {name: estimate.value for name, estimate in estimates.items()}


def by_hand(scores, labels):
    """The metrics by other means; PB2 and PG2 by trying every threshold."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    thresholds = np.append(np.unique(scores), np.inf)
    tpr = [(scores[labels == 1] >= t).mean() for t in thresholds]
    fpr = [(scores[labels == 0] >= t).mean() for t in thresholds]
    return {
        "auroc": roc_auc_score(labels, scores),
        "average_precision": average_precision_score(labels, scores),
        "best_f1": np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)),
        "pb2": max(true for true, false in zip(tpr, fpr, strict=True) if false <= 0.02),
        "pg2": max(1 - false for true, false in zip(tpr, fpr, strict=True) if true >= 0.98),
    }


@pytest.mark.parametrize("levels", [2, 7, None])
@pytest.mark.parametrize(("good", "defective"), [(1, 1), (60, 7), (150, 200)])
def test_metrics_of_samples_are_those_of_their_definitions(levels, good, defective):
    rng = np.random.default_rng(good)
    labels_N = rng.permutation(np.repeat([0, 1], [good, defective]))
    scores_N = rng.normal(size=good + defective) + labels_N
    if levels:
        scores_N = np.round(scores_N * levels / 4)
    expected = by_hand(scores_N, labels_N)
    estimates = score_estimates(scores_N, labels_N)
    assert values_of(estimates) == pytest.approx(expected, abs=1e-12)
    for estimate in estimates.values():
        assert estimate.low - 1e-12 <= estimate.value <= estimate.high + 1e-12 or good == 1


@pytest.mark.parametrize("chunk", [1, 10_000])
@pytest.mark.parametrize("levels", [3, 20, None])
def test_metrics_of_pixels_are_those_of_all_pixels_together(levels, chunk, monkeypatch):
    monkeypatch.setattr(pixels, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    sizes = [(20, 31), (64, 8), (5, 5), (1, 40), (33, 17)]
    maps = [rng.normal(size=size).astype(np.float32) for size in sizes]
    if levels:
        maps = [np.round(each * levels / 6) for each in maps]
    # A good image, one with an empty mask, one that is all defect, two with parts.
    masks = [None, np.zeros(sizes[1], bool), np.ones(sizes[2], bool), *(rng.random(size) < 0.2 for size in sizes[3:])]
    truth = np.concatenate(
        [(np.zeros(m.shape, bool) if t is None else t).ravel() for m, t in zip(maps, masks, strict=True)]
    )
    expected = by_hand(np.concatenate([each.ravel() for each in maps]), truth.astype(int))
    found = values_of(pixel_estimates(count_pixels(lambda i: maps[i], lambda i: masks[i], len(masks))))
    for name in ("auroc", "average_precision", "best_f1"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.parametrize("levels", [6, 40, None])
def test_overlap_is_integrated_over_every_threshold(levels):
    rng = np.random.default_rng(1)
    masks = []
    for _ in range(4):
        mask = np.zeros((24, 32), bool)
        for _ in range(3):
            top, left = rng.integers(0, 20), rng.integers(0, 28)
            mask[top : top + rng.integers(1, 5), left : left + rng.integers(1, 5)] = True
        masks.append(mask)
    masks.append(np.zeros((24, 32), bool))
    maps = [rng.normal(size=mask.shape) + 1.5 * mask for mask in masks]
    if levels:
        maps = [np.round(each * levels / 6) for each in maps]
    found = pixel_estimates(count_pixels(lambda i: maps[i], lambda i: masks[i], len(masks)))["aupro"]
    assert found.value == pytest.approx(overlap_by_hand(maps, masks), abs=1e-9)
    assert found.low < found.value < found.high


def overlap_by_hand(maps, masks, limit=0.3):
    """The area under the polygon through (false-positive rate, mean overlap) at every value that occurs."""
    normal = np.concatenate([m[~t] for m, t in zip(maps, masks, strict=True)])
    regions = []
    for map_HW, mask in zip(maps, masks, strict=True):
        labelled, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [map_HW[labelled == region] for region in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([each.ravel() for each in maps]))[::-1]:
        overlap = np.mean([(region >= threshold).mean() for region in regions])
        points.append(((normal >= threshold).mean(), overlap))
    area = 0.0
    for (left, low), (right, high) in itertools.pairwise(points):
        end = min(right, limit)
        if end > left:
            area += (end - left) * (low + (low + (high - low) * (end - left) / (right - left))) / 2
    return area / limit


def test_the_ends_of_the_scale():
    mask = np.array([[False, True]])
    for normal, anomalous, area in ((0.0, 1.0, 1.0), (1.0, 0.0, 0.0), (1.0, 1.0, 0.5)):
        counts = count_pixels(lambda _, n=normal, a=anomalous: np.array([[n, a]]), lambda _: mask, 1)
        assert pixel_estimates(counts)["auroc"].value == area
    constant = values_of(score_estimates(np.ones(8), np.array([0, 0, 0, 0, 0, 0, 1, 1])))
    assert constant == pytest.approx(
        {"auroc": 0.5, "average_precision": 0.25, "best_f1": 0.4, "pb2": 0.0, "pg2": 0.0}, abs=1e-12
    )


def test_metrics_need_both_kinds_of_items():
    scores = np.array([0.1, 0.2])
    for labels in (np.array([0, 0]), np.array([1, 1])):
        assert all(math.isnan(estimate.value) for estimate in score_estimates(scores, labels).values())
    assert all(math.isnan(estimate.value) for estimate in score_estimates(scores[:0], np.array([], int)).values())
    one = np.ones((2, 2))
    for masks in ([None, None], [np.zeros((2, 2), bool)], [np.ones((2, 2), bool)], []):
        estimates = pixel_estimates(count_pixels(lambda _: one, masks.__getitem__, len(masks)))
        assert all(math.isnan(estimate.value) for estimate in estimates.values())


def test_invalid_scores_labels_maps_and_masks_are_refused():
    with pytest.raises(SprueError, match="1 of 2 scores are NaN"):
        score_estimates(np.array([0.1, np.nan]), np.array([0, 1]))
    with pytest.raises(SprueError, match=r"labels are 0 \(good\) or 1"):
        score_estimates(np.array([0.1, 0.2]), np.array([0, 2]))
    with pytest.raises(SprueError, match="image 1: its anomaly map holds NaN"):
        pixel_estimates(count_pixels(lambda i: np.full((2, 2), np.nan if i else 0.0), lambda _: None, 2))
    with pytest.raises(SprueError, match="image 0: its mask holds uint8"):
        pixel_estimates(count_pixels(lambda _: np.ones((2, 2)), lambda _: np.ones((2, 2), np.uint8), 1))
    with pytest.raises(SprueError, match=r"image 0: its map is \(2, 2\), its mask \(2, 3\)"):
        pixel_estimates(count_pixels(lambda _: np.ones((2, 2)), lambda _: np.ones((2, 3), bool), 1))


def test_intervals_cover_what_other_test_splits_give():
    """The interval covers the truth in about 95 % of test splits of 300 each, and is no wider than needed."""
    apart, splits = 1.5, 40
    truth = {"auroc": norm.cdf(apart / math.sqrt(2)), "pb2": norm.cdf(apart - norm.ppf(0.98))}
    covered, widths, values = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0.0), {name: [] for name in truth}
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        labels_N = np.repeat([0, 1], 300)
        estimates = score_estimates(rng.normal(size=600) + apart * labels_N, labels_N)
        for name, true in truth.items():
            covered[name] += estimates[name].low <= true <= estimates[name].high
            widths[name] += (estimates[name].high - estimates[name].low) / splits
            values[name].append(estimates[name].value)
    for name in truth:
        assert covered[name] >= 0.8 * splits
        assert widths[name] == pytest.approx(2 * norm.ppf(0.975) * np.std(values[name]), rel=0.5)


def test_images_of_a_sample_are_resampled_together():
    """With 5 images of each sample that are alike, and the interval of independent ones for comparison."""
    rng, covered, widths = np.random.default_rng(0), 0, []
    labels_N, groups_N = np.repeat([0] * 40 + [1] * 40, 5), np.repeat(np.arange(80), 5)
    truth = norm.cdf(1 / np.sqrt(2))
    for _ in range(40):
        scores_N = np.sqrt(0.7) * np.repeat(rng.normal(size=80), 5) + np.sqrt(0.3) * rng.normal(size=400) + labels_N
        grouped, alone = (score_estimates(scores_N, labels_N, groups)["auroc"] for groups in (groups_N, None))
        covered += grouped.low <= truth <= grouped.high
        widths.append((grouped.high - grouped.low) / (alone.high - alone.low))
    assert covered >= 34
    assert np.mean(widths) > 1.6


def test_an_estimate_lies_in_its_interval_and_bins_are_nearly_exact():
    """Few anomalous pixels, far above the others or among them, and a column that is the same in all images."""
    rng = np.random.default_rng(0)
    masks = [np.zeros((64, 64), bool) for _ in range(40)]
    for mask in masks[:10]:
        mask[10:12, 20:22] = True
    for apart in (0.5, 3.0, 20.0):
        maps = [rng.normal(size=(64, 64)).astype(np.float32) + apart * mask for mask in masks]
        for map_HW in maps:
            map_HW[:, 0] = 2.0
        counts = count_pixels(lambda i, maps=maps: maps[i], lambda i: masks[i], 40)
        binned = Curve.of_bins(np.cumsum(counts.anomalous_NQ.sum(0)), np.cumsum(counts.normal_NQ.sum(0)))
        for name, metric in RANKING_METRICS.items():
            assert float(metric(binned)) == pytest.approx(float(metric(counts.curve)), abs=0.02), name
        for estimate in pixel_estimates(counts).values():
            assert estimate.low <= estimate.value <= estimate.high


def test_pixels_are_counted_in_memory_that_does_not_grow_with_the_images(monkeypatch):
    def peak(images):
        tracemalloc.start()
        count_pixels(lambda i: np.random.default_rng(i).normal(size=(200, 200)), lambda _: None, images)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    monkeypatch.setattr(pixels, "CHUNK", 100_000)
    one_map = 200 * 200 * 8
    assert peak(60) - peak(20) < 5 * one_map


@pytest.mark.parametrize("scores", [[np.inf, np.inf, 0, 0], [1, 1, -np.inf, -np.inf]])
@pytest.mark.parametrize("labels", [[1, 0, 0, 1], [0, 1, 0, 1]])
def test_infinite_scores_are_tied_with_one_another(scores, labels):
    assert score_estimates(np.array(scores, float), np.array(labels))["auroc"].value == 0.5


def test_scores_of_any_real_type_are_ranked_alike():
    labels = np.array([1, 0, 0, 1])
    for dtype in (np.uint8, np.int64, np.float16):
        assert score_estimates(np.array([0, 1, 2, 3], dtype), labels)["auroc"].value == 0.5
    assert score_estimates(np.array([True, False, False, True]), labels)["auroc"].value == 1.0


def test_a_fraction_has_its_exact_interval():
    assert math.isnan(fraction(np.array([], bool)).value)
    none_of_ten = fraction(np.zeros(10, bool))
    assert (none_of_ten.value, none_of_ten.low) == (0.0, 0.0)
    assert none_of_ten.high == pytest.approx(1 - 0.025 ** (1 / 10))


def test_the_difference_of_two_detectors_is_resampled_in_pairs():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    one = rng.normal(size=120) + labels
    difference = auroc_difference(one, one + 1e-9 * rng.normal(size=120), labels)
    assert difference.value == pytest.approx(0, abs=1e-3)
    assert difference.high - difference.low < 0.01  # far less than if each had its own resamples
    other = rng.normal(size=120)
    difference = auroc_difference(one, other, labels)
    assert difference.value == pytest.approx(roc_auc_score(labels, one) - roc_auc_score(labels, other))
    assert 0 < difference.low < difference.value < difference.high
    reverse = auroc_difference(other, one, labels)
    assert (reverse.value, reverse.low) == (
        pytest.approx(-difference.value),
        pytest.approx(-difference.high, abs=0.01),
    )
    with pytest.raises(SprueError, match="are NaN"):
        auroc_difference(one, np.full(120, np.nan), labels)


def test_the_difference_of_two_detectors_overlap_is_resampled_in_pairs():
    rng = np.random.default_rng(0)
    masks_NHW = (rng.random((30, 9, 7)) < 0.2) & (np.arange(30) % 2 == 1)[:, None, None]

    def counted(maps_NHW):
        return count_pixels(maps_NHW.__getitem__, masks_NHW.__getitem__, 30)

    maps_NHW = rng.normal(size=(30, 9, 7)) + 2 * masks_NHW
    # Few values have few bins: the two detectors' resamples must be the same all the same.
    one, same, other = counted(maps_NHW), counted(maps_NHW), counted((maps_NHW > 1.5).astype(float))
    assert one.anomalous_NQ.shape != other.anomalous_NQ.shape
    nothing = aupro_difference(one, same)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    difference, alone = aupro_difference(one, other), [pixel_estimates(each)["aupro"] for each in (one, other)]
    assert difference.value == pytest.approx(alone[0].value - alone[1].value)
    assert 0 < difference.low < difference.value < difference.high
    # Pairs are worth it: their interval is narrower than that of two independent test splits.
    unpaired = math.hypot(*(each.high - each.low for each in alone))
    assert difference.high - difference.low < 0.8 * unpaired
    assert aupro_difference(other, one).low == pytest.approx(-difference.high, abs=0.01)
    good = count_pixels(maps_NHW.__getitem__, lambda i: None, 30)
    assert math.isnan(aupro_difference(good, good).value)


def test_variants_of_one_image_are_resampled_together():
    # Five samples of each image, of which all or none have better scores: the images are independent, not the samples.
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(12), 5), np.tile([0, 1, 1, 1, 1], 12)
    one = labels + 0.1 * rng.normal(size=60)
    other = np.where((groups % 3 == 0) & (labels == 1), -1.0, one)
    together, apart = (auroc_difference(one, other, labels, each) for each in (groups, None))
    assert together.value == apart.value > 0.2
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


PINNED = {
    3: {
        "sample_auroc": (0.875, 0.6944444444444444, 0.9791666666666666),
        "sample_average_precision": (0.9031924763832659, 0.7733175574652338, 0.9791666666666666),
        "sample_best_f1": (0.8, 0.6857142857142857, 0.8571428571428571),
        "sample_pb2": (0.6666666666666666, 0.3333333333333333, 0.9166666666666666),
        "sample_pg2": (0.41666666666666663, 0.08333333333333337, 0.75),
        "pixel_auroc": (0.7661819402237129, 0.7189126977057566, 0.8186106826298095),
        "pixel_average_precision": (0.38027114963839875, 0.2965588142781489, 0.46335157033354546),
        "pixel_best_f1": (0.3824451410658307, 0.314172457017134, 0.4536875861355469),
        "pixel_aupro": (0.478980016212501, 0.39337538196128374, 0.5709196139617416),
        "image_auroc": (0.875, 0.6776746031903061, 0.9652777777777778),
        "detection_rate": (0.75, 0.42814153812190026, 0.9451393554720076),
        "pixel_false_alarm_rate": (0.19047619047619047, 0.1684531938830584, 0.2136243386243386),
        "difference": (0.0, -0.11111111111111116, 0.11111111111111115),
        "overlap_difference": (0.2871843224400107, 0.2345113830687512, 0.3427776069851825),
    }
}
"""By version of the evaluation: value, low and high of each estimate."""


@pytest.mark.parametrize("groups_N", [None, np.arange(20_000) // 2], ids=["alone", "in groups"])
def test_resamples_of_many_images_are_held_in_parts(groups_N):
    parts = [part_DN.shape for part_DN in metrics._weights(np.zeros(20_000, int), 100, 0, groups_N)]
    assert sum(resamples for resamples, _ in parts) == metrics.RESAMPLES
    assert all(resamples * images <= metrics.WEIGHTS_AT_ONCE for resamples, images in parts)


def test_the_estimates_of_this_version():
    """If a change of the results is intended, raise `VERSION` and pin the new ones to it."""
    rng = np.random.default_rng(0)
    labels_N = np.arange(24) % 2
    masks_NHW = (rng.random((24, 9, 7)) < 0.2) & (labels_N == 1)[:, None, None]
    scores_N = rng.normal(size=24) + labels_N
    maps_NHW = rng.normal(size=(24, 9, 7)) + masks_NHW
    counts = count_pixels(maps_NHW.__getitem__, masks_NHW.__getitem__, 24)
    estimates = {f"sample_{name}": estimate for name, estimate in score_estimates(scores_N, labels_N).items()}
    estimates |= {f"pixel_{name}": estimate for name, estimate in pixel_estimates(counts).items()}
    estimates["image_auroc"] = score_estimates(scores_N, labels_N, np.arange(24) // 2)["auroc"]
    estimates["detection_rate"] = fraction(scores_N[labels_N == 1] > 0.5)
    estimates["pixel_false_alarm_rate"] = mean((maps_NHW > 1).mean((1, 2)))
    estimates["difference"] = auroc_difference(scores_N, -scores_N[::-1], labels_N, np.arange(24) // 4)
    other = count_pixels((maps_NHW - masks_NHW).__getitem__, masks_NHW.__getitem__, 24)
    estimates["overlap_difference"] = aupro_difference(counts, other)
    assert estimates.keys() == PINNED[VERSION].keys()
    for name, estimate in estimates.items():
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(PINNED[VERSION][name], abs=1e-9), name
