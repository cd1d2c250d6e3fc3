"""Workers of one fit begin with one flow, whatever each has computed."""

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from sprue.training.distributed import ProcessGroup

WORKERS = 2


def begin(rank, folder):
    """Stores what a worker has after the broadcast: of another size, sign and layout than the others' before it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    module = nn.BatchNorm2d(3).to(memory_format=torch.channels_last)
    module.register_buffer("columns", torch.arange(6.0).reshape(2, 3).T)
    for tensor in module.state_dict().values():
        tensor.mul_(1 - 2 * rank).add_(rank)
    ProcessGroup(rank, WORKERS).broadcast(module)
    torch.save(module.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_workers_have_the_first_one_s_parameters_and_buffers(tmp_path):
    torch.multiprocessing.spawn(begin, (str(tmp_path),), WORKERS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORKERS))
    assert torch.equal(first["columns"], torch.arange(6.0).reshape(2, 3).T)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
