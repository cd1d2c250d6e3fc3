"""Pictures for people: what was found where, beside what is there.

Shapes: H rows, W columns of a picture.
"""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sprue.inference.heatmap import colour, overlay

matplotlib.use("Agg")

TILE = 256
"""Side of each of a panel's four pictures, in pixels."""

GAP = 8
CAPTION = 22


def panel(
    image: Image.Image,
    mask_HW: NDArray[np.bool_] | None,
    heat_HW: NDArray[np.float32],
    marked_HW: NDArray[np.bool_],
    caption: str,
) -> Image.Image:
    """Input, ground truth, heat and overlay side by side, with a caption below.

    Args:
        image: The picture.
        mask_HW: Its ground truth, or None.
        heat_HW: Its heat, 0..1; see `sprue.inference.heatmap.heat`.
        marked_HW: Which pixels are marked.
        caption: One line.
    """
    truth = Image.fromarray(
        (mask_HW if mask_HW is not None else np.zeros(image.size[::-1], bool)).astype(np.uint8) * 255
    )
    tiles = [image.convert("RGB"), truth.convert("RGB"), colour(heat_HW), overlay(image, heat_HW, marked_HW)]
    canvas = Image.new("RGB", (len(tiles) * (TILE + GAP) - GAP, TILE + CAPTION), "white")
    for index, tile in enumerate(tiles):
        canvas.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), (index * (TILE + GAP), 0))
    ImageDraw.Draw(canvas).text((4, TILE + 4), caption, fill="black", font_size=13)
    return canvas


def stack(panels: list[Image.Image]) -> Image.Image:
    """Panels one below the other."""
    canvas = Image.new("RGB", (max(p.width for p in panels), sum(p.height + GAP for p in panels) - GAP), "white")
    top = 0
    for each in panels:
        canvas.paste(each, (0, top))
        top += each.height + GAP
    return canvas


def histogram(good_N: NDArray[np.float32], defective_N: NDArray[np.float32], threshold: float, title: str) -> Figure:
    """The scores of good and defective test pictures, and the calibrated threshold.

    Scores that span far more than the good ones do, as those of a flow may, are on a logarithmic axis.
    """
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    scores_N = np.concatenate([good_N, defective_N])
    bins = np.histogram_bin_edges(scores_N, bins=40).tolist()
    if len(scores_N) and scores_N.min() > 0 and scores_N.max() > 20 * threshold:
        bins = np.geomspace(scores_N.min(), scores_N.max(), 41).tolist()
        axes.set_xscale("log")
    axes.hist(good_N, bins=bins, alpha=0.65, label=f"good ({len(good_N)})", color="#3b6fb6")
    if len(defective_N):
        axes.hist(defective_N, bins=bins, alpha=0.65, label=f"defective ({len(defective_N)})", color="#d0352b")
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="calibrated threshold")
    axes.set(title=title, xlabel="score", ylabel="test pictures")
    axes.legend()
    return figure
