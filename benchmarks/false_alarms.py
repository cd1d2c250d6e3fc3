"""What the two guarantees of a threshold are worth: ``python benchmarks/false_alarms.py [STORE ...]``.

Calibrates many times on other samples and prints, for each size of the calibration set, alpha and guarantee:

- the mean false-alarm rate over calibrations, which the marginal guarantee bounds by alpha;
- the fraction of calibrations whose rate is above alpha, which the conditional guarantee bounds by 5 %;
- beside both, what the Beta law of continuous scores says.

The first part draws uniform scores, for which a threshold's true rate is known exactly; any other continuous
distribution gives the same ranks. The second part splits real scores at random: those of the good samples of each class
of the STOREs, the calibration and the test split together. A STORE is a dataset's part of the store, as `sprue run`
leaves it. There the rate is counted on the samples left over, so it scatters more than the true one, and its law is
beta-binomial: the conditional guarantee bounds the true rate alone. Random splits make the samples exchangeable, so
this part tests what ties and real distributions do, and not whether test samples are like the training ones;
`benchmarks/coverage.py` does that.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import beta

from sprue.config import Guarantee
from sprue.inference.calibration import Calibration, calibration_samples_needed
from sprue.release.false_alarms import false_alarms

ALPHAS = (0.01, 0.05, 0.1)
GUARANTEES: tuple[Guarantee, ...] = ("marginal", "conditional")


def calibrated(scores_N: NDArray[np.float64], alpha: float, guarantee: Guarantee) -> Calibration:
    """A calibration without position scores."""
    return Calibration(tuple(np.sort(scores_N).tolist()), alpha, 0.0, 1.0, 1.0, guarantee)


def measure(
    samples: int,
    rate_of: Callable[[float, Guarantee], tuple[Calibration, float]],
    exceeds: Callable[[Calibration], float],
    repeats: int,
) -> list[dict[str, object]]:
    """A row for each alpha and guarantee that this number of calibration samples suffices for.

    `rate_of` calibrates on a new set and returns its false-alarm rate; `exceeds` is the probability that it exceeds
    alpha by the law of continuous scores.
    """
    rows: list[dict[str, object]] = []
    for alpha, guarantee in itertools.product(ALPHAS, GUARANTEES):
        if samples < calibration_samples_needed(alpha, guarantee):
            continue
        found = [rate_of(alpha, guarantee) for _ in range(repeats)]
        calibration, rates = found[0][0], np.array([rate for _, rate in found])
        low, high = calibration.false_alarm_rates
        facts = {"calibration": samples, "alpha %": 100 * alpha, "guarantee": guarantee, "rank": calibration.rank}
        means = {"mean %": 100 * rates.mean(), "law": 100 * calibration.rank / (samples + 1)}
        # Counted rates of exactly alpha do not exceed it.
        above = {"above alpha %": 100 * (rates > alpha + 1e-9).mean(), "law ": 100 * exceeds(calibration)}
        rows.append(facts | means | above | {"90 % lie between": f"{100 * low:.2f} and {100 * high:.2f}"})
    return rows


def simulated(samples: int, repeats: int, rng: np.random.Generator) -> list[dict[str, object]]:
    """Of uniform scores."""

    def rate_of(alpha: float, guarantee: Guarantee) -> tuple[Calibration, float]:
        calibration = calibrated(rng.uniform(size=samples), alpha, guarantee)
        return calibration, 1 - calibration.threshold

    def exceeds(calibration: Calibration) -> float:
        return float(beta.sf(calibration.alpha, calibration.rank, samples + 1 - calibration.rank))

    return measure(samples, rate_of, exceeds, repeats)


def split(pool_N: NDArray[np.float64], samples: int, repeats: int, rng: np.random.Generator) -> list[dict[str, object]]:
    """Of random splits of real scores."""

    def rate_of(alpha: float, guarantee: Guarantee) -> tuple[Calibration, float]:
        shuffled_N = rng.permutation(pool_N)
        calibration = calibrated(shuffled_N[:samples], alpha, guarantee)
        return calibration, float(calibration.is_anomalous(shuffled_N[samples:]).mean())

    def exceeds(calibration: Calibration) -> float:
        good = len(pool_N) - samples
        return float(false_alarms(calibration, good).sf(math.floor(calibration.alpha * good + 1e-9)))

    return measure(samples, rate_of, exceeds, repeats)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", type=Path, nargs="*", help="a dataset's part of the store, such as store/tiles")
    parser.add_argument("--calibration", type=int, nargs="+", default=[19, 59, 99, 299, 1000], metavar="SAMPLES")
    parser.add_argument("--repeats", type=int, default=2000, help="calibrations for each row (default: %(default)s)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = [row for samples in arguments.calibration for row in simulated(samples, arguments.repeats, rng)]
    print(f"uniform scores\n{pd.DataFrame(rows).round(2).to_string(index=False)}")
    for path in (path for store in arguments.stores for path in sorted(store.glob("detectors/*/detector.json"))):
        scores = pd.read_csv(path.parents[2] / "evaluation" / path.parent.name / "scores.csv")
        held = json.loads(path.read_text())["calibration"]["scores"]
        pool_N = np.concatenate([held, scores.loc[scores["label"] == 0, "score"]])
        sizes = [samples for samples in arguments.calibration if samples < len(pool_N)]
        rows = [row for samples in sizes for row in split(pool_N, samples, arguments.repeats, rng)]
        print(f"\n{path.parent.name}, {len(pool_N)} good samples\n{pd.DataFrame(rows).round(2).to_string(index=False)}")


if __name__ == "__main__":
    main()
