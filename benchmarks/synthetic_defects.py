"""How well synthetic defects predict real ones: ``python benchmarks/synthetic_defects.py STORE DATA [DATA ...]``.

DATA are dataset folders in MVTec AD's layout, STORE is where features are kept, as for ``benchmarks/parts.py``. For
each class, a Gaussian is fitted on each of several groups of blocks at each scale of the recipe ``fusion-cpu``. Prints
the rank correlation, over these detectors, of the image AUROC on the synthetic defects of each kind with that on the
real defects of the test split; and for all kinds together, the AUROC of the detector that they would choose beside that
of the best one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from seeds import settings_of
from sklearn.metrics import roc_auc_score
from upath import UPath

from defectflow import Flow, build_flow
from sprue.config import CalibrationSettings, ManifestSettings, ScoringSettings
from sprue.data.build import build_manifest
from sprue.data.manifest import Manifest
from sprue.data.samples import samples_of
from sprue.features.extraction import extract
from sprue.features.synthetic import extract_synthetic, plan_defects, synthetic_maps
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.detector import best_device, score_features
from sprue.stages.runtime import connect_ray
from sprue.store import location
from sprue.training.dataloader import InMemoryDataLoader
from sprue.training.spec import FitSpec, recipe_spec

BLOCKS = ((0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3), (3,))
"""Indices of the blocks that a detector reads, among the recipe's."""


def auroc(good_N: NDArray[np.floating], defective_N: NDArray[np.floating]) -> float:
    """In %."""
    labels_N = np.r_[np.zeros(len(good_N)), np.ones(len(defective_N))]
    return 100 * float(roc_auc_score(labels_N, np.r_[good_N, defective_N]))


def fitted(plan: FitSpec, features: UPath, maps: Sequence[int]) -> Flow:
    """A Gaussian on some maps of the class's training samples."""
    flow = build_flow("gaussian", channels=plan.flow_config["channels"], maps=tuple(maps)).to(best_device())
    training = plan.table(features).read_samples(plan.train, 1, maps)
    batches = InMemoryDataLoader.of(training).ordered(16)
    return flow.fit_adaptor([map_BCHW.float().to(best_device()) for map_BCHW in batch] for batch in batches).eval()


def rows(manifest: Manifest, plan: FitSpec, features: UPath) -> pd.DataFrame:
    """A row for each detector of a class: AUROC on the defects of each kind, and on the real ones."""
    table, test = plan.table(features), manifest.select(plan.class_name, "test")
    label_N = test.groupby("sample_id", sort=False)["label"].max().to_numpy()
    kinds = np.array([defect.kind for defect in plan_defects(plan.validation)])
    good = [*plan.validation, *samples_of(manifest.select(plan.class_name, "calibration"))]
    synthetic = FeatureTable(plan.synthetic_folder(features))
    found = []
    for scale in range(len(plan.features.scales)):
        for blocks in BLOCKS:
            maps = [scale * len(plan.features.blocks) + block for block in blocks]
            flow = fitted(plan, features, maps)
            with torch.inference_mode():
                good_N, test_N = (
                    score_features(flow, ScoringSettings(top=0.01), table.read_samples(samples, 1, maps))[0]
                    for samples in (good, samples_of(test))
                )
                altered = synthetic_maps(table, synthetic, plan.validation, maps)
                synthetic_N = score_features(flow, ScoringSettings(top=0.01), altered)[0]
            by_kind = {kind: auroc(good_N, synthetic_N[kinds == kind]) for kind in dict.fromkeys(kinds)}
            real = auroc(test_N[label_N == 0], test_N[label_N == 1])
            found.append({**by_kind, "all": auroc(good_N, synthetic_N), "real": real})
    return pd.DataFrame(found)


def main() -> None:
    """Prints a column for each class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="where features are kept")
    parser.add_argument("data", type=Path, nargs="+", help="dataset folders")
    arguments = parser.parse_args()
    connect_ray()
    settings = settings_of("fusion-cpu", [])
    spec, columns = resolve(settings.features), {}
    for data in arguments.data:
        root = location(str(data.resolve()))
        features = location(str(arguments.store.resolve())) / data.name / "features"
        manifest = build_manifest(root, data.name, ManifestSettings(), CalibrationSettings())
        extract(spec, manifest.frame, root, features)
        for name in manifest.classes:
            plan = recipe_spec(manifest, "", name, spec, settings, features)
            extract_synthetic(spec, manifest.select(name, "validation"), root, plan.synthetic_folder(features))
            table = rows(manifest, plan, features)
            chosen = table.loc[table["all"].idxmax(), "real"]
            correlation = {kind: spearmanr(table[kind], table["real"]).statistic for kind in table.columns.drop("real")}
            columns[name] = {**correlation, "AUROC of the chosen": chosen, "of the best": table["real"].max()}
            print(pd.Series(columns[name], name=name).round(2).to_string(), flush=True)
    print(f"\n{pd.DataFrame(columns).round(2).to_string()}")


if __name__ == "__main__":
    main()
