"""Properties of CS-Flow, DNFAD and Multi-Flow that the papers state.

Shapes: B images, V views, C channels, H rows, W columns of a map.
"""

import pytest
import torch

from defectflow import CSFlowConfig, build_flow
from defectflow.config.multiflow import top_and_ring
from defectflow.dnfad import position_code
from defectflow.subnets import AttentionSubnet


def randomised(flow):
    """The flow with random parameters, in evaluation mode."""
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return flow.eval()


def test_the_defaults_are_the_published_ones():
    csflow = build_flow("csflow", channels=(4, 4, 4)).config
    assert (csflow.steps, csflow.hidden, csflow.clamp, csflow.kernels, csflow.adaptation) == (
        4,
        1024,
        3.0,
        (3, 5),
        "none",
    )
    dnfad = build_flow("dnfad", channels=(4,)).config
    assert (dnfad.steps, dnfad.clamp, dnfad.position_channels, dnfad.branches) == (6, 2.0, 64, ("local", "global"))
    assert (dnfad.rectified, dnfad.upsampling) == (("local",), 8)
    multiflow = build_flow("multiflow", channels=(4,)).config
    assert (multiflow.steps, multiflow.hidden, multiflow.clamp, multiflow.kernels) == (6, 64, 1.9, (3, 5))
    assert multiflow.noise**2 == pytest.approx(0.15)


def test_csflow_messages_reach_only_adjacent_scales():
    torch.manual_seed(0)
    flow = randomised(build_flow("csflow", channels=(4,) * 4, hidden=6, steps=1, clamp=1.0))
    subnet = flow.blocks[0].s1
    maps = [torch.randn(1, 2, 16 >> scale, 16 >> scale) for scale in range(4)]
    with torch.no_grad():
        before = subnet(maps)
        maps[1] = maps[1] + 1.0
        after = subnet(maps)
    assert [not torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, True, True, False]


def test_csflows_score_is_the_mean_over_all_scales_and_its_map_the_finest():
    torch.manual_seed(0)
    maps = [torch.randn(3, 4, 8, 8), torch.randn(3, 4, 4, 4)]
    flow = randomised(build_flow("csflow", channels=(4, 4), hidden=6, steps=2))
    with torch.no_grad():
        latents, _ = flow(maps)
        score_B, position_scores_BHW = flow.predict(maps)
    squares_BN = torch.cat([z.flatten(1) for z in latents], dim=1).square()
    torch.testing.assert_close(score_B, squares_BN.mean(1) / 2)
    torch.testing.assert_close(position_scores_BHW, latents[0].square().mean(1) / 2)
    both = build_flow("csflow", channels=(4, 4), hidden=6, steps=2, localise="all").eval()
    both.load_state_dict(flow.state_dict())
    with torch.no_grad():
        assert not torch.allclose(both.predict(maps)[1], position_scores_BHW)


def test_csflow_requires_scales_that_halve():
    with pytest.raises(
        ValueError, match=r"^maps: CS-Flow's scales halve one another, but map 1 is \(3, 3\) after \(7, 7\)"
    ):
        CSFlowConfig.for_features([[(8, 7, 7)], [(8, 3, 3)]], images=5)
    with pytest.raises(ValueError, match=r"^maps: \[0, 2\] are not indices of the 2 feature maps"):
        CSFlowConfig.for_features([[(8, 8, 8)], [(8, 4, 4)]], images=5, maps=(0, 2))
    with pytest.raises(ValueError, match=r"^maps: the maps share one number of channels; they have \[4, 6\]"):
        build_flow("csflow", channels=(4, 6))


def test_multiflow_messages_follow_the_graph():
    torch.manual_seed(0)
    assert top_and_ring(4) == ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2))
    assert top_and_ring(2) == ((1,), (0,))
    subnet = randomised(build_flow("multiflow", channels=(4,), views=6, hidden=6, steps=1, noise=0.0)).blocks[0].s1
    maps = [torch.randn(1, 2, 4, 4) for _ in range(6)]
    with torch.no_grad():
        before = subnet(maps)
        maps[2] = maps[2] + 1.0
        after = subnet(maps)
    changed = [view for view in range(6) if not torch.equal(before[view], after[view])]
    assert changed == [0, 1, 2, 3]


