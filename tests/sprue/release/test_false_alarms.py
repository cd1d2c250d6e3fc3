"""The number of false alarms is distributed as the guarantee says."""

import numpy as np
import pytest

from sprue.inference.calibration import Calibration
from sprue.release.false_alarms import chance_of, false_alarms


def calibrated(scores, alpha, guarantee):
    return Calibration(tuple(np.sort(scores)), alpha, low=0.0, high=1.0, pixel_threshold=1.0, guarantee=guarantee)


@pytest.mark.parametrize(
    ("count", "alpha", "guarantee"),
    [
        (19, 0.05, "marginal"),
        (39, 0.05, "marginal"),
        (77, 0.1, "marginal"),
        (150, 0.01, "marginal"),
        (77, 0.1, "conditional"),
        (150, 0.05, "conditional"),
    ],
)
def test_simulated_calibrations_follow_the_distribution(count, alpha, guarantee):
    rng, good = np.random.default_rng(0), 40
    alarms = []
    for _ in range(4000):
        calibration = calibrated(rng.normal(size=count), alpha, guarantee)
        alarms.append(int(calibration.is_anomalous(rng.normal(size=good)).sum()))
    expected = false_alarms(calibration, good)
    assert np.mean(alarms) == pytest.approx(expected.mean(), rel=0.1)
    assert expected.mean() <= alpha * good + 1e-9
    for alarm in range(0, 8, 2):
        assert np.mean([each >= alarm for each in alarms]) == pytest.approx(
            chance_of(alarm, calibration, good), abs=0.03
        )
