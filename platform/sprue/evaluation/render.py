"""Images for people: panels of inputs, ground truths and heat maps, and histograms of scores.

Shapes: H rows, W columns of an image, N images.
"""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sprue.inference.calibration import Calibration
from sprue.inference.heatmap import colour, heat, overlay

matplotlib.use("Agg")
# Text stays text: as paths it would take more time, and twice the size.
matplotlib.rcParams["svg.fonttype"] = "none"

TILE = 256
"""Side of each of a panel's four images, in pixels."""

GAP = 8
CAPTION = 22

THUMBNAIL_SIDE = (104, 132)
"""Rows and columns of each of a thumbnail's two images, at most."""

THUMBNAIL_GAP = 4
THUMBNAIL_BYTES = 8 * 1024
"""Of a thumbnail's file, at most: an overview shows hundreds."""


def panel(
    image: Image.Image,
    mask_HW: NDArray[np.bool_] | None,
    heat_HW: NDArray[np.float32],
    predicted_mask_HW: NDArray[np.bool_],
    caption: str,
) -> Image.Image:
    """Input, ground truth, heat map and overlay side by side, with a caption of one line below.

    The mask is None for a good image. The heat is in 0..1; see `sprue.inference.heatmap.heat`. The overlay outlines the
    predicted mask.
    """
    truth = Image.fromarray(
        (mask_HW if mask_HW is not None else np.zeros(image.size[::-1], bool)).astype(np.uint8) * 255
    )
    tiles = [image.convert("RGB"), truth.convert("RGB"), colour(heat_HW), overlay(image, heat_HW, predicted_mask_HW)]
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


def thumbnail(
    image: Image.Image, mask_HW: NDArray[np.bool_] | None, map_HW: NDArray[np.float32], calibration: Calibration
) -> Image.Image:
    """A small image with its ground truth outlined, beside its heat map with the predicted mask outlined.

    `map_HW` is the anomaly map at the size of `thumbnail_size`; the mask has the image's size and is None for a good
    image.
    """
    size = map_HW.shape[::-1]
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    truth_HW = np.zeros(map_HW.shape, bool)
    if mask_HW is not None:
        # The box filter loses no region, however small.
        shrunk = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
        truth_HW = np.asarray(shrunk) > 0
    tiles = [
        overlay(small, np.zeros(map_HW.shape, np.float32), truth_HW),
        overlay(small, heat(map_HW, calibration), calibration.predicted_mask(map_HW)),
    ]
    canvas = Image.new("RGB", (2 * size[0] + THUMBNAIL_GAP, size[1]), "white")
    for index, tile in enumerate(tiles):
        canvas.paste(tile, (index * (size[0] + THUMBNAIL_GAP), 0))
    return canvas


def thumbnail_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of each of a thumbnail's two images, for an image of some rows and columns."""
    scale = min(THUMBNAIL_SIDE[0] / height, THUMBNAIL_SIDE[1] / width)
    return max(1, round(scale * height)), max(1, round(scale * width))


def encoded(image: Image.Image) -> bytes:
    """A thumbnail as a WebP file of at most `THUMBNAIL_BYTES`, of the highest quality that fits."""
    for quality in (85, 70, 50, 30, 10, 0):
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=quality, method=6)
        if stream.tell() <= THUMBNAIL_BYTES:
            break
    return stream.getvalue()


def figure(width: float) -> tuple[Figure, Axes]:
    """A figure of some inches with one pair of axes; its margins are fixed, as to measure its texts takes long."""
    drawing = Figure(figsize=(width, 3.2))
    axes = drawing.subplots()
    drawing.subplots_adjust(left=0.7 / width, right=1 - 0.15 / width, bottom=0.16, top=0.9)
    return drawing, axes


def histogram(
    scores_N: NDArray[np.float32], labels_N: NDArray[np.integer[Any]], threshold: float, title: str
) -> Figure:
    """A histogram of the scores of good and defective test samples, with the calibrated threshold.

    The axis is logarithmic if the highest score lies far above the threshold, as it may with a flow.
    """
    drawing, axes = figure(width=7.0)
    good_N, defective_N = scores_N[labels_N == 0], scores_N[labels_N == 1]
    bins = np.histogram_bin_edges(scores_N, bins=40).tolist()
    if len(scores_N) and scores_N.min() > 0 and scores_N.max() > 20 * threshold:
        bins = np.geomspace(scores_N.min(), scores_N.max(), 41).tolist()
        axes.set_xscale("log")
    for what, found_N, fill in (("good", good_N, "#3b6fb6"), ("defective", defective_N, "#d0352b")):
        if what == "good" or len(found_N):
            counts, _ = np.histogram(found_N, bins)
            axes.stairs(counts, bins, fill=True, alpha=0.65, label=f"{what} ({len(found_N)})", color=fill)
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="calibrated threshold")
    axes.set(title=title, xlabel="score", ylabel="test samples")
    axes.legend()
    return drawing
