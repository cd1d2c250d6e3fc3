"""Figures equal scikit-learn's and what their definitions say when they are followed by hand, ties and all."""

import itertools
import json
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import norm
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from sprue.errors import SprueError
from sprue.evaluation import pixels
from sprue.evaluation.curves import Curve
from sprue.evaluation.metrics import OF_CURVE, auroc_difference, image_figures, pixel_figures, share
from sprue.evaluation.pixels import count_pixels


def values_of(figures):
    return {name: figure.value for name, figure in figures.items()}


def by_hand(scores, labels):
    """The figures by other means; the plant's by trying every threshold."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    thresholds = np.append(np.unique(scores), np.inf)
    caught = [(scores[labels == 1] >= t).mean() for t in thresholds]
    lost = [(scores[labels == 0] >= t).mean() for t in thresholds]
    return {
        "auroc": roc_auc_score(labels, scores),
        "average_precision": average_precision_score(labels, scores),
        "best_f1": np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)),
        "pb2": max(c for c, a in zip(caught, lost, strict=True) if a <= 0.02),
        "pg2": max(1 - a for c, a in zip(caught, lost, strict=True) if c >= 0.98),
    }


@pytest.mark.parametrize("levels", [2, 7, None])
@pytest.mark.parametrize(("good", "defective"), [(1, 1), (60, 7), (150, 200)])
def test_figures_of_samples_are_those_of_their_definitions(levels, good, defective):
    rng = np.random.default_rng(good)
    labels_N = rng.permutation(np.repeat([0, 1], [good, defective]))
    scores_N = rng.normal(size=good + defective) + labels_N
    if levels:
        scores_N = np.round(scores_N * levels / 4)
    expected = by_hand(scores_N, labels_N)
    figures = image_figures(scores_N, labels_N)
    assert values_of(figures) == pytest.approx(expected, abs=1e-12)
    for figure in figures.values():
        assert figure.low - 1e-12 <= figure.value <= figure.high + 1e-12 or good == 1


@pytest.mark.parametrize("chunk", [1, 10_000])
@pytest.mark.parametrize("levels", [3, 20, None])
def test_figures_of_pixels_are_those_of_all_pixels_together(levels, chunk, monkeypatch):
    monkeypatch.setattr(pixels, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    sizes = [(20, 31), (64, 8), (5, 5), (1, 40), (33, 17)]
    maps = [rng.normal(size=size).astype(np.float32) for size in sizes]
    if levels:
        maps = [np.round(each * levels / 6) for each in maps]
    # A good picture, one with an empty mask, one that is all defect, two with parts.
    masks = [None, np.zeros(sizes[1], bool), np.ones(sizes[2], bool), *(rng.random(size) < 0.2 for size in sizes[3:])]
    truth = np.concatenate(
        [(np.zeros(m.shape, bool) if t is None else t).ravel() for m, t in zip(maps, masks, strict=True)]
    )
    expected = by_hand(np.concatenate([each.ravel() for each in maps]), truth.astype(int))
    found = values_of(pixel_figures(count_pixels(lambda i: maps[i], lambda i: masks[i], len(masks))))
    for name in ("auroc", "average_precision", "best_f1"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.parametrize("levels", [6, 40, None])
def test_overlap_is_that_of_every_threshold(levels):
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
    found = pixel_figures(count_pixels(lambda i: maps[i], lambda i: masks[i], len(masks)))["aupro"]
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
        figures = pixel_figures(count_pixels(lambda _, n=normal, a=anomalous: np.array([[n, a]]), lambda _: mask, 1))
        assert figures["auroc"].value == area
    constant = values_of(image_figures(np.ones(8), np.array([0, 0, 0, 0, 0, 0, 1, 1])))
    assert constant == pytest.approx(
        {"auroc": 0.5, "average_precision": 0.25, "best_f1": 0.4, "pb2": 0.0, "pg2": 0.0}, abs=1e-12
    )


def test_figures_need_both_kinds_of_items():
    scores = np.array([0.1, 0.2])
    for labels in (np.array([0, 0]), np.array([1, 1])):
        assert all(math.isnan(figure.value) for figure in image_figures(scores, labels).values())
    assert all(math.isnan(figure.value) for figure in image_figures(scores[:0], np.array([], int)).values())
    one = np.ones((2, 2))
    for masks in ([None, None], [np.zeros((2, 2), bool)], [np.ones((2, 2), bool)], []):
        figures = pixel_figures(count_pixels(lambda _: one, masks.__getitem__, len(masks)))
        assert all(math.isnan(figure.value) for figure in figures.values())


def test_what_is_no_number_is_refused():
    with pytest.raises(SprueError, match="1 of 2 scores are no numbers"):
        image_figures(np.array([0.1, np.nan]), np.array([0, 1]))
    with pytest.raises(SprueError, match=r"labels are 0 \(good\) or 1"):
        image_figures(np.array([0.1, 0.2]), np.array([0, 2]))
    with pytest.raises(SprueError, match="picture 1: its anomaly map holds values that are no numbers"):
        pixel_figures(count_pixels(lambda i: np.full((2, 2), np.nan if i else 0.0), lambda _: None, 2))
    with pytest.raises(SprueError, match="picture 0: its mask holds uint8"):
        pixel_figures(count_pixels(lambda _: np.ones((2, 2)), lambda _: np.ones((2, 2), np.uint8), 1))
    with pytest.raises(SprueError, match=r"picture 0: its map is \(2, 2\), its mask \(2, 3\)"):
        pixel_figures(count_pixels(lambda _: np.ones((2, 2)), lambda _: np.ones((2, 3), bool), 1))


def test_intervals_hold_what_other_test_splits_give():
    """Of test splits of 300 each, the interval holds the truth in about 95 %, and is no wider than that takes."""
    apart, splits = 1.5, 40
    truth = {"auroc": norm.cdf(apart / math.sqrt(2)), "pb2": norm.cdf(apart - norm.ppf(0.98))}
    held, widths, values = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0.0), {name: [] for name in truth}
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        labels_N = np.repeat([0, 1], 300)
        figures = image_figures(rng.normal(size=600) + apart * labels_N, labels_N)
        for name, true in truth.items():
            held[name] += figures[name].low <= true <= figures[name].high
            widths[name] += (figures[name].high - figures[name].low) / splits
            values[name].append(figures[name].value)
    for name in truth:
        assert held[name] >= 0.8 * splits
        assert widths[name] == pytest.approx(2 * norm.ppf(0.975) * np.std(values[name]), rel=0.5)


def test_a_figure_lies_in_its_interval_and_bins_are_nearly_exact():
    """Few anomalous pixels, far above the others or among them, and a column that is the same in all pictures."""
    rng = np.random.default_rng(0)
    masks = [np.zeros((64, 64), bool) for _ in range(40)]
    for mask in masks[:10]:
        mask[10:12, 20:22] = True
    for apart in (0.5, 3.0, 20.0):
        maps = [rng.normal(size=(64, 64)).astype(np.float32) + apart * mask for mask in masks]
        for map_HW in maps:
            map_HW[:, 0] = 2.0
        counts = count_pixels(lambda i, maps=maps: maps[i], lambda i: masks[i], 40)
        binned = Curve.of_bins(np.cumsum(counts.found_NQ.sum(0)), np.cumsum(counts.alarms_NQ.sum(0)))
        for name, measure in OF_CURVE.items():
            assert float(measure(binned)) == pytest.approx(float(measure(counts.curve)), abs=0.02), name
        for figure in pixel_figures(counts).values():
            assert figure.low <= figure.value <= figure.high


def test_pixels_are_counted_in_memory_that_does_not_grow_with_the_pictures(monkeypatch):
    def peak(pictures):
        tracemalloc.start()
        count_pixels(lambda i: np.random.default_rng(i).normal(size=(200, 200)), lambda _: None, pictures)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    monkeypatch.setattr(pixels, "CHUNK", 100_000)
    one_map = 200 * 200 * 8
    assert peak(60) - peak(20) < 5 * one_map


@pytest.mark.parametrize("scores", [[np.inf, np.inf, 0, 0], [1, 1, -np.inf, -np.inf]])
@pytest.mark.parametrize("labels", [[1, 0, 0, 1], [0, 1, 0, 1]])
def test_infinite_scores_are_tied_with_one_another(scores, labels):
    assert image_figures(np.array(scores, float), np.array(labels))["auroc"].value == 0.5


def test_scores_of_any_real_type_are_ranked_alike():
    labels = np.array([1, 0, 0, 1])
    for dtype in (np.uint8, np.int64, np.float16):
        assert image_figures(np.array([0, 1, 2, 3], dtype), labels)["auroc"].value == 0.5
    assert image_figures(np.array([True, False, False, True]), labels)["auroc"].value == 1.0


def test_a_share_has_its_exact_interval():
    assert math.isnan(share(np.array([], bool)).value)
    none_of_ten = share(np.zeros(10, bool))
    assert (none_of_ten.value, none_of_ten.low) == (0.0, 0.0)
    assert none_of_ten.high == pytest.approx(1 - 0.025 ** (1 / 10))


def command(path):
    return subprocess.run(
        [sys.executable, "-m", "sprue.evaluation", str(path)], capture_output=True, text=True, check=False
    )


def test_the_command_prints_all_figures(tmp_path):
    rng = np.random.default_rng(0)
    labels_N = np.arange(12) % 2
    masks_NHW = rng.random((12, 9, 7)) < 0.2 * labels_N[:, None, None]
    arrays = {
        "scores_N": rng.normal(size=12) + labels_N,
        "labels_N": labels_N,
        "maps_NHW": (rng.normal(size=(12, 9, 7)) + masks_NHW).astype(np.float32),
        "masks_NHW": masks_NHW,
    }
    np.savez(tmp_path / "all.npz", **arrays)
    done = command(tmp_path / "all.npz")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["image_auroc"] == pytest.approx(roc_auc_score(labels_N, arrays["scores_N"]))
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks_NHW.ravel(), arrays["maps_NHW"].ravel()))
    assert set(found["intervals"]) == set(found) - {"intervals"}
    assert all(low <= high for low, high in found["intervals"].values())

    np.savez(tmp_path / "good.npz", scores_N=arrays["scores_N"], labels_N=np.zeros(12))
    done = command(tmp_path / "good.npz")
    assert json.loads(done.stdout)["image_auroc"] is None


PAIR = {"scores_N": np.arange(2.0), "labels_N": np.array([0, 1])}


@pytest.mark.parametrize(
    ("arrays", "culprit"),
    [
        ({"scores_N": np.ones(2)}, "holds no labels_N"),
        ({"scores_N": np.ones(2), "labels_N": np.array([0, 1]), "maps_NHW": np.ones((2, 3, 3))}, "holds no masks_NHW"),
        ({"scores_N": np.ones(3), "labels_N": np.array([0, 1])}, "lists of one length"),
        ({"scores_N": np.ones((2, 1)), "labels_N": np.array([[0], [1]])}, "lists of one length"),
        ({"scores_N": np.array(["a", "b"]), "labels_N": np.array([0, 1])}, "scores_N does not hold real numbers"),
        (PAIR | {"maps_NHW": np.ones((3, 2, 2)), "masks_NHW": np.ones((3, 2, 2))}, "for each of the 2 scores"),
        (PAIR | {"maps_NHW": np.ones((2, 2, 2)), "masks_NHW": np.full((2, 2, 2), np.nan)}, "masks_NHW holds NaN"),
        (None, "can't be read as an .npz file"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_file(tmp_path, arrays, culprit):
    path = tmp_path / "file.npz"
    if arrays is None:
        path.write_bytes(b"no archive")
    else:
        np.savez(path, **arrays)
    done = command(path)
    assert done.returncode == 1
    assert done.stderr.startswith("sprue.evaluation: ")
    assert culprit in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_difference_of_two_detectors_is_drawn_for_both_alike():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    one = rng.normal(size=120) + labels
    figure = auroc_difference(one, one + 1e-9 * rng.normal(size=120), labels)
    assert figure.value == pytest.approx(0, abs=1e-3)
    assert figure.high - figure.low < 0.01  # not that of two detectors that were judged on different pictures
    other = rng.normal(size=120)
    figure = auroc_difference(one, other, labels)
    assert figure.value == pytest.approx(roc_auc_score(labels, one) - roc_auc_score(labels, other))
    assert 0 < figure.low < figure.value < figure.high
    reverse = auroc_difference(other, one, labels)
    assert (reverse.value, reverse.low) == (pytest.approx(-figure.value), pytest.approx(-figure.high, abs=0.01))
    with pytest.raises(SprueError, match="no numbers"):
        auroc_difference(one, np.full(120, np.nan), labels)


def test_variants_of_one_picture_are_drawn_together():
    # Five samples of each picture, of which all or none are judged better: there are as many opinions as pictures.
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(12), 5), np.tile([0, 1, 1, 1, 1], 12)
    one = labels + 0.1 * rng.normal(size=60)
    other = np.where((groups % 3 == 0) & (labels == 1), -1.0, one)
    together, apart = (auroc_difference(one, other, labels, each) for each in (groups, None))
    assert together.value == apart.value > 0.2
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
