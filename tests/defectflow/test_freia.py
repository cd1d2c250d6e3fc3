"""FrEIA is imported without what it seldom needs, and has it when it does."""

import subprocess
import sys

CODE = """
import sys
import defectflow
assert "scipy.stats" not in sys.modules
import torch
from FrEIA.modules import AllInOneBlock
subnet = lambda channels_in, channels_out: torch.nn.Linear(channels_in, channels_out)
block = AllInOneBlock([(6,)], subnet_constructor=subnet, permute_soft=True)
assert "scipy.stats" in sys.modules
turned = torch.squeeze(block.w_perm)
assert torch.allclose(turned @ turned.T, torch.eye(6), atol=1e-6)
from scipy.stats import norm
assert norm.cdf(0.0) == 0.5
"""


def test_scipy_stats_is_imported_when_freia_uses_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
