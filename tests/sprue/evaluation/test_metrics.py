"""Areas under the curve equal scikit-learn's, ties and all."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sprue.evaluation.metrics import image_auroc, pixel_auroc


@pytest.mark.parametrize("levels", [3, 20, None])
def test_both_areas_equal_scikit_learns(levels):
    """With few levels nearly all values are tied."""
    rng = np.random.default_rng(0)
    draw = (
        (lambda size: rng.normal(size=size))
        if levels is None
        else (lambda size: rng.integers(0, levels, size) / levels)
    )
    labels_N = rng.integers(0, 2, 60)
    scores_N = draw(60) + 0.3 * labels_N
    assert image_auroc(scores_N, labels_N) == pytest.approx(roc_auc_score(labels_N, scores_N), abs=1e-12)

    sizes = [(20, 31), (64, 8), (5, 5), (1, 40), (33, 17)]
    maps = [draw(size).astype(np.float32) for size in sizes]
    # A good picture, one with an empty mask, one that is all defect, two with parts.
    masks = [None, np.zeros(sizes[1], bool), np.ones(sizes[2], bool), *(rng.random(size) < 0.2 for size in sizes[3:])]
    truth = np.concatenate(
        [(np.zeros(m.shape, bool) if t is None else t).ravel() for m, t in zip(maps, masks, strict=True)]
    )
    expected = roc_auc_score(truth, np.concatenate([each.ravel() for each in maps]))
    assert pixel_auroc(lambda i: maps[i], masks) == pytest.approx(expected, abs=1e-12)


def test_the_ends_of_the_scale():
    mask = np.array([[False, True]])
    assert pixel_auroc(lambda _: np.array([[0.0, 1.0]]), [mask]) == 1.0
    assert pixel_auroc(lambda _: np.array([[1.0, 0.0]]), [mask]) == 0.0
    assert pixel_auroc(lambda _: np.array([[1.0, 1.0]]), [mask]) == 0.5


def test_one_label_alone_has_no_area():
    scores = np.array([1.0, 2.0])
    assert math.isnan(image_auroc(scores, np.array([0, 0])))
    assert math.isnan(image_auroc(scores, np.array([1, 1])))
    assert math.isnan(image_auroc(scores[:0], np.array([], int)))
    one = np.ones((2, 2))
    assert math.isnan(pixel_auroc(lambda _: one, [None, None]))
    assert math.isnan(pixel_auroc(lambda _: one, [np.zeros((2, 2), bool)]))
    assert math.isnan(pixel_auroc(lambda _: one, [np.ones((2, 2), bool)]))
    assert math.isnan(pixel_auroc(lambda _: one, []))
