"""The training loop: what it learns, what it refuses, and that an interruption changes no weight.

Shapes: N images, C channels, H rows, W columns of a map.
"""

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from upath import UPath

from defectflow import build_flow
from sprue.config import FitSettings
from sprue.errors import SprueError
from sprue.training.checkpoint import Checkpoint
from sprue.training.dataloader import InMemoryDataLoader
from sprue.training.loop import VERSION, mean_nll, rate_at, train, trains_in_bfloat16

CPU = torch.device("cpu")
SETTINGS = FitSettings(epochs=5, batch_size=4, learning_rate=0.02, weight_decay=1e-4, seed=3)


def changed(**settings):
    return SETTINGS.model_copy(update=settings)


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

    training = InMemoryDataLoader(train_maps or stored(14, seed=1))
    validation = InMemoryDataLoader(validation_maps or stored(6, seed=2))
    train(new_flow(), training, validation, settings, CPU, keep, start)
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


def test_fitting_raises_the_likelihood_of_images_it_has_not_seen():
    flow = new_flow().fit_adaptor([[each.float() for each in stored(60, seed=1)]])
    before = mean_nll(flow, InMemoryDataLoader(stored(6, seed=2)), 4, CPU)
    reports = fit(changed(epochs=12), train_maps=stored(60, seed=1))
    assert reports[-1][0].validation_nll < before - 0.1
    epochs = [epoch for epoch, _ in reports]
    assert [epoch.epoch for epoch in epochs] == list(range(1, 13))
    assert all(epoch.images_per_second == pytest.approx(60 / epoch.seconds) for epoch in epochs)
    assert [epoch.time for epoch in epochs] == sorted(epoch.time for epoch in epochs)


def test_the_validation_likelihood_is_that_of_the_checkpoint():
    epoch, checkpoint = fit()[-1]
    flow = new_flow()
    flow.load_state_dict(checkpoint.flow)
    assert epoch.validation_nll == mean_nll(flow, InMemoryDataLoader(stored(6, seed=2)), 4, CPU)


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
    settings = changed(epochs=40, learning_rate=0.3, schedule="constant", warmup=0.0, patience=3)
    reports = fit(settings)
    nlls = [epoch.validation_nll for epoch, _ in reports]
    assert len(reports) < 40
    assert len(nlls) - 1 - nlls.index(min(nlls)) == 3
    assert fit(settings, start=reports[-1][1]) == []
    assert len(fit(settings, start=reports[0][1])) == len(reports) - 1


def test_a_finished_fit_stays_as_it_is():
    finished = fit()[-1][1]
    assert fit(start=finished) == []


def test_the_seed_decides():
    assert_same_weights(fit()[-1][1].flow, fit()[-1][1].flow)
    other = fit(changed(seed=4))[-1][1].flow
    assert any(not torch.equal(value, other[key]) for key, value in fit()[-1][1].flow.items())


