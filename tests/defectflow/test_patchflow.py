"""PatchFlow is a normalised density of whitened features, in nats per dimension.

Shapes: B images, C channels, A adapted channels, H rows, W columns.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal

from defectflow import PatchFlow, PatchFlowConfig, build_flow
from defectflow.pyramid import fuse

CHANNELS = (4, 6)


def feature_maps(images=6, size=(8, 6), seed=0):
    """Correlated maps with a mean of 3, the second half the size of the first."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    maps = []
    for channels, (rows, columns) in zip(CHANNELS, (size, (size[0] // 2, size[1] // 2)), strict=True):
        mixing = torch.randn(channels, channels, generator=generator)
        noise = torch.randn(images, channels, rows, columns, generator=generator)
        maps.append(torch.einsum("dc,bchw->bdhw", mixing, noise) + 3.0)
    return maps


def fitted(seed=0, **config):
    """A flow with fitted adaptor and random couplings, in evaluation mode."""
    torch.manual_seed(seed)
    flow = PatchFlow(PatchFlowConfig(CHANNELS, **{"adapted": 10, "bottleneck": 8, "steps": 2} | config))
    flow.fit_adaptor([feature_maps(seed=1), feature_maps(seed=2)])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return flow.eval()


def test_the_defaults_are_the_published_ones():
    config = build_flow("patchflow", channels=(40, 80, 192) * 3).config
    assert (config.adapted, config.bottleneck, config.steps, config.stride, config.noise) == (768, 128, 1, 1, 0.0)


def test_no_more_channels_are_adapted_than_there_are():
    assert PatchFlowConfig(CHANNELS).adapted == 10
    assert PatchFlowConfig(CHANNELS, maps=(1,)).adapted == 6


def test_maps_that_are_not_selected_are_ignored():
    torch.manual_seed(0)
    maps = feature_maps(seed=1)
    flow = PatchFlow(PatchFlowConfig(CHANNELS, maps=(1,))).fit_adaptor([maps]).eval()
    alone = PatchFlow(PatchFlowConfig(CHANNELS[1:])).fit_adaptor([maps[1:]]).eval()
    assert flow.adapt(maps)[0].shape == (6, 6, 4, 3)
    assert torch.equal(flow.adapt(maps)[0], alone.adapt(maps[1:])[0])


@pytest.mark.parametrize("adapted", [10, 3])
def test_the_adaptor_whitens_what_it_is_fitted_on(adapted):
    flow = fitted(adapted=adapted)
    with torch.no_grad():
        adapted_BAHW = torch.cat([flow.adapt(feature_maps(seed=seed))[0] for seed in (1, 2)])
    values_NA = adapted_BAHW.permute(0, 2, 3, 1).flatten(0, 2).double()
    torch.testing.assert_close(values_NA.mean(0), torch.zeros(adapted).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(values_NA.T, correction=0), torch.eye(adapted).double(), atol=1e-3, rtol=0)


def test_the_adaptor_keeps_the_directions_with_the_largest_variance():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    scale = torch.tensor([1.0, 9.0, 0.1, 4.0])[:, None, None]
    maps = [torch.randn(8, 4, 8, 8, generator=generator) * scale]
    flow = build_flow("patchflow", channels=(4,), adapted=2, neighbourhood=1).fit_adaptor([maps])
    weight_AD = flow.get_buffer("adaptor_weight").abs()
    assert weight_AD.argmax(1).tolist() == [1, 3]
    torch.testing.assert_close(weight_AD.max(1).values, torch.tensor([1 / 9, 1 / 4]), rtol=0.1, atol=0)


def test_a_constant_channel_is_not_amplified():
    maps = feature_maps()
    maps[1][:, 2] = 1.5
    flow = build_flow("patchflow", channels=CHANNELS, adapted=10, bottleneck=8).fit_adaptor([maps]).eval()
    maps[1][:, 2] += 1e-4
    assert bool((flow.nll(maps) < 10).all())


def test_the_adaptor_has_no_gradient():
    assert not [name for name, _ in fitted().named_parameters() if "adaptor" in name]


def trained_hard(**config):
    """A flow after a training in which an unconstrained adaptor would collapse, and its training maps."""
    torch.manual_seed(0)
    maps = feature_maps(images=20, seed=1)
    flow = PatchFlow(PatchFlowConfig(CHANNELS, adapted=4, bottleneck=8, steps=1, **config)).fit_adaptor([maps])
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        flow.nll(maps).mean().backward()
        optimizer.step()
    return flow.eval(), maps


def test_a_trained_adaptor_does_not_collapse():
    flow, maps = trained_hard(adaptor="trained")
    start = PatchFlow(flow.config).fit_adaptor([maps])
    with torch.no_grad():
        (adapted_BAHW,), (before_BAHW,) = flow.adapt(maps), start.adapt(maps)
    # The adaptor has rotated, and its output's covariance is still the identity, so stretching gains no likelihood.
    assert not torch.allclose(adapted_BAHW, before_BAHW, atol=0.1)
    values_NA = adapted_BAHW.permute(0, 2, 3, 1).flatten(0, 2).double()
    torch.testing.assert_close(torch.cov(values_NA.T, correction=0), torch.eye(4).double(), atol=1e-3, rtol=0)
    frozen, _ = trained_hard()
    assert flow.nll(maps).mean() > frozen.nll(maps).mean() - 0.2


def test_a_random_orthogonal_adaptor_is_frozen_and_the_same_for_the_same_seed():
    flow, maps = trained_hard(adaptor="orthogonal")
    other, _ = trained_hard(adaptor="orthogonal")
    weight_AD = flow.get_buffer("adaptor_weight")
    assert torch.equal(weight_AD, other.get_buffer("adaptor_weight"))
    fused_ND = fuse(maps, 3).permute(0, 2, 3, 1).flatten(0, 2)
    directions_AD = weight_AD * fused_ND.std(0, correction=0)
    torch.testing.assert_close(directions_AD @ directions_AD.T, torch.eye(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("images", "match"), [(0, "got 0"), (1, "the 4 vectors are all equal")])
def test_too_few_positions_for_the_adaptor_are_refused(images, match):
    flow = PatchFlow(PatchFlowConfig(CHANNELS, adapted=10))
    with pytest.raises(ValueError, match=match):
        flow.fit_adaptor([feature_maps(images, (2, 2))] * images)


def test_features_that_are_not_finite_are_refused():
    maps = feature_maps()
    maps[0][2, 1, 3, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        PatchFlow(PatchFlowConfig(CHANNELS, adapted=4)).fit_adaptor([maps])


def test_a_new_flows_likelihood_is_a_gaussians():
    flow = PatchFlow(PatchFlowConfig(CHANNELS, adapted=5, bottleneck=8, steps=3))
    flow.fit_adaptor([feature_maps(seed=1)]).eval()
    maps = feature_maps(seed=3)
    values_BHWA = flow.adapt(maps)[0].permute(0, 2, 3, 1)
    log_likelihood_BHW = MultivariateNormal(torch.zeros(5), torch.eye(5)).log_prob(values_BHWA)
    expected_B = -log_likelihood_BHW.sum((1, 2)) / (5 * 8 * 6)
    torch.testing.assert_close(flow.nll(maps), expected_B)
    norms, nlls = flow.position_nll(maps)
    torch.testing.assert_close(nlls[0], -log_likelihood_BHW / 5)
    torch.testing.assert_close(norms[0], 0.5 * values_BHWA.square().mean(-1))


def test_the_likelihood_counts_the_change_of_variables():
    flow = fitted().double()
    maps = [map_BCHW.double() for map_BCHW in feature_maps(images=1, size=(2, 2), seed=3)]
    (adapted_BAHW,) = flow.adapt(maps)

    def through_the_couplings(x_BAHW):
        for block in flow.blocks:
            (x_BAHW,), _ = block.couple([x_BAHW])
        return x_BAHW

    jacobian = torch.autograd.functional.jacobian(through_the_couplings, adapted_BAHW)
    _, log_det = torch.linalg.slogdet(jacobian.reshape(40, 40))
    z = through_the_couplings(adapted_BAHW)
    expected = (0.5 * z.square().sum() + 20 * math.log(2 * math.pi) - log_det) / 40
    torch.testing.assert_close(flow.nll(maps), expected[None])
    torch.testing.assert_close(flow.position_nll(maps)[1][0].mean(), expected)


def test_the_density_integrates_to_one():
    torch.manual_seed(2)
    flow = PatchFlow(PatchFlowConfig((2,), adapted=2, bottleneck=8, steps=3, clamp=0.7, neighbourhood=1)).eval()
    flow.get_buffer("adaptor_weight").copy_(torch.eye(2))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    side = torch.linspace(-15, 15, 601)
    points_BCHW = torch.cartesian_prod(side, side)[:, :, None, None]
    with torch.no_grad():
        mass = torch.exp(-2 * flow.nll([points_BCHW])).sum() * (side[1] - side[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=2e-3)


def test_the_inverse_returns_the_adapted_maps():
    flow = fitted(steps=3)
    maps = feature_maps(seed=3)
    with torch.no_grad():
        latents, _ = flow(maps)
        (restored_BAHW,) = flow.inverse(latents)
        (adapted_BAHW,) = flow.adapt(maps)
    assert (latents[0] - adapted_BAHW).abs().max() > 0.1
    torch.testing.assert_close(restored_BAHW, adapted_BAHW, rtol=1e-3, atol=1e-3)


def test_training_reads_a_strided_grid_and_evaluation_every_position():
    flow = fitted(stride=2)
    maps = feature_maps(size=(8, 6), seed=3)
    with torch.no_grad():
        (all_BAHW,) = flow.adapt(maps)
        assert all_BAHW.shape == (6, 10, 8, 6)
        flow.train()
        seen = set()
        for _ in range(40):
            (grid_BAHW,) = flow.adapt(maps)
            assert grid_BAHW.shape == (6, 10, 4, 3)
            matching = [
                (top, left)
                for top in range(2)
                for left in range(2)
                if torch.allclose(grid_BAHW, all_BAHW[:, :, top::2, left::2], atol=1e-4)
            ]
            assert len(matching) == 1
            seen.update(matching)
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_noise_is_added_only_in_training():
    flow = fitted(noise=0.25)
    for parameter in flow.parameters():
        torch.nn.init.zeros_(parameter)
    maps = feature_maps(images=40, seed=3)
    with torch.no_grad():
        (clean_BAHW,), _ = flow(maps)
        assert torch.equal(flow(maps)[0][0], clean_BAHW)
        flow.train()
        difference = flow(maps)[0][0] - clean_BAHW
        assert not torch.equal(flow(maps)[0][0], flow(maps)[0][0])
    assert difference.std().item() == pytest.approx(0.25, rel=0.05)
    assert abs(difference.mean().item()) < 0.01


def test_masked_positions_do_not_count():
    flow = fitted()
    maps = feature_maps(seed=3)
    mask = torch.ones(6, 1, 8, 6)
    mask[:, :, 4:] = 0
    with torch.no_grad():
        (z,), (log_det_BHW,) = flow(maps)
        (masked_z,), (masked_log_det_BHW,) = flow(maps, mask=[mask])
    assert torch.equal(masked_z[:, :, :4], z[:, :, :4])
    assert torch.equal(masked_log_det_BHW[:, :4], log_det_BHW[:, :4])
    assert not masked_z[:, :, 4:].any()
    assert not masked_log_det_BHW[:, 4:].any()
    torch.testing.assert_close(flow.nll(maps, mask=[torch.ones(6, 1, 8, 6)]), flow.nll(maps))
    _, (nll_BHW,) = flow.position_nll(maps)
    torch.testing.assert_close(flow.nll(maps, mask=[mask]), nll_BHW[:, :4].mean((1, 2)))


@pytest.mark.parametrize("score_type", ["latent", "likelihood"])
def test_scores_are_the_mean_of_the_highest_position_scores(score_type):
    flow = fitted()
    maps = feature_maps(seed=3)
    with torch.no_grad():
        (z,), (log_det_BHW,) = flow(maps)
        expected_BHW = 0.5 * z.square().mean(1)
        if score_type == "likelihood":
            expected_BHW = expected_BHW + 0.5 * math.log(2 * math.pi) - log_det_BHW / 10
        torch.testing.assert_close(flow.predict(maps, score_type)[1], expected_BHW)
        top_five_B = expected_BHW.flatten(1).sort(1).values[:, -5:].mean(1)
        torch.testing.assert_close(flow.score(maps, score_type, top=5 / 48), top_five_B)
        torch.testing.assert_close(flow.score(maps, score_type, top=1e-6), expected_BHW.amax((1, 2)))
    assert not torch.allclose(flow.score(maps, "latent"), flow.score(maps, "likelihood"))


@pytest.mark.parametrize("size", [(8, 6), (31, 47), (384, 384), (5, 4)])
def test_anomaly_maps_have_the_images_size(size):
    flow = fitted()
    maps = feature_maps(images=2, seed=3)
    with torch.no_grad():
        map_BHW = flow.anomaly_map(maps, size)
        _, position_scores_BHW = flow.predict(maps)
    assert map_BHW.shape == (2, *size)
    expected = F.interpolate(position_scores_BHW[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(map_BHW, expected)


def test_an_anomalous_position_has_the_highest_score():
    flow = fitted()
    maps = feature_maps(seed=3)
    maps[0][:, :, 6, 1] += 30.0
    with torch.no_grad():
        map_BHW = flow.anomaly_map(maps, (80, 60))
    for image in map_BHW:
        row, column = divmod(int(image.argmax()), 60)
        # Within the averaged neighbourhood.
        assert abs(row / 10 - 6.5) <= 1.5
        assert abs(column / 10 - 1.5) <= 1.5


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"adapted": 1}, "adapted: 1 is below 2"),
        ({"maps": (0, 2)}, r"maps: \[0, 2\] are not indices of the 2"),
        ({"bottleneck": 0}, "bottleneck: 0 is below 1"),
        ({"steps": 0}, "steps: 0 is below 1"),
        ({"stride": 0}, "stride: 0 is below 1"),
        ({"adaptor": "free"}, "adaptor: 'free' is not one of"),
        ({"neighbourhood": 2}, "neighbourhood: 2 is not an odd number"),
        ({"neighbourhood": -1}, "neighbourhood: -1 is not an odd number"),
        ({"clamp": 0.0}, "clamp: 0.0 is not above 0"),
        ({"noise": -0.1}, "noise: -0.1 is below 0"),
        ({"depth": 3}, "depth: patchflow has no such setting; it has channels"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        build_flow("patchflow", channels=CHANNELS, **{"adapted": 4} | setting)


def test_an_unknown_flow_is_refused_and_the_flows_are_named():
    with pytest.raises(
        ValueError,
        match=r"^name: there is no flow 'nice'; there are csflow, dnfad, fusion, gaussian, memorybank, multiflow, pat",
    ):
        build_flow("nice", channels=CHANNELS)


def test_the_same_seed_makes_the_same_flow():
    one, other, different = fitted(seed=3), fitted(seed=3), fitted(seed=4)
    maps = feature_maps(seed=5)
    assert torch.equal(one.nll(maps), other.nll(maps))
    assert not torch.equal(one.nll(maps), different.nll(maps))
