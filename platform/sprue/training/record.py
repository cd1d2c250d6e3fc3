"""What a finished fit leaves in the store: the flow's weights and how they came about."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import safetensors.torch
from torch import Tensor
from upath import UPath

import defectflow
from defectflow import Flow, build_flow
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable
from sprue.store import location, read_json, write_bytes, write_json
from sprue.training import loop
from sprue.training.checkpoint import Checkpoint
from sprue.training.worker import FitRequest, run_params


def fit_key(request: FitRequest) -> str:
    """12 hexadecimal digits that name a fit by everything its weights depend on, the code of flow and loop too."""
    facts = asdict(request)
    facts["table"] = request.fingerprint
    facts["code"] = _code_digest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _code_digest() -> str:
    sha = hashlib.sha256()
    folder = Path(loop.__file__).parent
    own = [folder / f"{name}.py" for name in ("loop", "feed", "share")]
    for path in [*sorted(Path(defectflow.__file__).parent.glob("*.py")), *own]:
        sha.update(path.read_bytes())
    return sha.hexdigest()


@dataclass(frozen=True)
class FitRecord:
    """A finished fit.

    Attributes:
        class_name: The product class.
        key: See `fit_key`.
        fingerprint: Of the feature spec.
        flow_name: A key of `defectflow.FLOWS`.
        flow_config: The flow's settings, channels included.
        settings: How it was fitted.
        pictures: How many pictures it was fitted on.
        best_epoch: The epoch that the weights are of.
        history: The figures of all epochs.
        commit: The code's.
        cpus: Threads that computed the weights, on a CPU, for another number adds in another order; 0 if not recorded.
        state: The flow's weights.
    """

    class_name: str
    key: str
    fingerprint: str
    flow_name: str
    flow_config: Mapping[str, Any]
    settings: Mapping[str, Any]
    pictures: int
    best_epoch: int
    history: list[dict[str, Any]]
    commit: str
    cpus: int
    state: dict[str, Tensor]

    @classmethod
    def of(cls, request: FitRequest, best: Checkpoint, history: list[dict[str, Any]], commit: str, cpus: int) -> Self:
        """What is kept of a fit.

        Args:
            request: What was fitted.
            best: The checkpoint that is kept.
            history: The figures of all epochs.
            commit: The code's.
            cpus: Threads that computed the weights.
        """
        return cls(
            class_name=request.class_name,
            key=fit_key(request),
            fingerprint=request.fingerprint,
            flow_name=request.flow_name,
            flow_config=request.whole_config(FeatureTable(location(request.table))),
            settings=asdict(request.settings),
            pictures=request.pictures,
            best_epoch=best.epoch,
            history=history,
            commit=commit,
            cpus=cpus,
            state=best.flow,
        )

    def write(self, folder: UPath) -> None:
        """Writes ``flow.safetensors``, then ``fit.json``, which says that the fit is whole."""
        facts = {name: value for name, value in vars(self).items() if name != "state"}
        write_bytes(folder / "flow.safetensors", safetensors.torch.save(self.state))
        write_json(folder / "fit.json", facts)

    @classmethod
    def read(cls, folder: UPath) -> Self:
        """Reads what `write` wrote.

        Raises:
            SprueError: If there is no finished fit.
        """
        facts = read_json(folder / "fit.json", made_by="fit")
        try:
            # Fits of earlier releases do not say how many threads there were.
            return cls(**{"cpus": 0} | facts, state=safetensors.torch.load((folder / "flow.safetensors").read_bytes()))
        except (OSError, TypeError, safetensors.SafetensorError) as error:
            raise SprueError(
                f"{folder} is not a finished fit: {error}; delete it and run the fit stage again"
            ) from error

    @staticmethod
    def is_current(folder: UPath, key: str) -> bool:
        """Whether a finished fit with that key is there."""
        return (folder / "fit.json").is_file() and read_json(folder / "fit.json", made_by="fit").get("key") == key

    def params(self) -> dict[str, Any]:
        """The settings by the names under which a run shows them."""
        return run_params(self.flow_name, self.flow_config, self.settings, self.fingerprint, self.pictures)

    def build_flow(self) -> Flow:
        """The fitted flow."""
        flow = build_flow(self.flow_name, **self.flow_config)
        flow.load_state_dict(self.state)
        return flow
