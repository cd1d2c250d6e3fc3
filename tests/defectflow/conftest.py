"""Every test of the flows runs on the CPU, and on the GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the test's tensors are made."""
    with torch.device(request.param) as device:
        yield device
