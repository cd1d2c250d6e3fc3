"""Each flow's numerical results are pinned to its version.

If a test fails because the results were changed on purpose, raise the flow's `version`, and replace the flow's row of
`RESULTS` by the printed values.
"""

import pytest
import torch

from defectflow import FLOWS, build_flow

CONFIGS = {
    "csflow": {
        "channels": (4, 4, 4),
        "hidden": 6,
        "adaptation": "standardise",
        "noise": 0.2,
        "noise_scheme": "softflow",
    },
    "dnfad": {"channels": (4, 2), "position_channels": 4, "noise": 0.2, "noise_scheme": "uniform"},
    "fusion": {
        "channels": (4, 4, 3),
        "maps": (0, 1),
        "hidden": 6,
        "steps": 2,
        "adaptation": "standardise",
        "gaussians": ((0, 1), (2,)),
    },
    "gaussian": {"channels": (4, 3)},
    "memorybank": {"channels": (4, 3), "size": 20, "adaptation": "standardise"},
    "multiflow": {"channels": (4,), "views": 5, "hidden": 6, "sample_score": "mean"},
    "patchflow": {"channels": (4, 3), "adapted": 6, "bottleneck": 8, "noise": 0.2, "stride": 2},
}

RESULTS = {
    ("csflow", 2): [1.48968066, 1.35584685, 0.570847015, 0.436890597, 0.507382887, 1.42633458],
    ("dnfad", 2): [2.2180953, 2.23146538, 0.771921316, 0.760385943, 0.515043501, 0.880465563],
    ("fusion", 4): [1.41065037, 1.42717466, 0.66318441, 0.245089912, 0.0394817709],
    ("gaussian", 1): [1.45426125, 1.40550106, 1.11468257, 1.25972565, 0.51094262, 1.42988115],
    ("memorybank", 2): [1.30321868, 1.31102272, 0.799420819, 0.710566136, 0.388182163, 1.3071207],
    ("multiflow", 2): [2.79734956, 2.7946767, 5.13961454, 5.67767879, 1.67305343, 2.79601313],
    ("patchflow", 2): [1.41616583, 1.39188571, 1.45896558, 1.16045271, 0.48475598, 1.40402577],
}
"""By name and version: NLL of two images, their scores, and the mean anomaly map of either score type."""


@pytest.fixture(autouse=True)
def device():
    """Overrides the fixture of conftest: a GPU's random numbers are others."""


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def results(name):
    """Results of a seeded flow after a few training steps on seeded maps."""
    torch.manual_seed(0)
    flow = build_flow(name, **CONFIGS[name])
    sizes = [(8, 8)] * flow.views if flow.views > 1 else [(8, 8), (4, 4), (2, 2)]
    channels = flow.config.channels * flow.views
    maps = [1 + 2 * torch.randn(8, count, *size) for count, size in zip(channels, sizes, strict=False)]
    flow.fit_adaptor([maps])
    if name == "patchflow":
        # The sign of an eigenvector depends on the linear algebra library.
        weight_AD, bias_A = flow.get_buffer("adaptor_weight"), flow.get_buffer("adaptor_bias")
        sign_A = weight_AD.gather(1, weight_AD.abs().argmax(1, keepdim=True)).sign()[:, 0]
        weight_AD.mul_(sign_A[:, None])
        bias_A.mul_(sign_A)
    steps = 5 if list(flow.parameters()) else 0
    optimizer = torch.optim.SGD(list(flow.parameters()) or [torch.empty(0)], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        flow.nll(maps).mean().backward()
        optimizer.step()
    flow.eval().standardise([maps]).weigh([maps], [[1.5 * map_BCHW for map_BCHW in maps]])
    images = [map_BCHW[:2] for map_BCHW in maps]
    with torch.no_grad():
        types = ("latent",) if name == "fusion" else ("latent", "likelihood")
        means = [flow.predict(images, score_type)[1].mean().item() for score_type in types]
        return [*flow.nll(images).tolist(), *flow.predict(images)[0].tolist(), *means]


@pytest.mark.parametrize("name", FLOWS)
def test_results_change_only_with_the_version(name):
    found = results(name)
    print(f'    ("{name}", {FLOWS[name].version}): {found},')
    assert found == pytest.approx(RESULTS[name, FLOWS[name].version], rel=1e-6)


def test_every_flow_states_its_version():
    assert all("version" in vars(flow_class) for flow_class in FLOWS.values())
