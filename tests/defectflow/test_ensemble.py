"""The mean of several flows: its predictions are those of its members, and its members have one configuration."""

import pytest
import torch

from defectflow import Ensemble, build_flow

VIEWS = {"channels": (4,), "hidden": 4, "steps": 1, "views": 2}


def fitted(seed, name="patchflow", **config):
    torch.manual_seed(seed)
    flow = build_flow(name, **config)
    return flow.fit_adaptor([[torch.randn(6, 4, 6, 6)] * flow.views]).eval()


@pytest.mark.parametrize(("name", "config"), [("gaussian", {"channels": (4,)}), ("multiflow", VIEWS)])
def test_scores_and_maps_are_the_members_means(name, config):
    members = [fitted(seed, name, **config) for seed in range(3)]
    ensemble = Ensemble(members)
    maps = [torch.randn(5, 4, 6, 6) for _ in range(ensemble.views)]
    with torch.inference_mode():
        predicted = ensemble.predict_images(maps, "likelihood", 0.1)
        of_members = [member.predict_images(maps, "likelihood", 0.1) for member in members]
    for mean, parts in zip(predicted, zip(*of_members, strict=True), strict=True):
        torch.testing.assert_close(mean, sum(parts) / 3)
        assert not torch.equal(parts[0], parts[1])
    assert (ensemble.views, ensemble.top, ensemble.config) == (members[0].views, members[0].top, members[0].config)


def test_members_have_one_configuration():
    with pytest.raises(ValueError, match="one configuration"):
        Ensemble([fitted(0, "gaussian", channels=(4,)), fitted(0, "gaussian", channels=(4,), neighbourhood=3)])
    with pytest.raises(ValueError, match="at least one flow"):
        Ensemble([])
