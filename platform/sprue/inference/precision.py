"""Float32 that means the same everywhere: features and scores do not depend on the machine that makes them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Runs convolutions and products on GPUs in float32, not in TensorFloat-32, torch's default for convolutions.

    Maps of a GPU then differ from a CPU's by less than the float16 to which both are rounded. In TensorFloat-32 they
    differ by twenty times that rounding, in bfloat16 by three hundred times; a threshold that was calibrated on one
    machine would mean something else on another.
    """
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products
