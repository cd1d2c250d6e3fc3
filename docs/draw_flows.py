"""Draws the coupling graphs of the four flows: ``python docs/draw_flows.py [docs/flows.png]``.

The figure follows the code: sizes of maps come from the backbone and the recipe, and a graph's nodes are the latents
that the flow returns. Messages are found by changing one node and comparing the scales and shifts of the others.

Shapes: B images, C channels, H rows, W columns of a map.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import matplotlib
import timm
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import nn

from defectflow import FLOWS, Flow, config_for_features
from defectflow.config import Shape
from defectflow.coupling import GraphCoupling
from sprue.config import FeatureSettings
from sprue.inference.backbone import Backbone
from sprue.inference.spec import FeatureSpec
from sprue.params import read_recipe

RECIPES = Path(__file__).parents[1] / "models/recipes"
INK, MUTED, FAINT = "#1f2933", "#52606d", "#cbd2d9"
HALF_A, HALF_B, CONDITION, SUBNET = "#9ec5e8", "#f6c48a", "#b8dfb0", "#ffffff"
MESSAGE = "#b3261e"


@dataclass(frozen=True)
class Graph:
    """The graph of a flow.

    Attributes:
        flow: The flow of the recipe's structure, with few channels.
        settings: The flow's config at its published size.
        shapes: Shapes of the maps that the flow reads.
        nodes: Sizes (rows, columns) of the nodes.
        messages: Pairs (from, to) of nodes.
        condition_channels: Channels of each node's condition.
    """

    flow: Flow
    settings: dict[str, Any]
    shapes: list[Shape]
    nodes: list[tuple[int, int]]
    messages: set[tuple[int, int]]
    condition_channels: list[int]


def map_shapes(features: FeatureSettings) -> list[list[Shape]]:
    """Shapes of a backbone's maps, scale by scale, computed on the meta device."""
    spec = FeatureSpec(**features.model_dump(), weights_digest="", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    with torch.device("meta"):
        backbone = Backbone(spec, timm.create_model(spec.backbone))
        maps = backbone(torch.zeros(1, spec.input_size, spec.input_size, 3, dtype=torch.uint8))
    shapes = [(map_BCHW.shape[1], map_BCHW.shape[2], map_BCHW.shape[3]) for map_BCHW in maps]
    per_scale = len(spec.blocks)
    return [shapes[first : first + per_scale] for first in range(0, len(shapes), per_scale)]


def find_messages(
    block: GraphCoupling, nodes: Sequence[tuple[int, int]], condition_channels: int
) -> set[tuple[int, int]]:
    """Pairs (from, to) of nodes where a change of the first one's input changes the scales and shifts of the second."""
    inputs = [torch.randn(1, block.halves[0] + condition_channels, *size) for size in nodes]
    before, pairs = block.s1(inputs), set()
    for source in range(len(nodes)):
        changed = [x + 1.0 if node == source else x for node, x in enumerate(inputs)]
        for to, (x, y) in enumerate(zip(before, block.s1(changed), strict=True)):
            if to != source and not torch.equal(x, y):
                pairs.add((source, to))
    return pairs


@torch.no_grad()
def build_graph(recipe: str) -> Graph:
    """Builds the flow of a recipe with few channels and runs it."""
    torch.manual_seed(0)
    sections = read_recipe(RECIPES / f"{recipe}.yaml")
    scales = map_shapes(sections.features)
    name = sections.flow.name
    settings = config_for_features(name, scales, 200, sections.flow.overrides)
    shapes = [shape for scale in scales for shape in scale]
    config = FLOWS[name].config_class(**settings)
    small: dict[str, Any] = {"channels": (4,) * len(shapes), "steps": 1}
    small |= {field: 4 for field in ("hidden", "bottleneck", "adapted") if field in settings}
    flow = FLOWS[name](replace(config, **small))
    for parameter in flow.parameters():
        nn.init.normal_(parameter)
    views = settings.get("views", 1)
    maps = [torch.randn(1, 4, *shape[1:]) for _ in range(views) for shape in shapes]
    latents, _ = flow.eval()(maps)
    sizes = [(z.shape[2], z.shape[3]) for z in latents]
    channels = [c.shape[1] for c in flow.condition(latents) or [torch.empty(1, 0)] * len(latents)]
    messages: set[tuple[int, int]] = set()
    if hasattr(flow, "blocks"):  # DNFAD has a chain of one-node blocks for each branch instead
        messages = find_messages(cast(GraphCoupling, flow.blocks[0]), sizes, channels[0])
    return Graph(flow, settings, [shapes[index] for index in config.maps], sizes, messages, channels)


def node(ax: Axes, x: float, y: float, side: float, letters: bool = True) -> None:
    """A feature map: its channels in two halves."""
    for left, colour, letter in ((x - side / 2, HALF_A, "a"), (x, HALF_B, "b")):
        ax.add_patch(Rectangle((left, y - side / 2), side / 2, side, facecolor=colour, edgecolor=INK, linewidth=1.1))
        if letters:
            ax.text(left + side / 4, y, letter, ha="center", va="center", fontsize=12, style="italic", color=INK)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, both: bool = False, **style: Any
) -> None:
    """An arrow; `both` gives it two heads."""
    head = "<|-|>" if both else "-|>"
    style = {"linewidth": 1.6, "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0} | style
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle=head, color=colour, **style))


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = SUBNET) -> None:
    """A labelled box, centred at a point."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=colour, edgecolor=INK, linewidth=1.1,
    )  # fmt: skip
    ax.add_patch(shape)
    ax.text(x, y, text, ha="center", va="center", fontsize=12, color=INK, linespacing=1.25)


def panel(ax: Axes, size: tuple[float, float], title: str, lines: Sequence[str]) -> None:
    """An empty panel with a title above and lines below."""
    width, height = size
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    frame = FancyBboxPatch(
        (0.04, 0.04), width - 0.08, height - 0.08, boxstyle="round,pad=0,rounding_size=0.15",
        facecolor="#fafbfc", edgecolor=FAINT, linewidth=1.2,
    )  # fmt: skip
    ax.add_patch(frame)
    ax.text(0.25, height - 0.3, title, fontsize=14.5, weight="bold", va="center", color=INK)
    for index, line in enumerate(reversed(lines)):
        ax.text(0.25, 0.28 + 0.3 * index, line, fontsize=12, va="center", color=MUTED)


def side(rows: int) -> float:
    """Side of a node's square, growing slower than the map."""
    return 0.2 * rows**0.55


