"""A CS-Flow and Gaussians in one: the member that sees a defect decides, and scores stay readable."""

import pytest
import torch

from defectflow import build_flow

CONFIG = {
    "channels": (4, 6, 6),
    "maps": (1, 2),
    "hidden": 8,
    "steps": 2,
    "adaptation": "whiten",
    "gaussians": ((0,), (1, 2)),
    "located": (0,),
}


def maps_of(images, seed):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    shapes = ((4, 16, 16), (6, 8, 8), (6, 4, 4))
    return [torch.randn(images, *shape, generator=generator) for shape in shapes]


@pytest.fixture
def flow():
    torch.manual_seed(0)
    return build_flow("fusion", **CONFIG).fit_adaptor([maps_of(40, 0)]).standardise([maps_of(30, 1)])


def test_unseen_good_images_have_standard_scores(flow):
    maps = maps_of(200, 2)
    scores_B, map_BHW = flow.predict(maps)
    assert -0.5 < scores_B.mean() < 1.5 and scores_B.max() < 3
    assert abs(map_BHW.mean()) < 0.2
    for scores_BHW in flow.position_scores(maps):
        assert abs(scores_BHW.mean()) < 0.2 and 0.7 < scores_BHW.std() < 1.3


@pytest.mark.parametrize("member", [0, 1])
def test_a_defect_that_one_member_sees_is_enough(flow, member):
    """Only one of the Gaussians reads the first map, only the other and the CS-Flow the second."""
    good, defective = maps_of(20, 3), maps_of(20, 3)
    defective[member][:, :, 3, 2] += 9
    assert flow.score(defective).min() > flow.score(good).max()


def test_a_member_counts_as_far_as_it_finds_the_defects(flow):
    """The first map alone shows the defects: its Gaussian gets all weight, and noise in the others hides nothing."""
    good, defective, noisy = maps_of(60, 3), maps_of(60, 4), maps_of(60, 5)
    defective[0][:, :, 3, 2] += 4
    for index in (1, 2):
        noisy[index] *= 1.5
    before = flow.score(noisy).mean()
    flow.weigh([good], [defective])
    cs_flow, first, others = flow.weight.tolist()
    assert first == 1 and cs_flow < 0.1 and others < 0.1
    assert flow.score(noisy).mean() < before / 3
    assert flow.score(defective).min() > flow.score(good).mean()


def test_without_a_member_that_finds_defects_all_count_alike(flow):
    good = maps_of(60, 3)
    assert flow.weigh([good], [good]).weight.tolist() == [1, 1, 1]


def test_averaged_gaussians_read_means_over_three_by_three_positions():
    torch.manual_seed(0)
    settings = {**CONFIG, "gaussians": ((0,), (0,)), "averaged": (1,), "located": (1,)}
    flow = build_flow("fusion", **settings).fit_adaptor([maps_of(40, 0)]).standardise([maps_of(30, 1)])
    maps = maps_of(1, 4)
    maps[0][0, :, 9, 5] += 30
    plain_HW, averaged_HW = (scores[0] for scores in flow.position_scores(maps)[1:])
    assert plain_HW[8, 4] < 5 < averaged_HW[8, 4], "its neighbours see the position, too"


def test_the_map_is_that_of_the_located_gaussian_and_of_the_cs_flow(flow):
    maps, evident, endless = maps_of(1, 4), maps_of(1, 4), maps_of(1, 4)
    evident[0][0, :, 9, 5] += 9
    map_BHW = flow.predict(evident)[1]
    assert map_BHW.shape == (1, 16, 16)
    assert divmod(int(map_BHW[0].argmax()), 16) == (9, 5)
    # The second map is not read by the located Gaussian.
    evident[1][0, :, 1, 1] += 9
    endless[1][0, :, 1, 1] += 9e9
    difference = flow.predict(evident)[1] - map_BHW
    assert difference[0, 2, 2] > 0.1 > difference[0, 14, 14].abs()
    assert (flow.predict(endless)[1] - flow.predict(maps)[1]).max() < 3, "what the convolutions spread is bounded"


def test_the_map_of_a_cs_flow_that_finds_no_defect_hardly_counts(flow):
    good, defective, maps, changed = maps_of(60, 3), maps_of(60, 4), maps_of(1, 4), maps_of(1, 4)
    changed[1][0, :, 1, 1] += 9
    before = (flow.predict(changed)[1] - flow.predict(maps)[1]).max()
    defective[0][:, :, 3, 2] += 4
    flow.weigh([good], [defective])
    assert (flow.predict(changed)[1] - flow.predict(maps)[1]).max() < before / 5


def test_far_outliers_stay_readable(flow):
    good, far = flow.score(maps_of(50, 5)).max(), flow.score([1e4 * each for each in maps_of(2, 5)])
    assert bool((far > good).all()) and bool((far < 20).all())


def test_training_changes_the_cs_flow_alone(flow):
    assert {name.split(".")[0] for name, _ in flow.named_parameters()} == {"blocks"}
    flow.nll(maps_of(4, 6)).mean().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gaussians": ()}, "gaussians: there is none"),
        ({"gaussians": ((0,), (3,))}, r"gaussians: \[3\] are not indices of the 3"),
        ({"averaged": (2,)}, r"averaged: \[2\] are not indices of the 2 Gaussians"),
        ({"located": (2,)}, r"located: \[2\] are not indices of the 2 Gaussians"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_flow("fusion", **CONFIG | settings)


def test_all_maps_that_a_member_reads_are_named(flow):
    assert flow.config.read == (0, 1, 2)


def test_scores_are_of_latent_norms(flow):
    with pytest.raises(ValueError, match="score_type: a fusion standardises latent norms; set it to latent"):
        flow.predict(maps_of(2, 0), score_type="likelihood")
