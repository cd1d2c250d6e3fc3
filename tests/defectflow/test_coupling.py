"""Couplings are invertible, their log-determinant is that of the Jacobian, and FrEIA can compose them.

Shapes: B images, C channels, H rows, W columns.
"""

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
from torch import nn

from defectflow.coupling import GraphCoupling, soft_clamp
from defectflow.subnets import BottleneckSubnet


class MessageSubnet(nn.Module):
    """Adds to each node's output a convolution of the nodes' mean: messages between nodes and between positions."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.own = nn.Sequential(nn.Conv2d(c_in, 8, 1), nn.Tanh(), nn.Conv2d(8, c_out, 1))
        self.message = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, maps):
        mean_BCHW = torch.stack(list(maps)).mean(0)
        return [self.own(map_BCHW) + self.message(mean_BCHW) for map_BCHW in maps]


def bottleneck(c_in, c_out):
    return BottleneckSubnet(c_in, c_out, 8)


def randomised(block, seed=0):
    """A block with random weights, biases and gammas; log-scales are far from zero."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    for parameter in block.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return block


def coupling(subnet, nodes=1, channels=6, condition=0, clamp=1.0, seed=0):
    torch.manual_seed(seed)
    dims_c = [(condition, 1, 1)] if condition else []
    return randomised(GraphCoupling([(channels, 1, 1)] * nodes, subnet, clamp, dims_c), seed)


CASES = [
    pytest.param({"subnet": bottleneck}, id="one-node"),
    pytest.param({"subnet": bottleneck, "channels": 5}, id="odd-channels"),
    pytest.param({"subnet": bottleneck, "condition": 3}, id="condition"),
    pytest.param({"subnet": MessageSubnet, "nodes": 3, "channels": 4}, id="messages"),
    pytest.param({"subnet": MessageSubnet, "nodes": 2, "channels": 4, "condition": 2}, id="messages-condition"),
]


def inputs(case, size, dtype, images=2):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    shape = (images, case.get("channels", 6), *size)
    maps = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(case.get("nodes", 1))]
    extra = case.get("condition", 0)
    condition = [torch.randn(images, extra, *size, generator=generator, dtype=dtype) for _ in maps] if extra else None
    return maps, condition


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_the_inverse_undoes_the_forward_pass(case, size, dtype, tolerance):
    block = coupling(**case).to(dtype)
    maps, condition = inputs(case, size, dtype)
    with torch.no_grad():
        latents, log_dets = block.couple(maps, condition)
        restored, inverse_log_dets = block.uncouple(latents, condition)
    for x, z, y in zip(maps, latents, restored, strict=True):
        assert (z - x).abs().max() > 0.1
        assert (y - x).abs().max() <= tolerance * x.abs().max()
    for one, other in zip(log_dets, inverse_log_dets, strict=True):
        assert one.shape == (2, *size)
        assert one.abs().max() > 0.05
        torch.testing.assert_close(other, -one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_log_determinant_is_that_of_the_jacobian(case):
    size = (2, 3)
    block = coupling(**case).double()
    maps, condition = inputs(case, size, torch.float64)
    _, log_det_B = block(maps, c=condition)
    _, log_dets = block.couple(maps, condition)
    torch.testing.assert_close(torch.stack([each.sum((1, 2)) for each in log_dets]).sum(0), log_det_B)
    for image in range(2):
        one = None if condition is None else [each[image : image + 1] for each in condition]

        def couple_flat(flat, one=one):
            latents, _ = block.couple(list(flat.view(len(maps), 1, -1, *size)), one)
            return torch.stack(latents).flatten()

        flat = torch.stack([map_BCHW[image] for map_BCHW in maps]).flatten()
        _, expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(couple_flat, flat))
        assert log_det_B[image].item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)


