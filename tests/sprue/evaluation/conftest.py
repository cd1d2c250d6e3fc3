"""Detectors with features and pictures of their own, to be measured: of single pictures, and of several views."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from upath import UPath

from defectflow import build_flow
from sprue.evaluation.evaluate import calibrate, evaluate
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.detector import Scoring
from sprue.inference.spec import FeatureSpec

SIZES = [(40, 30), (25, 50), (32, 32)]


class Bench:
    """Pictures, masks and features of one class: 30 to calibrate and 24 to test, half of them defective."""

    def __init__(self, root):
        rng = np.random.default_rng(0)
        self.root = UPath(root / "data")
        maps = [rng.normal(size=(54, 6, 8, 8)).astype(np.float16)]
        rows = []
        for index in range(24):
            height, width = SIZES[index % 3]
            defective = index % 2 == 1
            mask = np.zeros((height, width), np.uint8)
            if defective:
                mask[height // 2 :, : width // 3] = 255
                maps[0][30 + index, :, 4:, :2] += 0.7 + 0.1 * index
            # Every third defective picture has no ground truth.
            mask_path = f"{index}_mask.png" if defective and index % 3 else ""
            self.save(f"{index}.png", rng.integers(0, 256, (height, width), dtype=np.uint8))
            if mask_path:
                self.save(mask_path, mask)
            rows.append(
                {
                    "sample_id": f"{index}.png",
                    "view": "",
                    "path": f"{index}.png",
                    "mask_path": mask_path,
                    "label": int(defective),
                    "defect_type": "dent" if defective else "good",
                    "height": height,
                    "width": width,
                }
            )
        digests = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(54)]
        write_part(UPath(root / "table"), digests, maps)
        self.table = FeatureTable(UPath(root / "table"))
        self.calibration = pd.DataFrame(
            {"sha256": digests[:30], "sample_id": digests[:30], "view": "", "height": 40, "width": 24}
        )
        self.test = pd.DataFrame(rows).assign(sha256=digests[30:])
        flow = build_flow("patchflow", channels=(6,), adapted=6, bottleneck=4, neighbourhood=1, stride=2)
        self.flow = flow.fit_adaptor([[torch.from_numpy(maps[0][:30]).float()]])
        self.detector = self.calibrate(0.05)

    def save(self, name, pixels):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(str(self.root / name))

    def calibrate(self, alpha):
        spec = FeatureSpec(weights_digest="ab" * 32)
        return calibrate("tile", spec, "patchflow", self.flow, Scoring(), alpha, self.table, self.calibration)

    def evaluate(self, test):
        return evaluate(self.detector, self.table, test.reset_index(drop=True), self.root)


VIEWS = ("0-top", "1-left", "2-right")


class BenchOfViews(Bench):
    """20 samples of three views to calibrate, 12 to test: six are defective, in one view each, with masks for four."""

    sizes = SIZES

    def __init__(self, root):
        rng = np.random.default_rng(1)
        self.root = UPath(root / "data")
        self.maps = [rng.normal(size=(96, 6, 8, 8)).astype(np.float16)]
        rows = [self.row(rng, sample, view) for sample in range(12) for view in range(3)]
        digests = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(96)]
        write_part(UPath(root / "table"), digests, self.maps)
        self.table = FeatureTable(UPath(root / "table"))
        self.calibration = pd.DataFrame(
            {
                "sha256": digests[:60],
                "sample_id": np.repeat(np.arange(20), 3).astype(str),
                "view": VIEWS * 20,
                "height": (40, 16, 24) * 20,
                "width": (24, 32, 8) * 20,
            }
        )
        self.test = pd.DataFrame(rows).assign(sha256=digests[60:])
        config = {"channels": (6,), "views": 3, "hidden": 4, "steps": 1, "adaptation": "whiten"}
        by_view = [torch.from_numpy(self.maps[0][view:60:3]).float() for view in range(3)]
        self.flow = build_flow("multiflow", **config).fit_adaptor([by_view])
        self.detector = self.calibrate(0.05)

    def row(self, rng, sample, view):
        height, width = SIZES[view]
        defective = sample % 2 == 1
        shown = defective and view == sample % 3
        if shown:
            self.maps[0][60 + 3 * sample + view, :, 4:, :2] += 1.5 + 0.2 * sample
        mask = np.zeros((height, width), np.uint8)
        mask[height // 2 :, : width // 3] = 255 * shown
        # The last two defective samples have no masks; a view of the first has an empty one.
        has_mask = sample < 8 and (shown or (sample, view) == (1, 0))
        path, mask_path = f"{sample}/{VIEWS[view]}.png", f"{sample}/{VIEWS[view]}_mask.png"
        self.save(path, rng.integers(0, 256, (height, width), dtype=np.uint8))
        if has_mask:
            self.save(mask_path, mask)
        return {
            "sample_id": str(sample),
            "view": VIEWS[view],
            "path": path,
            "mask_path": mask_path if has_mask else "",
            "label": int(defective),
            "defect_type": "dent" if defective else "good",
            "height": height,
            "width": width,
        }

    def calibrate(self, alpha):
        spec = FeatureSpec(weights_digest="ab" * 32)
        return calibrate("box", spec, "multiflow", self.flow, Scoring(top=0.05), alpha, self.table, self.calibration)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def bench_of_views(tmp_path_factory):
    return BenchOfViews(tmp_path_factory.mktemp("views"))
