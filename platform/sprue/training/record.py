"""What a finished fit leaves in the store: the flow's weights and how they came about."""

from dataclasses import dataclass
from typing import Any, Self

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor
from upath import UPath

from defectflow import Flow, build_flow
from sprue.errors import SprueError
from sprue.store import read_json, write_bytes, write_json
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
        write_json(folder / "fit.json", self.facts)

    @classmethod
    def read(cls, folder: UPath) -> Self:
        """Reads what `write` wrote.

        Raises:
            SprueError: If there is no finished fit.
        """
        facts = read_json(folder / "fit.json", made_by="fit")
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
        return (folder / "fit.json").is_file() and read_json(folder / "fit.json", made_by="fit").get("key") == key

    def build_flow(self) -> Flow:
        """The fitted flow."""
        flow = build_flow(self.spec.flow_name, **self.spec.flow_config)
        flow.load_state_dict(self.state)
        return flow
