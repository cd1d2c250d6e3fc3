"""Metrics of a file of scores and maps, and what is wrong with a file that has none."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sprue.errors import SprueError
from sprue.evaluation.metrics_file import as_json, metrics_of_file


def test_all_metrics_are_written_as_json(tmp_path):
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
    found = json.loads(as_json(metrics_of_file(tmp_path / "all.npz")))
    assert found["sample_auroc"] == pytest.approx(roc_auc_score(labels_N, arrays["scores_N"]))
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks_NHW.ravel(), arrays["maps_NHW"].ravel()))
    assert set(found["intervals"]) == set(found) - {"intervals"}
    assert all(low <= high for low, high in found["intervals"].values())

    np.savez(tmp_path / "good.npz", scores_N=arrays["scores_N"], labels_N=np.zeros(12))
    assert json.loads(as_json(metrics_of_file(tmp_path / "good.npz")))["sample_auroc"] is None


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
def test_the_error_says_what_is_wrong_with_a_file(tmp_path, arrays, culprit):
    path = tmp_path / "file.npz"
    if arrays is None:
        path.write_bytes(b"no archive")
    else:
        np.savez(path, **arrays)
    with pytest.raises(SprueError) as caught:
        metrics_of_file(path)
    assert culprit in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
