"""The summary holds a class's worst errors, with thumbnails that are small files."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from sprue.evaluation.outliers import Outlier
from sprue.evaluation.render import THUMBNAIL_BYTES, THUMBNAIL_SIDE, encoded, thumbnail_size
from sprue.evaluation.summary import FALSE_ALARM, MISS, Summary, write_summary, wrong_samples

OUTLIER = Outlier(sample_id="7", paths=("good/7.png",), score=30.3)


def decided(evaluation, is_anomalous_N):
    """The evaluation with other decisions."""
    predictions = replace(evaluation.predictions, is_anomalous_B=np.array(is_anomalous_N, bool))
    return replace(evaluation, predictions=predictions)


def test_the_worst_errors_are_the_lowest_miss_and_the_highest_false_alarm(bench, tmp_path):
    labels_N = bench.test["label"].to_numpy()
    evaluation = decided(bench.evaluate(bench.test), labels_N == 0)  # all wrong
    scores_N = evaluation.predictions.score_B
    write_summary(evaluation, bench.detector, [OUTLIER], bench.root, tmp_path)
    summary = Summary.read(UPath(tmp_path))
    misses, false_alarms = summary.misses, summary.false_alarms
    assert (misses.count, misses.samples, false_alarms.count, false_alarms.samples) == (12, 12, 12, 12)
    miss = np.flatnonzero(labels_N == 1)[scores_N[labels_N == 1].argmin()]
    alarm = np.flatnonzero(labels_N == 0)[scores_N[labels_N == 0].argmax()]
    assert (misses.path, misses.kind, misses.score) == (f"{miss}.png", "dent", pytest.approx(scores_N[miss]))
    assert (false_alarms.path, false_alarms.score) == (f"{alarm}.png", pytest.approx(scores_N[alarm]))
    assert (summary.flow_name, summary.outliers) == ("patchflow", [OUTLIER])
    for file, errors in ((MISS, misses), (FALSE_ALARM, false_alarms)):
        assert (tmp_path / file).stat().st_size <= THUMBNAIL_BYTES
        with Image.open(tmp_path / file) as image:
            assert image.size == (errors.width, errors.height)
            assert np.asarray(image.convert("RGB")).std() > 10


def test_without_errors_there_are_no_thumbnails(bench, tmp_path):
    evaluation = decided(bench.evaluate(bench.test), bench.test["label"] == 1)
    write_summary(evaluation, bench.detector, [], bench.root, tmp_path)
    summary = Summary.read(UPath(tmp_path))
    assert (summary.misses.count, summary.misses.path, summary.false_alarms.count) == (0, "", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.json"]


def test_wrong_samples_are_sorted_by_how_wrong_they_are(bench):
    evaluation = bench.evaluate(bench.test)
    scores_N, is_anomalous_N = evaluation.predictions.score_B, evaluation.predictions.is_anomalous_B
    labels_N = evaluation.labels_N
    misses = wrong_samples(evaluation, 1)
    assert set(misses) == set(np.flatnonzero((labels_N == 1) & ~is_anomalous_N)) and len(misses) > 1
    assert np.all(np.diff(scores_N[misses]) >= 0)
    flipped = decided(evaluation, ~is_anomalous_N)
    assert np.all(np.diff(scores_N[wrong_samples(flipped, 0)]) <= 0)


@pytest.mark.parametrize("query", ["sample_id == '1'", "sample_id == '11'"], ids=["a mask", "no masks"])
def test_the_view_with_the_defect_is_shown(bench_of_views, tmp_path, query):
    """Sample 1 shows its defect in view 1, though view 0 has a mask, too; sample 11 has no mask."""
    test = bench_of_views.test.query(query)
    evaluation = decided(bench_of_views.evaluate(test), [False])
    write_summary(evaluation, bench_of_views.detector, [], bench_of_views.root, tmp_path)
    sample, view = ("1", 1) if "'1'" in query else ("11", int(evaluation.predictions.image_score_BV[0].argmax()))
    assert Summary.read(UPath(tmp_path)).misses.path == f"{sample}/{bench_of_views.detector.views[view]}.png"


def test_a_thumbnail_of_noise_is_a_small_file_too():
    rng = np.random.default_rng(0)
    rows, columns = THUMBNAIL_SIDE
    noise = Image.fromarray(rng.integers(0, 256, (rows, 2 * columns, 3), dtype=np.uint8))
    assert len(encoded(noise)) <= THUMBNAIL_BYTES
    plain = Image.new("RGB", noise.size, "#888")
    assert len(encoded(plain)) < 1000


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 640), (104, 104)), ((100, 2000), (7, 132)), ((3000, 2), (104, 1))]
)
def test_a_thumbnail_keeps_the_proportions(size, expected):
    assert thumbnail_size(*size) == expected
