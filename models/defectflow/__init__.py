"""Normalizing flows that detect defects in the feature maps of a frozen backbone.

Depends on torch, FrEIA and numpy only, so it runs on a cluster, in a notebook or on an edge box. The guide is
``docs/explanation/flows.md``: the mathematics, how the flows differ, when to use which.

>>> import torch
>>> from defectflow import build_flow
>>> flow = build_flow("patchflow", channels=(4, 6), adapted=4, bottleneck=8)
>>> maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
>>> _ = flow.fit_adaptor([maps])
>>> flow.score(maps).shape
torch.Size([2])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from defectflow.config import (
        CSFlowConfig,
        DNFADConfig,
        FusionConfig,
        GaussianConfig,
        MemoryBankConfig,
        MultiFlowConfig,
        PatchFlowConfig,
        config_for_features,
    )
    from defectflow.csflow import CSFlow
    from defectflow.dnfad import DNFAD
    from defectflow.ensemble import Ensemble
    from defectflow.flow import Flow, Maps
    from defectflow.fusion import Fusion
    from defectflow.gaussian import Gaussian
    from defectflow.memorybank import MemoryBank
    from defectflow.multiflow import MultiFlow
    from defectflow.patchflow import PatchFlow
    from defectflow.registry import FLOWS, build_flow

__all__ = [
    "DNFAD",
    "FLOWS",
    "CSFlow",
    "CSFlowConfig",
    "DNFADConfig",
    "Ensemble",
    "Flow",
    "Fusion",
    "FusionConfig",
    "Gaussian",
    "GaussianConfig",
    "Maps",
    "MemoryBank",
    "MemoryBankConfig",
    "MultiFlow",
    "MultiFlowConfig",
    "PatchFlow",
    "PatchFlowConfig",
    "build_flow",
    "config_for_features",
]

_MODULES = ("config", "registry", "flow", "ensemble")


def __getattr__(name: str) -> Any:
    """Imports the flows, and with them torch, only when they are used: settings are checked without."""
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"defectflow.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
