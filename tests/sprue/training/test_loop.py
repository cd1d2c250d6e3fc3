"""The training loop: what it learns, what it refuses, and that an interruption leaves no trace.

Shapes: N pictures, C channels, H rows, W columns of a map.
"""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from upath import UPath

from defectflow import build_flow
from sprue.errors import SprueError
from sprue.training.checkpoint import Checkpoint
from sprue.training.feed import MemoryFeed
from sprue.training.loop import FitSettings, mean_nll, rate_at, train

CPU = torch.device("cpu")
SETTINGS = FitSettings(epochs=5, batch_size=4, learning_rate=0.02, weight_decay=1e-4, seed=3)


def stored(count, seed):
    """Float16 maps of two sizes whose values lie on a curved surface, as no Gaussian's do."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for channels, side in ((3, 8), (4, 4)):
        hidden = torch.randn(count, channels, side, side, generator=generator)
        hidden[:, 1:] = hidden[:, 1:] * 0.2 + hidden[:, :1].square()
        maps.append(hidden.to(torch.float16))
    return maps


def new_flow(seed=0):
    """Noise and stride draw random numbers in every step."""
    torch.manual_seed(seed)
    return build_flow(
        "patchflow", channels=(3, 4), adapted=7, bottleneck=16, steps=2, neighbourhood=1, noise=0.05, stride=2
    )


def fit(settings=SETTINGS, start=None, report=None, train_maps=None, validation_maps=None):
    """Fits a new flow; the reports, newest last."""
    reports = []

    def keep(epoch, checkpoint):
        reports.append((epoch, checkpoint))
        if report is not None:
            report(epoch, checkpoint)

    feeds = MemoryFeed(train_maps or stored(14, seed=1)), MemoryFeed(validation_maps or stored(6, seed=2))
    train(new_flow(), *feeds, settings, CPU, keep, start)
    return reports


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_the_rate_rises_linearly_and_falls_to_zero_as_a_cosine():
    settings = FitSettings(learning_rate=0.5, warmup=0.25)
    rates = [rate_at(step, 100, settings) for step in range(100)]
    assert rates[:25] == pytest.approx([0.5 * (step + 1) / 25 for step in range(25)])
    assert max(rates) == 0.5
    assert all(later < earlier for earlier, later in pairwise(rates[25:]))
    assert rates[62] == pytest.approx(0.25, abs=0.01)
    assert 0 < rates[-1] < 0.001
    unwarmed = [rate_at(step, 10, FitSettings(learning_rate=0.5, warmup=0.0)) for step in range(10)]
    assert unwarmed[0] == 0.5
    # A warm-up of less than a step is none.
    assert rate_at(0, 1, FitSettings(learning_rate=0.5, warmup=0.9)) == 0.5


def test_fitting_raises_the_likelihood_of_pictures_it_has_not_seen():
    flow = new_flow().fit_adaptor([[each.float() for each in stored(60, seed=1)]])
    before = mean_nll(flow, MemoryFeed(stored(6, seed=2)), 4, CPU)
    reports = fit(replace(SETTINGS, epochs=12), train_maps=stored(60, seed=1))
    assert reports[-1][0].validation_nll < before - 0.1
    epochs = [epoch for epoch, _ in reports]
    assert [epoch.epoch for epoch in epochs] == list(range(1, 13))
    assert all(epoch.pictures_per_second == pytest.approx(60 / epoch.seconds) for epoch in epochs)
    assert [epoch.time for epoch in epochs] == sorted(epoch.time for epoch in epochs)


def test_the_validation_figure_is_that_of_the_checkpoint():
    epoch, checkpoint = fit()[-1]
    flow = new_flow()
    flow.load_state_dict(checkpoint.flow)
    assert epoch.validation_nll == mean_nll(flow, MemoryFeed(stored(6, seed=2)), 4, CPU)


def test_an_interrupted_fit_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    undisturbed = fit()

    def interrupt(epoch, checkpoint):
        checkpoint.write(UPath(tmp_path))
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(report=interrupt)
    torch.manual_seed(99)
    resumed = fit(start=Checkpoint.read(UPath(tmp_path)))
    assert [epoch.epoch for epoch, _ in resumed] == [3, 4, 5]
    ours, theirs = resumed[-1][1], undisturbed[-1][1]
    assert_same_weights(ours.flow, theirs.flow)
    assert_same_weights(ours.optimizer, theirs.optimizer)
    timeless = [
        [
            {name: row[name] for name in ("epoch", "train_nll", "validation_nll", "learning_rate")}
            for row in each.history
        ]
        for each in (ours, theirs)
    ]
    assert timeless[0] == timeless[1]


def test_patience_ends_a_fit_that_gets_no_better():
    # A rate that only falls apart: validation is best early, and no epoch improves on it.
    settings = replace(SETTINGS, epochs=40, learning_rate=0.3, schedule="constant", warmup=0.0, patience=3)
    reports = fit(settings)
    figures = [epoch.validation_nll for epoch, _ in reports]
    assert len(reports) < 40
    assert len(figures) - 1 - figures.index(min(figures)) == 3
    assert fit(settings, start=reports[-1][1]) == []
    assert len(fit(settings, start=reports[0][1])) == len(reports) - 1


def test_a_finished_fit_is_left_as_it_is():
    finished = fit()[-1][1]
    assert fit(start=finished) == []


def test_the_seed_decides():
    assert_same_weights(fit()[-1][1].flow, fit()[-1][1].flow)
    other = fit(replace(SETTINGS, seed=4))[-1][1].flow
    assert any(not torch.equal(value, other[key]) for key, value in fit()[-1][1].flow.items())


def test_a_checkpoint_is_safetensors_and_json_and_reads_back(tmp_path):
    epoch, checkpoint = fit(replace(SETTINGS, epochs=2))[-1]
    checkpoint.write(UPath(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"flow.safetensors", "optimizer.safetensors", "epoch.json"}
    assert json.loads((tmp_path / "epoch.json").read_text())["history"][-1] == asdict(epoch)
    read = Checkpoint.read(UPath(tmp_path))
    assert (read.epoch, read.history) == (2, checkpoint.history)
    assert_same_weights(read.flow, checkpoint.flow)
    assert_same_weights(read.optimizer, checkpoint.optimizer)


def test_a_checkpoint_does_not_change_with_the_fit_that_goes_on():
    first, *_, last = [checkpoint for _, checkpoint in fit()]
    assert len(first.history) == 1
    assert any(not torch.equal(value, last.flow[key]) for key, value in first.flow.items())


def test_a_likelihood_that_is_not_finite_stops_the_fit():
    broken = stored(6, seed=2)
    broken[0][3, 1, 2, 2] = math.inf
    seen = []
    with pytest.raises(SprueError, match=r"stopped being finite in epoch 1 .*lower fit\.learning_rate"):
        fit(validation_maps=broken, report=lambda epoch, _: seen.append(epoch))
    assert seen == []
    with pytest.raises(SprueError, match="stopped being finite"):
        fit(replace(SETTINGS, epochs=30, learning_rate=1e20, gradient_norm=1e30))


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"epochs": 0}, "epochs and batch_size are at least 1; got 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "learning_rate and gradient_norm are above 0"),
        ({"gradient_norm": 0.0}, "learning_rate and gradient_norm are above 0"),
        ({"warmup": 1.0}, "warmup from 0 to below 1"),
        ({"patience": -1}, "patience is not below 0"),
        ({"workers": 0}, "workers is at least 1"),
        ({"memory": 0.0}, "memory is above 0; got 0, 1 and 0.0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, match):
    with pytest.raises(SprueError, match=match):
        FitSettings(**setting)
