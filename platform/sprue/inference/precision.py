"""Float32 that means the same everywhere: features and scores do not depend on the machine that makes them."""

import torch


def use_full_precision() -> None:
    """Has this process compute in float32 on GPUs, not in TensorFloat-32, torch's default for convolutions.

    Maps of a GPU then differ from a CPU's by less than the float16 to which both are rounded. In TensorFloat-32 they
    differ by twenty times that rounding, in bfloat16 by three hundred times; a threshold that was calibrated on one
    machine would mean something else on another.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