def draw_messages(ax: Axes, graph: Graph, centres: Sequence[tuple[float, float]], gap: Sequence[float]) -> None:
    """The messages between nodes; an arrow keeps a node's `gap` from its centre."""
    for source, to in sorted(graph.messages):
        both = (to, source) in graph.messages
        if both and to < source:
            continue
        (x0, y0), (x1, y1) = centres[source], centres[to]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        start = (x0 + dx * gap[source], y0 + dy * gap[source])
        arrow(ax, start, (x1 - dx * gap[to], y1 - dy * gap[to]), MESSAGE, both)


def draw_block(ax: Axes, size: tuple[float, float]) -> None:
    """One coupling of one node, from left to right."""
    line = "s2 reads the b halves of all nodes, transforms the a halves; s1 reads those, transforms the b halves"
    panel(ax, size, "The coupling block of all four flows", [line])
    low, middle, high = 1.05, 1.65, 2.25
    node(ax, 0.85, middle, 0.9)
    box(ax, 2.25, middle, 1.1, 0.6, "permute\nchannels")
    arrow(ax, (1.35, middle), (1.67, middle))
    for y, lane, x in ((high, HALF_A, 4.55), (low, HALF_B, 8.05)):
        ax.plot([2.83, 3.05, 9.95, 10.15], [middle, y, y, middle], color=lane, linewidth=5, solid_joinstyle="round")
        box(ax, x, y, 1.5, 0.4, r"$\times\, e^{s} + t$", lane)
    ax.text(3.1, high + 0.13, "a", fontsize=13, style="italic", color=INK)
    ax.text(3.1, low - 0.28, "b", fontsize=13, style="italic", color=INK)
    for name, x, start, end in (("s2", 4.55, low, high), ("s1", 8.05, high, low)):
        sign = 1 if end > start else -1
        box(ax, x, middle, 0.72, 0.4, name)
        arrow(ax, (x, start), (x, middle - sign * 0.22))
        arrow(ax, (x, middle + sign * 0.22), (x, end - sign * 0.22))
        ax.text(x - 0.82, middle, "other\nnodes", ha="right", va="center", fontsize=12, color=MESSAGE, linespacing=1.1)
        arrow(ax, (x - 0.76, middle), (x - 0.38, middle), MESSAGE)
        box(ax, x + 1.2, middle, 0.95, 0.4, "condition", CONDITION)
        arrow(ax, (x + 0.72, middle), (x + 0.38, middle))
    arrow(ax, (10.15, middle), (10.4, middle))
    node(ax, 10.95, middle, 0.9)


