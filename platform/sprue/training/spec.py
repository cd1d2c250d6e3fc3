"""Everything that a fit depends on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Self

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from pydantic import ValidationError
from upath import UPath

from defectflow import FLOWS, Flow, build_flow, config_for_features
from sprue.config import FLOW_SETTINGS, DatasetSettings, FitSettings, FlowName, ScoringSettings, Settings
from sprue.data.folds import fold_split
from sprue.data.manifest import Manifest
from sprue.data.samples import Sample, samples_of
from sprue.errors import SprueError
from sprue.features.synthetic import SYNTHETIC_VERSION, has_synthetic, synthetic_folder, synthetic_maps
from sprue.features.tables import FeatureTable
from sprue.inference.detector import require_views
from sprue.inference.spec import FeatureSpec
from sprue.training.dataloader import DataLoader, build_dataloader
from sprue.training.loop import VERSION


class FitSpec(Settings):
    """What is fitted, on what, and how."""

    dataset: str
    class_name: str
    features: FeatureSpec
    flow_name: FlowName
    flow_config: dict[str, Any]
    """All of the flow's settings."""
    fit: FitSettings
    scoring: ScoringSettings
    train: tuple[Sample, ...]
    """The training samples, each the digests of its images in the order of its views."""
    validation: tuple[Sample, ...]
    fold: Annotated[int, Ge(1)] | None = None
    """The fold of good samples that calibrates the flow, so that the fit leaves it out; None where a calibration set is
    held out of all fits."""
    manifest: str
    """Digest of the manifest that the samples are from."""
    origin: str = "the recipe's own"
    """How the settings were found, in words."""

    @property
    def key(self) -> str:
        """12 hexadecimal digits that name a fit by everything its weights depend on, versions of the code included."""
        facts = self.model_dump(mode="json", exclude={"features", "scoring", "fold", "manifest", "origin"})
        for room in ("gpus", "min_workers"):
            del facts["fit"][room]
        facts["features"] = self.features.fingerprint
        facts["versions"] = {"flow": FLOWS[self.flow_name].version, "loop": VERSION}
        if self.weighted:
            facts["versions"]["synthetic"] = SYNTHETIC_VERSION
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Of the fit, among those of its dataset: the class, and the fold if there are several.

        It is the fit's folder below ``fits``.
        """
        return self.class_name if self.fold is None else f"{self.class_name}/{fold_split(self.fold)}"

    @property
    def checkpoints(self) -> str:
        """Name of the folder that holds the checkpoints of an interrupted fit."""
        return f"{self.class_name}-{self.key}"

    @property
    def views(self) -> int:
        """Images of a sample."""
        return len(self.train[0])

    @property
    def images(self) -> int:
        """How many training images there are."""
        return len(self.train) * self.views

    @property
    def maps(self) -> tuple[int, ...]:
        """Indices of the feature maps that the flow reads."""
        return FLOWS[self.flow_name].config_class(**self.flow_config).read

    @property
    def weighted(self) -> bool:
        """Whether synthetic defects weigh the flow's members."""
        return FLOWS[self.flow_name].weighted

    @property
    def params(self) -> dict[str, Any]:
        """The settings by the names under which a run shows them."""
        flow = {f"flow.{name}": value for name, value in self.flow_config.items()}
        fit = {f"fit.{name}": value for name, value in self.fit.model_dump().items()}
        return {
            "flow": self.flow_name,
            "features": self.features.fingerprint,
            "train_images": self.images,
            **flow,
            **fit,
        }

    def with_values(self, values: Mapping[str, Any], epochs: int | None = None, origin: str | None = None) -> Self:
        """The spec with some settings changed.

        Args:
            values: By names such as ``flow.steps`` and ``fit.learning_rate``.
            epochs: Of the fit; as in this spec if None.
            origin: How the values were found.

        Raises:
            SprueError: If a value is out of range.
        """
        sections: dict[str, dict[str, Any]] = {"flow": {}, "fit": {"epochs": epochs} if epochs else {}}
        for name, value in values.items():
            section, _, setting = name.partition(".")
            sections[section][setting] = value
        try:
            own = {name: value for name, value in self.flow_config.items() if name != "channels"}
            FLOW_SETTINGS[self.flow_name].model_validate({"name": self.flow_name, **own, **sections["flow"]})
            config = FLOWS[self.flow_name].config_class(**{**self.flow_config, **sections["flow"]})
            fit = FitSettings(**{**self.fit.model_dump(), **sections["fit"]})
        except ValidationError as error:
            reasons = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
            raise SprueError(f"class {self.class_name}: {reasons}") from error
        except (ValueError, TypeError) as error:
            raise SprueError(f"class {self.class_name}: {error}") from error
        changes = {"flow_config": _plain(asdict(config)), "fit": fit} | ({"origin": origin} if origin else {})
        return self.model_copy(update=changes)

    def build_flow(self) -> Flow:
        """A new flow, the same for the same seed."""
        torch.manual_seed(self.fit.seed)
        return build_flow(self.flow_name, **self.flow_config)

    def table(self, features: UPath) -> FeatureTable:
        """The class's features, in the dataset's folder of features.

        Raises:
            SprueError: If there are none.
        """
        return _table(features, self.features, self.class_name)

    def dataloader(self, table: FeatureTable, samples: Sequence[Sample]) -> DataLoader:
        """Samples as the flow reads them, in memory as far as the settings allow.

        Raises:
            SprueError: If an image is not in the table.
        """
        limit = int(self.fit.memory * 2**30)
        return build_dataloader(table, samples, self.views, self.maps, limit)

    def synthetic_folder(self, features: UPath) -> UPath:
        """The feature table of the class's synthetic defects; `features` is the dataset's folder of features."""
        return synthetic_folder(features.parent, self.class_name, self.features)

    def synthetic_maps(self, features: UPath) -> list[NDArray[np.float16]]:
        """The maps [N, C, H, W] of the validation samples with synthetic defects.

        Raises:
            SprueError: If there are none.
        """
        altered = FeatureTable(self.synthetic_folder(features))
        if not has_synthetic(altered, self.validation):
            raise SprueError(
                f"class {self.class_name} lacks synthetic defects in {altered.folder}; run the search stage first"
            )
        return synthetic_maps(self.table(features), altered, self.validation, self.maps)


