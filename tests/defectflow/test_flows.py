"""Properties of every flow: it is invertible, and its likelihood is that of a density.

Shapes: B images, C channels, H rows, W columns of a map.
"""

import pytest
import torch

from defectflow import FLOWS, build_flow
from defectflow.coupling import GraphCoupling
from defectflow.noise import add_noise

CASES = {
    "patchflow": {"channels": (4, 3), "adapted": 6, "bottleneck": 8, "steps": 2},
    "patchflow-conditioned": {
        "channels": (4, 3),
        "adapted": 5,
        "bottleneck": 8,
        "steps": 3,
        "noise": 0.2,
        "noise_scheme": "uniform",
    },
    "patchflow-trained": {"channels": (4, 3), "adaptor": "trained", "adapted": 5, "bottleneck": 8, "steps": 2},
    "csflow": {"channels": (4, 4, 4), "hidden": 6, "steps": 2},
    "csflow-whitened": {
        "channels": (4, 4),
        "hidden": 6,
        "steps": 3,
        "adaptation": "whiten",
        "noise": 0.2,
        "noise_scheme": "softflow",
    },
    "dnfad": {"channels": (4,), "steps": 2, "position_channels": 8},
    "dnfad-noise": {"channels": (3, 2), "steps": 2, "position_channels": 4, "noise": 0.2, "noise_scheme": "uniform"},
    "dnfad-unrectified": {"channels": (4,), "steps": 2, "position_channels": 4, "rectified": ()},
    "multiflow": {"channels": (4,), "views": 5, "hidden": 6, "steps": 2},
    "multiflow-single": {"channels": (4,), "views": 1, "hidden": 6, "steps": 2, "noise": 0.0},
    "multiflow-chain": {"channels": (4,), "views": 3, "neighbours": ((1,), (0, 2), ()), "hidden": 6, "steps": 2},
}


