"""What finished fits leave in the store: the flows' weights and how they came about."""

from dataclasses import dataclass, replace
from typing import Any, Self

import pandas as pd
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor
from upath import UPath

from defectflow import Flow, build_flow
from sprue.errors import SprueError
from sprue.formats import FIT
from sprue.store import read_json, write_bytes, write_json
from sprue.training.plan import ClassPlan
from sprue.training.spec import FitSpec


@dataclass(frozen=True)
class FitRecord:
    """A finished fit.

    Attributes:
        spec: What was fitted.
        best_epoch: The epoch that the weights are of.
        history: The metrics of all epochs.
        commit: The code's.
        cpus: Threads that computed the weights on a CPU; another number adds in another order.
        state: The flow's weights.
    """

    spec: FitSpec
    best_epoch: int
    history: list[dict[str, Any]]
    commit: str
    cpus: int
    state: dict[str, Tensor]

    @property
    def facts(self) -> dict[str, Any]:
        """Everything but the weights, as JSON takes it."""
        return {
            "key": self.spec.key,
            "spec": self.spec.model_dump(mode="json"),
            "best_epoch": self.best_epoch,
            "history": self.history,
            "commit": self.commit,
            "cpus": self.cpus,
        }

    def write(self, folder: UPath) -> None:
        """Writes ``flow.safetensors``, then ``fit.json``, whose presence means that the fit is complete."""
        (folder / "fit.json").unlink(missing_ok=True)
        write_bytes(folder / "flow.safetensors", safetensors.torch.save(self.state))
        write_json(folder / "fit.json", FIT.stamped(self.facts))

    @classmethod
    def read(cls, folder: UPath) -> Self:
        """Reads what `write` wrote.

        Raises:
            SprueError: If there is no finished fit.
        """
        facts = _read(folder)
        try:
            return cls(
                FitSpec.model_validate(facts["spec"], strict=False),
                facts["best_epoch"],
                facts["history"],
                facts["commit"],
                facts["cpus"],
                safetensors.torch.load((folder / "flow.safetensors").read_bytes()),
            )
        except (OSError, KeyError, TypeError, ValidationError, safetensors.SafetensorError) as error:
            raise SprueError(
                f"{folder} is not a finished fit: {error}; delete it and run the fit stage again"
            ) from error

    @staticmethod
    def is_current(folder: UPath, key: str) -> bool:
        """Whether a finished fit with that key is there."""
        return (folder / "fit.json").is_file() and _read(folder).get("key") == key

    def build_flow(self) -> Flow:
        """The fitted flow."""
        flow = build_flow(self.spec.flow_name, **self.spec.flow_config)
        flow.load_state_dict(self.state)
        return flow


def _read(folder: UPath) -> dict[str, Any]:
    file = folder / "fit.json"
    return FIT.current(read_json(file, made_by="fit"), file)


@dataclass(frozen=True)
class ClassFit:
    """The finished fits of a class.

    Attributes:
        plan: What was to be fitted.
        records: A record for each of the plan's fits, in their order.
    """

    plan: ClassPlan
    records: tuple[FitRecord, ...]

    @classmethod
    def read(cls, fits: UPath, plan: ClassPlan) -> Self:
        """Reads a class's records from the folder of all fits.

        Raises:
            SprueError: If one is missing, or of another plan.
        """
        records = tuple(FitRecord.read(fits / spec.name) for spec in plan.fits)
        for spec, record in zip(plan.fits, records, strict=True):
            if record.spec.key != spec.key:
                raise SprueError(
                    f"class {plan.class_name}: {fits / spec.name} is of another plan; run the fit stage again"
                )
        # The plan may score the same fit in another way.
        return cls(plan, tuple(replace(record, spec=spec) for spec, record in zip(plan.fits, records, strict=True)))

    @property
    def history(self) -> pd.DataFrame:
        """The negative log-likelihoods of each epoch that all fits have had, means over the fits.

        Columns: epoch, train_nll, validation_nll.
        """
        shortest = min(len(record.history) for record in self.records)
        epochs = pd.concat([pd.DataFrame(record.history[:shortest]) for record in self.records])
        return epochs.groupby("epoch", as_index=False)[["train_nll", "validation_nll"]].mean()
