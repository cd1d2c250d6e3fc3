"""The last and the best checkpoint of a fit are kept, and half-written ones are none."""

import torch
from upath import UPath

from sprue.training.checkpoint import Checkpoint, Checkpoints


def checkpoint(epoch, nlls):
    history = [{"epoch": number, "validation_nll": nll} for number, nll in enumerate(nlls[:epoch], 1)]
    return Checkpoint(epoch, history, {"weight": torch.full((2,), float(epoch))}, {"0.step": torch.tensor(epoch)})


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(UPath(tmp_path / "brick-0123"))
    assert (checkpoints.last(), checkpoints.best()) == (None, None)
    nlls, kept = (3.0, 1.0, 2.0, 1.5), []
    for epoch in range(1, 5):
        checkpoints.keep(checkpoint(epoch, nlls))
        kept.append(sorted(int(path.name[-6:]) for path in checkpoints.folder.iterdir()))
    assert kept == [[1], [2], [2, 3], [2, 4]]
    last, best = checkpoints.last(), checkpoints.best()
    assert (last.epoch, len(last.history), last.optimizer["0.step"]) == (4, 4, 4)
    assert (best.epoch, len(best.history)) == (2, 2)
    assert torch.equal(best.flow["weight"], torch.tensor([2.0, 2.0]))


def test_a_half_written_checkpoint_is_none(tmp_path):
    checkpoints = Checkpoints(UPath(tmp_path))
    checkpoints.keep(checkpoint(1, (2.0, 1.0)))
    half = tmp_path / "epoch-000002"
    half.mkdir()
    (half / "flow.safetensors").write_bytes(b"half")
    assert checkpoints.last().epoch == 1
    checkpoints.keep(checkpoint(2, (2.0, 1.0)))
    assert (checkpoints.last().epoch, checkpoints.best().epoch) == (2, 2)