def draw_patchflow(ax: Axes, size: tuple[float, float]) -> None:
    """The pyramid's maps, fused into one node."""
    graph = build_graph("patchflow-mvtec")
    config = graph.settings
    lines = [
        f"s1, s2: 1×1 convolutions through {config['bottleneck']} channels",
        f"1 node, {config['steps']} block: each position independently",
    ]
    panel(ax, size, "PatchFlow", lines)
    columns = len({shape[0] for shape in graph.shapes})
    for index, (channels, rows, _) in enumerate(graph.shapes):
        x, y = 0.65 + 0.72 * (index % columns), 2.62 - 0.66 * (index // columns)
        edge = 0.058 * rows**0.5
        ax.add_patch(Rectangle((x - edge / 2, y - edge / 2), edge, edge, facecolor=FAINT, edgecolor=INK, linewidth=0.9))
        if index < columns:
            ax.text(x, 3.04, f"{channels}", ha="center", va="center", fontsize=11, color=MUTED)
    arrow(ax, (2.5, 2.02), (2.82, 2.02))
    box(ax, 3.4, 2.02, 1.1, 0.66, "fuse,\nwhiten")
    arrow(ax, (3.98, 2.02), (4.28, 2.02))
    (rows, columns_of_node), edge = graph.nodes[0], 1.1
    node(ax, 4.9, 2.02, edge)
    fused = sum(shape[0] for shape in graph.shapes)
    ax.text(
        4.9, 1.2, f"{rows}×{columns_of_node}\n{fused} → {config['adapted']}", ha="center", va="center", fontsize=12,
        color=MUTED, linespacing=1.2,
    )  # fmt: skip


def draw_csflow(ax: Axes, size: tuple[float, float]) -> None:
    """The scales, in a row."""
    graph = build_graph("csflow-mvtec")
    config = graph.settings
    lines = [
        f"s1, s2: {config['kernels'][0]}×{config['kernels'][0]}, in the last block {config['kernels'][1]}×"
        f"{config['kernels'][1]}, hidden {config['hidden']}",
        f"{len(graph.nodes)} scales, {config['steps']} blocks: messages are summed",
    ]
    panel(ax, size, "CS-Flow", lines)
    centres = [(1.2, 2.05), (3.2, 2.05), (4.8, 2.05)]
    sides = [side(rows) for rows, _ in graph.nodes]
    for (x, y), edge, (rows, columns) in zip(centres, sides, graph.nodes, strict=True):
        node(ax, x, y, edge)
        ax.text(x, 1.2, f"{rows}×{columns}", ha="center", va="center", fontsize=12, color=MUTED)
    draw_messages(ax, graph, centres, [edge / 2 + 0.06 for edge in sides])
    ax.text(3.2, 3.0, f"{graph.shapes[0][0]} channels each", ha="center", fontsize=12, color=MUTED)


def draw_dnfad(ax: Axes, size: tuple[float, float]) -> None:
    """One map in two branches."""
    graph = build_graph("dnfad-mvtec")
    config = graph.settings
    lines = [
        "s1, s2: dynamic spatial attention, two 3×3",
        f"1 map, {len(graph.nodes)} branches of {config['steps']} blocks: no messages",
    ]
    panel(ax, size, "DNFAD", lines)
    (rows, columns), fused = graph.nodes[0], sum(shape[0] for shape in graph.shapes)
    for index in range(len(graph.shapes)):
        corner = (0.35 + 0.16 * index, 2.05 - 0.16 * index)
        ax.add_patch(Rectangle(corner, 0.95, 0.95, facecolor=FAINT, edgecolor=INK, linewidth=1.1))
    ax.text(0.92, 1.48, f"{rows}×{columns}\n{fused} channels", ha="center", va="center", fontsize=12, color=MUTED)
    for branch, channels, y in zip(config["branches"], graph.condition_channels, (2.95, 1.75), strict=True):
        arrow(ax, (1.54, 2.35), (2.32, y))
        node(ax, 2.85, y, 0.9)
        ax.text(3.42, y + (0.24 if channels else 0), branch, va="center", fontsize=12.5, color=INK)
        if channels:
            box(ax, 4.5, y - 0.15, 2.1, 0.4, f"position, {channels} channels", CONDITION)


def draw_multiflow(ax: Axes, size: tuple[float, float]) -> None:
    """The views, with the top view in the middle of the ring."""
    graph = build_graph("multiflow-realiad")
    config = graph.settings
    lines = [
        f"s1, s2: {config['kernels'][0]}×{config['kernels'][0]}, in the last block {config['kernels'][1]}×"
        f"{config['kernels'][1]}, hidden {config['hidden']}",
        f"{len(graph.nodes)} views, the top view inside, {config['steps']} blocks: mean of messages",
    ]
    panel(ax, size, "Multi-Flow", lines)
    centres = [(2.5, 2.27), (0.7, 2.27), (2.5, 3.42), (4.3, 2.27), (2.5, 1.12)]
    for x, y in centres:
        node(ax, x, y, 0.62)
    draw_messages(ax, graph, centres, [0.4] * len(centres))
    box(ax, 4.75, 3.5, 1.65, 0.4, f"noise, {graph.condition_channels[0]} channel", CONDITION)


def main(target: Path) -> None:
    """Draws the figure."""
    matplotlib.use("Agg")
    plt.rcParams["font.family"] = "DejaVu Sans"
    wide, upper, lower = (11.7, 3.0), (5.8, 3.65), (5.8, 4.1)
    figure = plt.figure(figsize=(12, 11.15))
    for draw, extent, left, bottom in (
        (draw_block, wide, 0.15, 8.05),
        (draw_patchflow, upper, 0.15, 4.3),
        (draw_csflow, upper, 6.05, 4.3),
        (draw_dnfad, lower, 0.15, 0.1),
        (draw_multiflow, lower, 6.05, 0.1),
    ):
        draw(figure.add_axes((left / 12, bottom / 11.15, extent[0] / 12, extent[1] / 11.15)), extent)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("flows.png"))