def inputs(case, size=(8, 4), images=2, dtype=torch.float64, seed=1):
    """A flow's input: views of one size, or maps that halve in size."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    name, config = case.split("-")[0], CASES[case]
    if name == "multiflow":
        shapes = [(channels, *size) for _ in range(config["views"]) for channels in config["channels"]]
    else:
        shapes = [(channels, size[0] >> i, size[1] >> i) for i, channels in enumerate(config["channels"])]
    return [torch.randn(images, *shape, generator=generator, dtype=dtype) for shape in shapes]


def random_flow(case, seed=0):
    """A fitted flow with random couplings whose log-scales stay below one, in evaluation mode."""
    torch.manual_seed(seed)
    flow = build_flow(case.split("-")[0], **CASES[case] | {"clamp": 1.0})
    flow.fit_adaptor([inputs(case, size=(16, 8), images=8, dtype=torch.float32)])
    for parameter in flow.blocks.parameters() if hasattr(flow, "blocks") else flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return flow.eval()


def test_every_flow_has_a_case():
    # A fusion's couplings are those of its CS-Flow, and the baseline has none; they have tests of their own.
    assert {case.split("-")[0] for case in CASES} | {"fusion", "gaussian", "memorybank"} == set(FLOWS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(8, 4), (4, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("seed", range(3))
def test_the_inverse_returns_the_adapted_maps(case, size, dtype, tolerance, seed):
    flow, maps = random_flow(case, seed).to(dtype), inputs(case, size, dtype=dtype, seed=seed)
    with torch.no_grad():
        latents, _ = flow(maps)
        restored = flow.inverse(latents)
        adapted = flow.adapt(maps)
    assert len(restored) == len(adapted)
    for x, y, z in zip(adapted, restored, latents, strict=True):
        assert (z - x).abs().max() > 0.05
        assert (y - x).abs().max() <= tolerance * x.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_the_log_determinant_is_that_of_the_jacobian(case):
    flow, maps = random_flow(case).double(), inputs(case, size=(4, 4), images=1)
    adapted = flow.adapt(maps)
    _, log_dets = flow(maps)
    # DNFAD's branches are separate densities of the same map.
    groups = [[node] for node in range(len(adapted))] if case.startswith("dnfad") else [list(range(len(adapted)))]
    for group in groups:
        shapes = [adapted[node].shape for node in group]

        def chain(flat, group=group, shapes=shapes):
            nodes = list(adapted)
            parts = flat.split([shape.numel() for shape in shapes])
            for node, part, shape in zip(group, parts, shapes, strict=True):
                nodes[node] = part.reshape(shape)
            latents, _ = flow.couple(nodes, flow.condition(nodes))
            return torch.cat([latents[node].flatten() for node in group])

        flat = torch.cat([adapted[node].flatten() for node in group])
        _, expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(chain, flat))
        found = sum(log_dets[node].sum() for node in group)
        assert abs(found.item()) > 0.05
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_likelihood_is_that_of_a_standard_normal_under_the_change_of_variables(case):
    flow, maps = random_flow(case).double(), inputs(case)
    latents, log_dets = flow(maps)
    normal = torch.distributions.Normal(0.0, 1.0)
    log_likelihood_B = sum(normal.log_prob(z).flatten(1).sum(1) for z in latents)
    log_likelihood_B = log_likelihood_B + sum(log_det.flatten(1).sum(1) for log_det in log_dets)
    torch.testing.assert_close(flow.nll(maps), -log_likelihood_B / sum(z[0].numel() for z in latents))


@pytest.mark.parametrize("case", CASES)
def test_a_new_flow_only_permutes_channels(case):
    torch.manual_seed(0)
    flow = build_flow(case.split("-")[0], **CASES[case]).double().eval()
    maps = inputs(case)
    latents, log_dets = flow(maps)
    for x, z, log_det_BHW in zip(flow.adapt(maps), latents, log_dets, strict=True):
        assert torch.equal(z.sort(1).values, x.sort(1).values)
        assert not log_det_BHW.any()


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_differs_only_by_rounding(case):
    flow, maps = random_flow(case), inputs(case, dtype=torch.float32)
    with torch.no_grad():
        exact_B = flow.nll(maps)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            rough_B = flow.nll(maps)
            latents, _ = flow(maps)
            restored = flow.inverse(latents)
    torch.testing.assert_close(rough_B, exact_B, rtol=0.03, atol=0.03)
    for x, y in zip(flow.adapt(maps), restored, strict=True):
        assert (y.float() - x).abs().mean() < 0.05


@pytest.mark.parametrize("case", CASES)
def test_training_lowers_the_likelihood_loss_and_every_parameter_has_a_gradient(case):
    torch.manual_seed(0)
    flow, maps = (
        build_flow(case.split("-")[0], **CASES[case]),
        inputs(case, size=(16, 8), dtype=torch.float32, images=8),
    )
    maps = [map_BCHW * map_BCHW.abs() for map_BCHW in maps]
    flow.fit_adaptor([maps])
    before = flow.eval().nll(maps).mean().item()
    flow.train()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        flow.nll(maps).mean().backward()
        optimizer.step()
    assert not [name for name, parameter in flow.named_parameters() if parameter.grad is None]
    assert flow.eval().nll(maps).mean().item() < before - 0.01


@pytest.mark.parametrize("case", CASES)
def test_recomputing_changes_no_gradient(case):
    maps, gradients = inputs(case), []
    for recompute in (False, True):
        flow = random_flow(case).double().train()
        flow.recompute = recompute
        torch.manual_seed(1)
        loss = flow.nll(maps).mean()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in flow.named_parameters()})
        gradients[-1]["loss"] = loss.detach()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_anomalous_images_have_higher_scores(case):
    flow, maps = random_flow(case), inputs(case, dtype=torch.float32)
    anomalous = [map_BCHW.clone() for map_BCHW in maps]
    anomalous[0][1, :, 2, 1] += 20.0
    with torch.no_grad():
        (normal_B, _), (anomalous_B, anomaly_map) = flow.predict(maps), flow.predict(anomalous)
    torch.testing.assert_close(anomalous_B[0], normal_B[0])
    assert anomalous_B[1] > normal_B[1]
    assert bool(torch.isfinite(anomaly_map).all())


@pytest.mark.parametrize("score_type", ["latent", "likelihood"])
@pytest.mark.parametrize("case", CASES)
def test_the_background_has_the_foregrounds_minimum_score(case, score_type):
    flow, maps = random_flow(case), inputs(case, dtype=torch.float32)
    with torch.no_grad():
        nodes = flow.position_scores(maps, score_type)
        latents, _ = flow(maps)
        mask = [torch.zeros(len(z), 1, *z.shape[2:]) for z in latents]
        for mask_B1HW in mask:
            mask_B1HW[..., : max(1, mask_B1HW.shape[-1] // 2)] = 1
        masked = flow.position_scores(maps, score_type, mask)
        score_B, _ = flow.predict(maps, score_type, mask=mask)
    for node_BHW, masked_BHW, mask_B1HW in zip(nodes, masked, mask, strict=False):
        inside_BHW = mask_B1HW[:, 0] > 0
        assert torch.equal(masked_BHW[inside_BHW], node_BHW[inside_BHW])
        for masked_HW, image_HW, inside_HW in zip(masked_BHW, node_BHW, inside_BHW, strict=True):
            assert bool((masked_HW[~inside_HW] == image_HW[inside_HW].min()).all())
    assert bool(torch.isfinite(score_B).all())


@pytest.mark.parametrize("scheme", ["simplenet", "softflow", "uniform"])
def test_the_condition_is_the_noises_deviation(scheme):
    torch.manual_seed(0)
    nodes = [torch.zeros(4, 500, 3, 3), torch.zeros(4, 500, 2, 2)]
    noisy, conditions = add_noise(nodes, scheme, 0.3)
    for map_BCHW, condition_B1HW in zip(noisy, conditions, strict=True):
        assert condition_B1HW.shape == (4, 1, *map_BCHW.shape[2:])
        torch.testing.assert_close(map_BCHW.std(1, keepdim=True), condition_B1HW / 20, rtol=0.15, atol=0.001)
        assert condition_B1HW.max() <= 6.0
    constant_per_image = bool((conditions[0].std((2, 3)) == 0).all())
    constant = bool((conditions[0] == conditions[0][0, 0, 0, 0]).all())
    assert (constant_per_image, constant) == {
        "simplenet": (True, True),
        "softflow": (True, False),
        "uniform": (False, False),
    }[scheme]


@pytest.mark.parametrize("scheme", ["softflow", "uniform"])
def test_the_noise_condition_is_zero_in_evaluation(scheme):
    flow = build_flow("csflow", channels=(4, 4), hidden=4, noise=0.3, noise_scheme=scheme)
    nodes = [torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 2, 2)]
    assert isinstance(flow.blocks[0], GraphCoupling)
    clean, conditions = flow.eval().condition_with_noise(nodes)
    assert not any(each.any() for each in (*clean, *conditions))
    noisy, conditions = flow.train().condition_with_noise(nodes)
    assert all(each.any() for each in (*noisy, *conditions))
    assert build_flow("csflow", channels=(4, 4), hidden=4, noise=0.3).train().condition_with_noise(nodes)[1] is None
