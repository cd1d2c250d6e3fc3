"""The report of a search: its trials as a table and a chart, and which settings mattered."""

import io
import warnings
from collections.abc import Mapping

import matplotlib
import optuna
import pandas as pd
from matplotlib import pyplot
from optuna.distributions import BaseDistribution

from sprue.search.record import SearchRecord

matplotlib.use("agg")
ENOUGH_TRIALS = 8
"""With fewer trials, importances are chance."""

OBJECTIVE = "AUROC of synthetic defects"


def trials_table(record: SearchRecord) -> pd.DataFrame:
    """One row a trial: its values, its epochs, the metrics of the best one, and how it ended."""
    return pd.DataFrame(
        {
            "trial": trial.number,
            **trial.point,
            "epochs": len(trial.history),
            "validation_nll": trial.best["validation_nll"] if trial.history else float("nan"),
            "objective": trial.objective,
            "end": trial.failure
            or ("best" if trial.number == record.best else "completed" if trial.completed else "stopped"),
        }
        for trial in record.trials
    )


def study_of(record: SearchRecord, space: Mapping[str, BaseDistribution]) -> optuna.Study:
    """The trials as Optuna's visualizations read them; stopped trials count with their last objective."""
    study = optuna.create_study(direction="maximize")
    for trial in record.trials:
        if trial.history:
            study.add_trial(
                optuna.trial.create_trial(params=dict(trial.point), distributions=dict(space), value=trial.objective)
            )
    return study


def importances(record: SearchRecord, space: Mapping[str, BaseDistribution]) -> dict[str, float]:
    """Fraction of the objective's variance that each setting explains, by Optuna's fANOVA; none with too few trials.

    Source: Hutter, Hoos, Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter Importance" (2014).
    """
    study = study_of(record, space)
    if len(study.trials) < ENOUGH_TRIALS or len({trial.value for trial in study.trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def parallel_coordinates(record: SearchRecord, space: Mapping[str, BaseDistribution]) -> bytes:
    """A PNG with a line for each trial, through its values to its objective."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes = optuna.visualization.matplotlib.plot_parallel_coordinate(study_of(record, space), target_name=OBJECTIVE)
    for lines in axes.collections:
        lines.set_cmap("plasma_r")  # Optuna's own fades to white
    axes.set_title(f"{record.class_name}: {len(record.trials)} trials, the best is trial {record.best}")
    buffer = io.BytesIO()
    figure = pyplot.gcf()
    figure.set_size_inches(11, 5)
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
