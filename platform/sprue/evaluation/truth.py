"""The ground truth of a test split: which pixels are anomalous.

Shapes: N samples, V views of a sample, M images with ground truth, H rows, W columns of an image or of a feature map.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from upath import UPath

from sprue.data.masks import read_mask
from sprue.evaluation.pixels import PixelCounts, count_pixels
from sprue.inference.detector import anomaly_map


def mask_of(root: UPath, row: Any) -> NDArray[np.bool_] | None:
    """A manifest row's ground truth [H, W], True where the image is anomalous; None if there is no mask."""
    return read_mask(root, row.mask_path) if row.mask_path else None


@dataclass(frozen=True)
class GroundTruth:
    """The images of a test split that have ground truth: those of good samples, and of samples with a mask.

    Attributes:
        root: Folder of the dataset.
        rows: Their rows of the manifest.
        index_M: Their indices among all images, a sample's views in sequence.
        views: Images of a sample.
    """

    root: UPath
    rows: pd.DataFrame
    index_M: NDArray[np.integer[Any]]
    views: int

    @classmethod
    def of(cls, images: pd.DataFrame, views: int, root: UPath) -> Self:
        """The ground truth of the manifest's rows of a test split."""
        has_mask_N = (images["mask_path"] != "").to_numpy().reshape(-1, views).any(1)
        has_truth_N = (images["label"].to_numpy()[::views] == 0) | has_mask_N
        index_M = np.flatnonzero(np.repeat(has_truth_N, views))
        return cls(root, images.iloc[index_M].reset_index(drop=True), index_M, views)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.rows)

    @property
    def groups_M(self) -> NDArray[np.integer[Any]]:
        """The sample of each image: images of one sample are not independent."""
        return self.index_M // self.views

    def mask(self, index: int) -> NDArray[np.bool_] | None:
        """An image's mask [H, W]; None for an image without anomalous pixels."""
        return mask_of(self.root, self.rows.iloc[index])

    def map(self, position_scores_NVHW: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        """An image's anomaly map at its own size, from the position scores of all samples."""
        sample, view = divmod(int(self.index_M[index]), self.views)
        row = self.rows.iloc[index]
        return anomaly_map(position_scores_NVHW[sample, view], (int(row["height"]), int(row["width"])))

    def count(self, position_scores_NVHW: NDArray[np.float32]) -> PixelCounts:
        """The pixels' counts, from which the metrics of localisation follow.

        Raises:
            UnreadableImageError: If a mask can't be decoded.
        """
        return count_pixels(lambda index: self.map(position_scores_NVHW, index), self.mask, len(self))
