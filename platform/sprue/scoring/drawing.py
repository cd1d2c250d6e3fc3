"""Draws heat maps of scored samples in Ray tasks, as the service does.

Shapes: N samples, V views, H rows, W columns of position scores.
"""

import hashlib

from upath import UPath

from sprue.errors import SprueError
from sprue.inference.calibration import Calibration
from sprue.inference.detector import anomaly_map
from sprue.inference.heatmap import heatmap_png
from sprue.inference.images import open_image
from sprue.scoring.decoding import Batch, Record, as_column, from_column, note_error, read_file
from sprue.store import write_bytes


def draw(batch: Batch, root: UPath, folder: UPath, views: tuple[str, ...], calibration: Calibration) -> Batch:
    """Writes the heat map of each sample's view with the highest score; see `heatmap_path`.

    Takes ``position_scores`` [N, V, H, W] out of the batch; records get ``heatmap_view`` and
    ``predicted_mask_fraction``. Images are decoded again rather than passed on: one may take 300 MB.
    """
    maps_NVHW, records = batch.pop("position_scores"), from_column(batch["record"])
    for index, record in enumerate(records):
        path = folder / heatmap_path(record["name"])
        if record["error"]:
            path.unlink(missing_ok=True)  # of an image that could be read once
        else:
            view = int(batch["image_score"][index].argmax())
            try:
                image = open_image(_unchanged(root, record, view), record["paths"][view])
                map_HW = anomaly_map(maps_NVHW[index, view], (image.height, image.width))
                png, fraction = heatmap_png(image, map_HW, calibration)
            except (SprueError, OSError) as error:
                note_error(record, error, record["paths"][view])
                continue
            write_bytes(path, png)
            record |= {"heatmap_view": views[view], "predicted_mask_fraction": fraction}
    return batch | {"record": as_column(records)}


def heatmap_path(name: str) -> str:
    """The path of a sample's heat map, below its version's folder."""
    return f"heatmaps/{name}.png"


def _unchanged(root: UPath, record: Record, view: int) -> bytes:
    """The content of the file that was scored; raises OSError if it is another now."""
    data = read_file(root, record["paths"][view])
    if hashlib.sha256(data).hexdigest() != record["sha256"][view]:
        raise OSError("it has changed while it was scored")
    return data
