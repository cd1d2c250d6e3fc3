"""How much of the machine a training step of each flow uses: ``python benchmarks/training_step.py``.

Prints, for each flow at the size of its paper's features: the convolutions' work in a step (forward and backward, from
the architecture; what is computed twice or besides is not counted), the step's time and what it consists of, the rate
as a fraction of what the same cores reach on a 2048 x 2048 matrix product just before and after, and the peak memory.
Processes keep freed memory, as those that fit do.
CS-Flow is also compared with its network as its authors wrote it, and with recomputation; all flows with themselves in
bfloat16, which fits use where the hardware multiplies in it.

Shapes: B images, C channels, H rows, W columns of a map.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from defectflow import Flow, build_flow
from sprue.inference.memory import keep_freed_memory

THREADS = 2
CASES = {
    "csflow": (
        {"channels": (192,) * 3, "hidden": 256, "steps": 4, "kernels": (3, 5)},
        [(16, 192, 12, 12), (16, 192, 6, 6), (16, 192, 3, 3)],
    ),
    "patchflow": (
        {"channels": (40, 80, 192) * 3, "adapted": 768, "bottleneck": 128, "steps": 4},
        [(8, c, 48 >> (n + s), 48 >> (n + s)) for s in range(3) for n, c in enumerate((40, 80, 192))],
    ),
    "dnfad": ({"channels": (192,), "steps": 4}, [(16, 192, 12, 12)]),
    "multiflow": ({"channels": (192,), "views": 5, "steps": 6, "hidden": 64}, [(8, 192, 12, 12)] * 5),
}


class AuthorsSubnet(nn.Module):
    """CS-Flow's cross-convolutions as its authors wrote them: a convolution a message, summed afterwards."""

    def __init__(self, c_in: int, c_out: int, hidden: int, kernel: int) -> None:
        super().__init__()

        def conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2)

        self.lift = nn.ModuleList(conv(c_in, hidden) for _ in range(3))
        self.own = nn.ModuleList(conv(hidden, c_out) for _ in range(3))
        self.up = nn.ModuleList(conv(hidden, c_out) for _ in range(2))
        self.down = nn.ModuleList(conv(hidden, c_out, 2) for _ in range(2))
        self.gamma = nn.Parameter(torch.zeros(3))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, c_in, H, W] to [B, c_out, H, W]."""
        hidden = [F.leaky_relu(lift(x), 0.1) for lift, x in zip(self.lift, maps, strict=True)]
        out = [own(h) for own, h in zip(self.own, hidden, strict=True)]
        for finer in range(2):
            upsampled = F.interpolate(hidden[finer + 1], scale_factor=2, mode="bilinear", align_corners=False)
            out[finer] = out[finer] + self.up[finer](upsampled)
            out[finer + 1] = out[finer + 1] + self.down[finer](hidden[finer])
        return [x * gamma for x, gamma in zip(out, self.gamma, strict=True)]


def authors_csflow() -> Flow:
    """CS-Flow with the authors' subnetworks in place of ours."""
    config, _ = CASES["csflow"]
    flow = build_flow("csflow", **config)
    for block, kernel in zip(flow.blocks, (3, 3, 3, 5), strict=True):
        block.s1 = AuthorsSubnet(96, 192, 256, kernel)
        block.s2 = AuthorsSubnet(96, 192, 256, kernel)
    return flow


def training_step(
    flow: Flow, maps: list[Tensor], fused: bool, bfloat16: bool
) -> tuple[Callable[[], None], dict[str, float]]:
    """A training step, and the seconds that its parts took the last time."""
    optimizer = torch.optim.Adam(flow.parameters(), 2e-4, fused=fused)
    seconds: dict[str, float] = {}

    def step() -> None:
        marks = [time.perf_counter()]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = flow.nll(maps).mean()
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        parts = zip(("forward", "backward", "norm", "optimizer"), marks, marks[1:], strict=False)
        seconds.update({name: end - start for name, start, end in parts})

    return step, seconds


def matrix_product_rate(repeats: int = 5) -> float:
    """GFLOP/s of the best of some 2048 x 2048 products in float32."""
    a, b = torch.randn(2, 2048, 2048)
    return max(2 * 2048**3 / timed(lambda: a @ b) for _ in range(repeats)) / 1e9


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def prepared(name: str) -> tuple[Flow, list[Tensor]]:
    """A flow with gammas that are not zero, and its input."""
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    kind = name.split("-")[0]
    config, shapes = CASES[kind]
    flow = authors_csflow() if name == "csflow-authors" else build_flow(kind, **config)
    flow.recompute = name == "csflow-recomputing"
    for parameter in flow.parameters():
        if parameter.ndim in (1, 3) and not parameter.any():
            nn.init.constant_(parameter, 0.1)
    maps = [torch.randn(shape) for shape in shapes]
    flow.fit_adaptor([maps])
    return flow.train(), maps


def work(name: str) -> float:
    """GFLOP of the couplings' convolutions in a step, forward and backward; PatchFlow's 1x1 are matrix products."""
    kind = "bmm" if name.startswith("patchflow") else "conv"
    flow, maps = prepared(name)
    nodes = flow.adapt(maps)
    with FlopCounterMode(display=False) as counter:
        latents, log_dets = flow.couple(nodes, flow.condition(nodes))
        sum(each.sum() for each in (*latents, *log_dets)).backward()
    return sum(flop for op, flop in counter.get_flop_counts()["Global"].items() if kind in str(op)) / 1e9


def measure(name: str, rounds: int, pipe) -> None:
    """Sends the matrix-product rate, the median seconds of a step and of its parts, and the peak memory in MiB."""
    keep_freed_memory()
    flow, maps = prepared(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, parts = training_step(flow, maps, fused=name != "csflow-authors", bfloat16=name.endswith("bfloat16"))
    step()
    step()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rates, seconds, splits = [matrix_product_rate()], [], []
    for _ in range(rounds):
        seconds.append(timed(step))
        splits.append(dict(parts))
        rates.append(matrix_product_rate())
    medians = {part: statistics.median(each[part] for each in splits) for part in splits[0]}
    pipe.send((statistics.median(rates), statistics.median(seconds), medians, peak))


def in_own_process(name: str, rounds: int) -> tuple[float, float, dict[str, float], float]:
    """`measure` in a process of its own, for the memory's sake."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, rounds, sender))
    process.start()
    sender.close()  # so that a process that dies ends the waiting
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each flow (default: %(default)s)")
    rounds = parser.parse_args().rounds
    table = Table(
        "flow", "GFLOP", "step, s", "forward", "backward", "norm", "optimizer", "GFLOP/s", "of a product", "MiB"
    )
    times = {}
    variants = [name for flow in CASES for name in (flow, f"{flow}-bfloat16")]
    for name in ("csflow-authors", "csflow-recomputing", *variants):
        gflop = work(name.split("-")[0])
        rate, times[name], parts, peak = in_own_process(name, rounds)
        table.add_row(
            name, f"{gflop:.0f}", f"{times[name]:.2f}", *(f"{parts[part]:.2f}" for part in parts),
            f"{gflop / times[name]:.0f}", f"{gflop / times[name] / rate:.0%}", f"{peak:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)
    for name in ("csflow", "csflow-bfloat16"):
        print(f"{name}: {times['csflow-authors'] / times[name]:.2f} times as fast as its authors' network in float32")
    for name in CASES:
        print(f"{name} in bfloat16: {times[name] / times[f'{name}-bfloat16']:.2f} times as fast as in float32")


if __name__ == "__main__":
    main()
