"""The tests run on the CPU, and on the GPU if there is one."""

from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Makes the device the default of new tensors."""
    with torch.device(request.param) as device:
        yield device
