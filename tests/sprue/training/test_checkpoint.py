"""The last and the best checkpoint of a fit are kept, and half-written ones are none."""

import pytest
import torch
from upath import UPath

from sprue.errors import SprueError
from sprue.store import location
from sprue.training.checkpoint import Checkpoint, Checkpoints


def checkpoint(epoch, nlls):
    history = [{"epoch": number, "validation_nll": nll} for number, nll in enumerate(nlls[:epoch], 1)]
    return Checkpoint(epoch, history, {"weight": torch.full((2,), float(epoch))}, {"0.step": torch.tensor(epoch)})


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(UPath(tmp_path / "brick-0123"))
    assert (checkpoints.epochs(), checkpoints.history(), checkpoints.best()) == ([], [], None)
    nlls, kept = (3.0, 1.0, 2.0, 1.5), []
    for epoch in range(1, 5):
        checkpoints.keep(checkpoint(epoch, nlls))
        assert len(list(checkpoints.folder.iterdir())) == len(checkpoints.epochs())
        kept.append(checkpoints.epochs())
    assert kept == [[1], [2], [2, 3], [2, 4]]
    last, best = checkpoints.read(4), checkpoints.best()
    assert checkpoints.history() == last.history
    assert (last.epoch, len(last.history), last.optimizer["0.step"]) == (4, 4, 4)
    assert (best.epoch, len(best.history)) == (2, 2)
    assert torch.equal(best.flow["weight"], torch.tensor([2.0, 2.0]))


def test_a_half_written_checkpoint_is_none(tmp_path):
    checkpoints = Checkpoints(UPath(tmp_path))
    checkpoints.keep(checkpoint(1, (2.0, 1.0)))
    half = tmp_path / "epoch-000002"
    half.mkdir()
    (half / "flow.safetensors").write_bytes(b"half")
    assert (checkpoints.epochs(), checkpoints.best().epoch) == ([1], 1)
    with pytest.raises(SprueError, match=r"there is no .*epoch-000002/epoch\.json"):
        checkpoints.read(2)
    checkpoints.keep(checkpoint(2, (2.0, 1.0)))
    assert (checkpoints.epochs(), checkpoints.best().epoch) == ([2], 2)


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(UPath(tmp_path))
    checkpoints.keep(checkpoint(1, (2.0,)))
    (tmp_path / "epoch-000001/flow.safetensors").write_bytes(b"half")
    with pytest.raises(SprueError, match=r"the checkpoint .*epoch-000001 is damaged: .*; delete it"):
        checkpoints.best()


def test_in_an_object_store_the_same_are_kept(s3_bucket):
    checkpoints = Checkpoints(location(f"s3://{s3_bucket}/runs/brick-0123"))
    for epoch in range(1, 5):
        checkpoints.keep(checkpoint(epoch, (3.0, 1.0, 2.0, 1.5)))
    assert (checkpoints.epochs(), checkpoints.best().epoch) == ([2, 4], 2)
