"""The plan of a class: what is fitted for it. Search writes it; fit, evaluate and register read it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Self

from annotated_types import Len
from pydantic import ValidationError
from upath import UPath

from sprue.config import DatasetSettings, Settings
from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.formats import PLAN
from sprue.inference.spec import FeatureSpec
from sprue.store import digest, read_json, write_json
from sprue.training.spec import FitSpec, recipe_spec


class ClassPlan(Settings):
    """The fits of a class: one, or one for each fold of its good samples. They differ in their samples alone."""

    fits: Annotated[tuple[FitSpec, ...], Len(1)]

    @property
    def first(self) -> FitSpec:
        """A fit that has what all share: class, features, flow, settings."""
        return self.fits[0]

    @property
    def class_name(self) -> str:
        """The product class."""
        return self.first.class_name

    @property
    def key(self) -> str:
        """12 hexadecimal digits that name what is fitted; the only fit's key, where there is one."""
        keys = [spec.key for spec in self.fits]
        return keys[0] if len(keys) == 1 else hashlib.sha256(" ".join(keys).encode()).hexdigest()[:12]

    @property
    def images(self) -> int:
        """How many images train, in any of the fits."""
        return sum(map(len, self.training_samples))

    @property
    def training_samples(self) -> list[tuple[str, ...]]:
        """The samples that train any of the fits, each once."""
        return list(dict.fromkeys(sample for spec in self.fits for sample in spec.train))

    @property
    def params(self) -> dict[str, object]:
        """The settings by the names under which a run shows them."""
        folds = {"calibration.folds": len(self.fits)} if len(self.fits) > 1 else {}
        return {**self.first.params, "train_images": self.images, **folds}

    def write(self, folder: UPath) -> None:
        """Writes ``<class>.json``; the same plan gives the same bytes."""
        write_json(folder / f"{self.class_name}.json", PLAN.stamped(self.model_dump(mode="json")))

    @classmethod
    def read(cls, folder: UPath, class_name: str) -> Self:
        """Reads what `write` wrote.

        Raises:
            SprueError: If it is missing or damaged.
        """
        path = folder / f"{class_name}.json"
        try:
            return cls.model_validate_json(json.dumps(PLAN.current(read_json(path, made_by="search"), path)))
        except ValidationError as error:
            raise SprueError(f"{path} is damaged; run the search stage again: {error}") from error


def recipe_plan(
    manifest: Manifest, manifest_digest: str, class_name: str, spec: FeatureSpec, settings: DatasetSettings, root: UPath
) -> ClassPlan:
    """The plan of a class with the recipe's own settings; see `sprue.training.spec.recipe_spec`."""
    folds: Sequence[int | None] = range(1, len(manifest.folds(class_name)) + 1) or [None]
    arguments = (manifest, manifest_digest, class_name, spec, settings, root)
    return ClassPlan(fits=tuple(recipe_spec(*arguments, fold) for fold in folds))


def read_plans(folder: UPath) -> list[ClassPlan]:
    """The plans of a dataset's classes, in the order of their names.

    Args:
        folder: The dataset's part of the store.

    Raises:
        SprueError: If there are none, or the manifest has changed since they were made.
    """
    plans = folder / "plan"
    names = sorted(path.name.removesuffix(".json") for path in plans.glob("*.json")) if plans.is_dir() else []
    if not names:
        raise SprueError(f"there is no plan in {plans}; run the search stage first")
    found = [ClassPlan.read(plans, name) for name in names]
    current = digest(folder / "manifest.parquet")
    outdated = [plan.class_name for plan in found if plan.first.manifest != current]
    if outdated:
        raise SprueError(
            f"the plan of class {', '.join(outdated)} in {plans} is of another manifest; run the search stage again"
        )
    return found