def test_a_checkpoint_is_safetensors_and_json_and_reads_back(tmp_path):
    epoch, checkpoint = fit(changed(epochs=2))[-1]
    checkpoint.write(UPath(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"flow.safetensors", "optimizer.safetensors", "epoch.json"}
    assert json.loads((tmp_path / "epoch.json").read_text())["history"][-1] == asdict(epoch)
    read = Checkpoint.read(UPath(tmp_path))
    assert (read.epoch, read.history) == (2, checkpoint.history)
    assert_same_weights(read.flow, checkpoint.flow)
    assert_same_weights(read.optimizer, checkpoint.optimizer)


def test_a_checkpoint_does_not_change_while_the_fit_continues():
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
        fit(changed(epochs=30, learning_rate=1e20, gradient_norm=1e30))


PINNED = {
    2: [(1.406775849, 1.411689679, -0.896508824), (1.394080673, 1.410248121, -2.099024527)],
}
"""By `VERSION`, for each of two epochs in float32: both likelihoods, and the weights' product with a ramp."""


def test_other_weights_need_another_version():
    found = []
    for epoch, checkpoint in fit(changed(epochs=2, precision="float32")):
        values = [value.double().flatten() for value in checkpoint.flow.values() if value.is_floating_point()]
        product = sum(float(value @ torch.linspace(-1, 1, len(value), dtype=torch.float64)) for value in values)
        found.append((epoch.train_nll, epoch.validation_nll, product))
    assert found == [pytest.approx(expected, rel=1e-5) for expected in PINNED[VERSION]]


def test_bfloat16_learns_what_float32_does_and_resumes_bit_for_bit():
    precise, rounded = (fit(changed(precision=precision)) for precision in ("float32", "bfloat16"))
    assert [epoch.validation_nll for epoch, _ in rounded] == pytest.approx(
        [epoch.validation_nll for epoch, _ in precise], rel=1e-2
    )
    assert any(not torch.equal(value, rounded[-1][1].flow[key]) for key, value in precise[-1][1].flow.items())
    assert all(value.dtype != torch.bfloat16 for value in rounded[-1][1].flow.values())
    resumed = fit(changed(precision="bfloat16"), start=rounded[1][1])
    assert_same_weights(resumed[-1][1].flow, rounded[-1][1].flow)


@pytest.mark.parametrize(
    ("precision", "capabilities", "expected"),
    [
        ("auto", {"avx512_bf16": True}, True),
        ("auto", {"amx_bf16": True, "avx512_bf16": False}, True),
        ("auto", {"avx2": True}, False),
        ("float32", {"avx512_bf16": True}, False),
        ("bfloat16", {}, True),
    ],
)
def test_the_precision_follows_the_hardware_unless_it_is_set(monkeypatch, precision, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert trains_in_bfloat16(changed(precision=precision), CPU) is expected
    assert trains_in_bfloat16(changed(precision="auto"), torch.device("cuda"))


def fitted(flow, start=None, settings=SETTINGS, synthetic=None):
    """Fits a flow; the checkpoints."""
    checkpoints = []
    train(
        flow,
        InMemoryDataLoader(stored(14, seed=1)),
        InMemoryDataLoader(stored(6, seed=2)),
        settings,
        CPU,
        lambda _, checkpoint: checkpoints.append(checkpoint),
        start,
        synthetic=InMemoryDataLoader(synthetic) if synthetic else None,
    )
    return checkpoints


def test_the_baseline_is_fitted_in_one_pass_although_nothing_is_trained():
    (checkpoint,) = fitted(build_flow("gaussian", channels=(3, 4)), settings=changed(epochs=1))
    batches = InMemoryDataLoader(stored(14, seed=1)).ordered(SETTINGS.batch_size)
    flow = build_flow("gaussian", channels=(3, 4)).fit_adaptor([each.float() for each in batch] for batch in batches)
    assert_same_weights(checkpoint.flow, flow.state_dict())
    assert math.isfinite(checkpoint.history[0]["validation_nll"])


def test_unseen_images_without_a_defect_get_no_member_more_weight():
    """All members score unseen images higher than those that they were fitted on, which says nothing of defects."""
    config = {"channels": (3, 4), "maps": (1,), "hidden": 4, "steps": 2, "gaussians": ((0,),), "noise": 0.1}
    validation, checkpoints = stored(2, seed=2), []
    train(
        build_flow("fusion", **config),
        InMemoryDataLoader(stored(14, seed=1)),
        InMemoryDataLoader(validation),
        changed(epochs=1),
        CPU,
        lambda _, checkpoint: checkpoints.append(checkpoint),
        synthetic=InMemoryDataLoader(validation),
    )
    assert checkpoints[0].flow["weight"].tolist() == [1, 1]


def test_a_fusion_is_standardised_by_unseen_images_weighed_by_synthetic_defects_and_resumes_bit_for_bit():
    torch.manual_seed(0)
    config = {"channels": (3, 4), "maps": (1,), "hidden": 4, "steps": 2, "gaussians": ((0,),), "noise": 0.1}
    flow = build_flow("fusion", **config)
    synthetic = stored(8, seed=3)
    synthetic[0] += 5  # which the Gaussian alone reads
    checkpoints = fitted(flow, synthetic=synthetic)
    resumed = fitted(build_flow("fusion", **config), start=checkpoints[1], synthetic=synthetic)
    assert_same_weights(resumed[-1].flow, checkpoints[-1].flow)
    flow.load_state_dict(checkpoints[-1].flow)
    before = flow.get_buffer("image_scale").clone()
    flow.standardise([[each.float() for each in stored(6, seed=2)]])
    torch.testing.assert_close(flow.get_buffer("image_scale"), before)
    cs_flow, gaussian = flow.get_buffer("weight").tolist()
    assert cs_flow < gaussian == 1
