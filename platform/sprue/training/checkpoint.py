"""A checkpoint: the flow's weights and what the optimizer needs to go on, as safetensors and JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from sprue.inference.detector import portable_state


@dataclass(frozen=True)
class Checkpoint:
    """The state after an epoch.

    Attributes:
        epoch: The epoch that was finished, from 1.
        history: The figures of all epochs so far.
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

    def write(self, folder: Path) -> None:
        """Writes ``flow.safetensors``, ``optimizer.safetensors`` and ``epoch.json``."""
        safetensors.torch.save_file(self.flow, folder / "flow.safetensors")
        safetensors.torch.save_file(self.optimizer, folder / "optimizer.safetensors")
        (folder / "epoch.json").write_text(json.dumps({"epoch": self.epoch, "history": self.history}) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads what `write` wrote."""
        facts = json.loads((folder / "epoch.json").read_text())
        return cls(
            facts["epoch"],
            facts["history"],
            safetensors.torch.load_file(folder / "flow.safetensors"),
            safetensors.torch.load_file(folder / "optimizer.safetensors"),
        )
