"""Checkpoints: the flow's weights and the optimizer's state, as safetensors and JSON."""

from dataclasses import dataclass
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn
from upath import UPath

from sprue.errors import SprueError
from sprue.formats import CHECKPOINT
from sprue.inference.weights import portable_state
from sprue.store import read_json, remove_folder, write_bytes, write_json

PREFIX = "epoch-"
"""Prefix of a checkpoint's folder, before the epoch."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after an epoch.

    Attributes:
        epoch: The finished epoch, from 1.
        history: The metrics of all epochs so far.
        flow: The flow's parameters and buffers.
        optimizer: The optimizer's tensors by ``<parameter's number>.<name>``.
    """

    epoch: int
    history: list[dict[str, Any]]
    flow: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @classmethod
    def take(cls, flow: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, history: list[dict[str, Any]]) -> Self:
        """Copies the state of a flow and its optimizer."""
        tensors = {
            f"{number}.{name}": value.detach().cpu().clone()
            for number, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return cls(epoch, history, portable_state(flow), tensors)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts the optimizer's tensors back."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.optimizer.items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation likelihood so far."""
        return int(min(self.history, key=lambda row: float(row["validation_nll"]))["epoch"])

    def write(self, folder: UPath) -> None:
        """Writes ``flow.safetensors``, ``optimizer.safetensors``, then ``epoch.json``, which marks it as complete."""
        write_bytes(folder / "flow.safetensors", safetensors.torch.save(self.flow))
        write_bytes(folder / "optimizer.safetensors", safetensors.torch.save(self.optimizer))
        write_json(folder / "epoch.json", CHECKPOINT.stamped({"epoch": self.epoch, "history": self.history}))

    @classmethod
    def read(cls, folder: UPath) -> Self:
        """Reads what `write` wrote.

        Raises:
            SprueError: If it is incomplete or damaged.
        """
        content = _read(folder)
        try:
            return cls(
                content["epoch"],
                content["history"],
                safetensors.torch.load((folder / "flow.safetensors").read_bytes()),
                safetensors.torch.load((folder / "optimizer.safetensors").read_bytes()),
            )
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise SprueError(f"the checkpoint {folder} is damaged: {error}; delete it") from error


def _read(folder: UPath) -> dict[str, Any]:
    file = folder / "epoch.json"
    return CHECKPOINT.current(read_json(file, made_by="fit"), file)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a fit: its last, after which it resumes, and its best.

    Attributes:
        folder: Of this fit alone, as every node sees it.
    """

    folder: UPath

    def keep(self, checkpoint: Checkpoint) -> None:
        """Stores a checkpoint, then deletes those that are neither the last nor the best."""
        checkpoint.write(self._at(checkpoint.epoch))
        for epoch in self.epochs():
            if epoch not in (checkpoint.epoch, checkpoint.best_epoch):
                (self._at(epoch) / "epoch.json").unlink()
                remove_folder(self._at(epoch))

    def epochs(self) -> list[int]:
        """The epochs with a complete checkpoint, ascending."""
        if not self.folder.exists():
            return []
        return sorted(
            int(path.name.removeprefix(PREFIX)) for path in self.folder.iterdir() if (path / "epoch.json").exists()
        )

    def read(self, epoch: int) -> Checkpoint:
        """The checkpoint of an epoch.

        Raises:
            SprueError: If there is none, or it is damaged.
        """
        return Checkpoint.read(self._at(epoch))

    def history(self) -> list[dict[str, Any]]:
        """The metrics of all epochs up to the last checkpoint."""
        epochs = self.epochs()
        return self._history(epochs[-1]) if epochs else []

    def best(self) -> Checkpoint | None:
        """The stored checkpoint with the best validation likelihood; None before the first."""
        epochs = self.epochs()  # a listing, of which an object store has no cheap one
        if not epochs:
            return None
        nlls = {int(row["epoch"]): float(row["validation_nll"]) for row in self._history(epochs[-1])}
        return self.read(min(epochs, key=nlls.__getitem__))

    def _history(self, epoch: int) -> list[dict[str, Any]]:
        return list(_read(self._at(epoch))["history"])

    def _at(self, epoch: int) -> UPath:
        return self.folder / f"{PREFIX}{epoch:06d}"
