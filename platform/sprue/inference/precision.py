"""Full float32 precision, so that features and scores do not depend on the machine."""

import torch


def use_full_precision() -> None:
    """Makes this process compute in float32 on GPUs, not in TensorFloat-32, torch's default for convolutions.

    A GPU's maps then differ from a CPU's by less than the rounding to float16. In TensorFloat-32 they differ by twenty
    times that rounding, in bfloat16 by three hundred times: a threshold calibrated on one machine would not hold on
    another. That is why features are not extracted in bfloat16 on CPUs either, where OpenVINO is 1.8 times as fast in
    it: its maps and torch's then differ by 6 to 9 % of a feature's mean.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