def test_without_messages_each_position_has_its_own_jacobian():
    block = coupling(bottleneck, channels=5).double()
    map_BCHW = torch.randn(1, 5, 2, 3, dtype=torch.float64)
    _, (log_det_BHW,) = block.couple([map_BCHW])
    jacobian = torch.autograd.functional.jacobian(lambda x: block.couple([x])[0][0], map_BCHW)[0, :, :, :, 0]
    for row in range(2):
        for column in range(3):
            _, expected = torch.linalg.slogdet(jacobian[:, row, column, :, row, column])
            assert log_det_BHW[0, row, column].item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_new_block_only_permutes_channels():
    block = GraphCoupling([(6, 1, 1)] * 2, bottleneck, clamp=1.9)
    maps, _ = inputs({"nodes": 2}, (4, 4), torch.float32)
    latents, log_dets = block.couple(maps)
    for x, z, log_det_BHW in zip(maps, latents, log_dets, strict=True):
        assert torch.equal(z.sort(1).values, x.sort(1).values)
        assert not log_det_BHW.any()


@pytest.mark.parametrize("clamp", [0.3, 1.9])
def test_log_scales_stay_within_the_clamp(clamp):
    s = torch.tensor([-1e6, -1.0, -1e-3, 0.0, 1e-3, 1.0, 1e6], dtype=torch.float64)
    bounded = soft_clamp(s, clamp)
    assert bounded.abs().max() < clamp
    assert bounded.abs().max() > 0.99 * clamp
    assert bool((bounded.diff() > 0).all())
    torch.testing.assert_close(bounded, -bounded.flip(0))
    # Half of the bound if the argument is the bound.
    assert soft_clamp(torch.tensor(clamp), clamp).item() == pytest.approx(clamp / 2)
    block = coupling(bottleneck, clamp=clamp)
    with torch.no_grad():
        block.s2.gamma.fill_(1e4)
        block.s1.gamma.fill_(1e4)
        _, (log_det_BHW,) = block.couple([torch.randn(2, 6, 4, 4)])
    assert log_det_BHW.abs().max() <= 6 * clamp


def test_freia_composes_it_in_a_sequence_and_in_a_graph():
    torch.manual_seed(0)
    arguments = {"subnet": bottleneck, "clamp": 1.0}
    sequence = ff.SequenceINN(6, 4, 4)
    sequence.append(fm.ActNorm)
    for _ in range(2):
        sequence.append(GraphCoupling, **arguments)
        sequence.append(fm.PermuteRandom, seed=0)
    randomised(sequence).double()
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    z, log_det_B = sequence(x)
    y, inverse_log_det_B = sequence(z, rev=True)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(inverse_log_det_B, -log_det_B)
    assert log_det_B.shape == (3,)

    first, second, condition = ff.InputNode(4, 2, 2), ff.InputNode(4, 2, 2), ff.ConditionNode(3, 2, 2)
    node = ff.Node(
        [first.out0, second.out0], GraphCoupling, {"subnet": MessageSubnet, "clamp": 1.0}, conditions=[condition]
    )
    outputs = [ff.OutputNode(node.out0), ff.OutputNode(node.out1)]
    graph = randomised(ff.GraphINN([first, second, condition, node, *outputs])).double()
    maps, c = inputs({"nodes": 2, "channels": 4, "condition": 3}, (2, 2), torch.float64)
    latents, log_det_B = graph(maps, c=c[:1])
    restored, _ = graph(latents, c=c[:1], rev=True)
    assert log_det_B.shape == (2,)
    for x, y in zip(maps, restored, strict=True):
        torch.testing.assert_close(y, x)


def test_nodes_share_one_number_of_channels_of_at_least_two():
    for dims in ([(4, 1, 1), (6, 1, 1)], [(1, 1, 1)]):
        with pytest.raises(ValueError, match="share one number of channels, at least 2"):
            GraphCoupling(dims, bottleneck, clamp=1.0)


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_of_inputs_and_weights_are_those_of_finite_differences(case):
    block = coupling(**case).double()
    maps, condition = inputs(case, (2, 3), torch.float64, images=1)
    names = [name for name, _ in block.named_parameters()]

    def couple(*tensors):
        weights = dict(zip(names, tensors[len(maps) :], strict=True))
        outputs, log_det_B = torch.func.functional_call(block, weights, (list(tensors[: len(maps)]), condition))
        return (*outputs, log_det_B)

    leaves = [tensor.detach().requires_grad_() for tensor in (*maps, *block.parameters())]
    assert torch.autograd.gradcheck(couple, leaves, fast_mode=True)
