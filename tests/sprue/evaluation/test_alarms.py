"""The number of false alarms is distributed as the guarantee says."""

import numpy as np
import pytest

from sprue.evaluation.alarms import chance_of, false_alarms
from sprue.inference.calibration import Calibration


@pytest.mark.parametrize(("count", "alpha"), [(19, 0.05), (39, 0.05), (77, 0.1), (150, 0.01)])
def test_simulated_calibrations_follow_the_distribution(count, alpha):
    rng, good = np.random.default_rng(0), 40
    alarms = []
    for _ in range(4000):
        calibration = Calibration(tuple(np.sort(rng.normal(size=count))), alpha, low=0.0, high=1.0)
        alarms.append(int((calibration.p_values(rng.normal(size=good)) <= alpha).sum()))
    expected = false_alarms(count, alpha, good)
    assert np.mean(alarms) == pytest.approx(expected.mean(), rel=0.1)
    assert expected.mean() <= alpha * good + 1e-9
    for alarm in range(0, 8, 2):
        assert np.mean([each >= alarm for each in alarms]) == pytest.approx(
            chance_of(alarm, count, alpha, good), abs=0.03
        )