def test_multiflow_scores_images_and_samples():
    torch.manual_seed(0)
    settings = {"channels": (3, 4), "maps": (1,), "views": 3, "hidden": 6, "steps": 2}
    flow = randomised(build_flow("multiflow", **settings))
    maps = [torch.randn(2, channels, 4, 4) for _ in range(3) for channels in (3, 4)]
    with torch.no_grad():
        sample_B, position_scores_BVHW = flow.predict(maps)
        image_BV = flow.predict_images(maps)[1]
        map_BVhw = flow.anomaly_map(maps, size=(8, 8))
    torch.testing.assert_close(image_BV, position_scores_BVHW.amax((2, 3)))
    torch.testing.assert_close(sample_B, image_BV.amax(1))
    upsampled = torch.nn.functional.interpolate(position_scores_BVHW, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(map_BVhw, upsampled)
    mean = build_flow("multiflow", **settings, sample_score="mean").eval()
    mean.load_state_dict(flow.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(mean.score(maps), image_BV.mean(1))


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"neighbours": ((1,), (3,), ())}, r"neighbours: view 1 can't have \[3\] among 3 views"),
        ({"neighbours": ((0,), (), ())}, r"neighbours: view 0 can't have \[0\]"),
        ({"neighbours": ((1,), (0,))}, "neighbours: 2 lists of neighbours for 3 views"),
        ({"views": 0}, "views: 0 is below 1"),
        ({"hidden": 0}, "hidden: 0 is below 1"),
        ({"kernels": (2, 5)}, "kernels: 2 is not an odd number"),
        ({"maps": (0, 1)}, "maps: Multi-Flow reads one map of each view"),
        ({"noise_scheme": "salt"}, "noise_scheme: 'salt' is not one of"),
        ({"adaptation": "most"}, "adaptation: 'most' is not one of"),
        ({"sample_score": "sum"}, "sample_score: 'sum' is not one of"),
    ],
)
def test_multiflow_settings_out_of_range_are_refused_by_name(setting, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        build_flow("multiflow", **{"channels": (4, 4), "maps": (0,), "views": 3} | setting)


def test_all_positions_have_different_codes():
    code_PN = position_code(16, 9, 7).flatten(1)
    distances = torch.cdist(code_PN.T, code_PN.T) + 10 * torch.eye(63)
    assert distances.min() > 0.1
    assert position_code(16, 9, 7)[:, 2, 3].tolist() != position_code(16, 9, 7)[:, 3, 2].tolist()


def test_only_dnfads_local_branch_depends_on_the_position():
    torch.manual_seed(0)
    flow = randomised(build_flow("dnfad", channels=(4,), steps=1, position_channels=8))
    with torch.no_grad():
        (local_z, global_z), _ = flow([torch.ones(1, 4, 24, 24)])
    inner = (slice(None), slice(None), slice(11, 13), slice(11, 13))
    assert local_z[inner].flatten(2).std(2).max() > 1e-3
    assert global_z[inner].flatten(2).std(2).max() < 1e-5


@pytest.mark.parametrize("rectified", [("local",), (), ("local", "global")])
def test_a_rectified_subnetworks_output_has_one_sign(rectified):
    torch.manual_seed(0)
    flow = randomised(build_flow("dnfad", channels=(8,), steps=1, position_channels=4, rectified=rectified))
    for branch, couplings in flow.branches.items():
        for subnet in [each for each in couplings.modules() if isinstance(each, AttentionSubnet)]:
            with torch.no_grad():
                (output,) = subnet([torch.randn(4, subnet.first.in_channels, 6, 6)])
            assert bool(output.max() * output.min() >= 0) == (branch in rectified)


@pytest.mark.parametrize("channels", [8, 768])
def test_dnfads_probabilities_do_not_underflow(channels):
    torch.manual_seed(0)
    flow = build_flow("dnfad", channels=(channels,), steps=1, position_channels=0).eval()
    maps = [torch.randn(2, channels, 4, 4)]
    maps[0][1, :, 1, 2] *= 4.0
    with torch.no_grad():
        score_B, position_scores_BHW = flow.predict(maps)
    assert bool((position_scores_BHW > 0).all())
    assert bool((position_scores_BHW < 1).all())
    assert position_scores_BHW[1].argmax().item() == 6
    assert score_B[1] > score_B[0]
    torch.testing.assert_close(position_scores_BHW, 1 - torch.exp(-maps[0].square().mean(1) / 2))


def test_relative_probabilities_hide_an_image_that_is_anomalous_everywhere():
    settings = {"channels": (16,), "steps": 1, "position_channels": 0}
    maps = [torch.randn(2, 16, 6, 6)]
    maps[0][1] *= 3.0
    scores = {}
    for relative in (False, True):
        with torch.no_grad():
            scores[relative] = build_flow("dnfad", **settings, relative=relative).eval().score(maps, top=1.0)
    assert scores[False][1] > scores[False][0] + 0.3
    assert scores[True].max() < 1.0


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"upsampling": 0}, "upsampling: 0 is below 1"),
        ({"hidden": -1}, "hidden: -1 is below 0"),
        ({"position_channels": 6}, "position_channels: 6 is not a multiple of 4"),
        ({"position_channels": -4}, "position_channels: -4 is not a multiple of 4 from 0"),
        ({"branches": ()}, "branches: there is none"),
        ({"branches": ("local", "both")}, "branches: 'both' is not one of 'local', 'global'"),
        ({"rectified": ("both",)}, "rectified: 'both' is not one of 'local', 'global'"),
        ({"adaptation": "most"}, "adaptation: 'most' is not one of"),
    ],
)
def test_dnfad_settings_out_of_range_are_refused_by_name(setting, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        build_flow("dnfad", channels=(4,), **setting)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"hidden": 0}, "hidden: 0 is below 1"),
        ({"kernels": (3, -1)}, "kernels: -1 is not an odd number from 1"),
        ({"localise": "coarsest"}, "localise: 'coarsest' is not one of 'finest', 'all'"),
    ],
)
def test_csflow_settings_out_of_range_are_refused_by_name(setting, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        build_flow("csflow", channels=(4,), **setting)


def test_dnfad_scores_no_images():
    flow = build_flow("dnfad", channels=(4,), steps=1, position_channels=4).eval()
    with torch.no_grad():
        assert flow.score([torch.zeros(0, 4, 5, 5)]).shape == (0,)


@pytest.mark.parametrize(("upsampling", "border"), [(1, 1.0), (8, 0.5)])
def test_dnfads_upsampling_halves_the_weight_of_the_border(upsampling, border):
    settings = {"channels": (4,), "steps": 1, "position_channels": 0}
    flow = build_flow("dnfad", **settings, upsampling=upsampling).eval()
    maps = [torch.zeros(3, 4, 9, 9)]
    maps[0][0, :, 4, 4] = maps[0][1, :, 0, 4] = maps[0][2, :, 0, 0] = 3.0
    with torch.no_grad():
        within, edge, corner = flow.score(maps, top=1.0).tolist()
    assert edge == pytest.approx(border * within, rel=0.15)
    assert corner == pytest.approx(border**2 * within, rel=0.3)