def recipe_spec(
    manifest: Manifest,
    manifest_digest: str,
    class_name: str,
    spec: FeatureSpec,
    settings: DatasetSettings,
    root: UPath,
    fold: int | None = None,
) -> FitSpec:
    """A fit of a class with the recipe's own settings.

    Args:
        manifest: The dataset's.
        manifest_digest: Its file's.
        class_name: The product class.
        spec: The resolved feature spec.
        settings: The dataset's.
        root: Folder of the dataset's features.
        fold: The fold that the fit leaves out, if the class has folds.

    Raises:
        SprueError: If there are no features, or the flow does not accept its settings or the number of views.
    """
    table = _table(root, spec, class_name)
    train, validation = map(samples_of, manifest.fit_rows(class_name, fold))
    blocks = len(spec.blocks)
    scales = [table.shapes[start : start + blocks] for start in range(0, len(table.shapes), blocks)]
    name, images = settings.flow.name, len(train) * len(train[0])
    try:
        config = config_for_features(name, scales, images, settings.flow.overrides)
        planned = FitSpec(
            dataset=manifest.dataset,
            class_name=class_name,
            features=spec,
            flow_name=name,
            flow_config=_plain(config),
            fit=settings.fit,
            scoring=settings.scoring,
            train=train,
            validation=validation,
            fold=fold,
            manifest=manifest_digest,
        )
        flow = planned.build_flow()
    except ValueError as error:
        raise SprueError(f"class {class_name}: flow: {error}") from error
    require_views(class_name, name, flow, planned.views)
    return planned


def _table(features: UPath, spec: FeatureSpec, class_name: str) -> FeatureTable:
    table = FeatureTable(features / spec.fingerprint / class_name)
    if not len(table):
        raise SprueError(f"class {class_name} has no features in {table.folder}; run the features stage first")
    return table


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON reads it back, so that a plan equals itself after it was stored."""
    return dict(json.loads(json.dumps(config)))
