"""Normalizing flows that find defects in the feature maps of a frozen backbone.

Stands on torch, FrEIA and numpy alone, for use on a cluster, in a notebook or on an edge box. ``docs/flows.md`` is
the guide: the mathematics, what differs between the flows, when to use which.

>>> import torch
>>> from defectflow import build_flow
>>> flow = build_flow("patchflow", channels=(4, 6), adapted=4, bottleneck=8)
>>> maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
>>> _ = flow.fit_adaptor([maps])
>>> flow.score(maps).shape
torch.Size([2])
"""

from defectflow.csflow import CSFlow, CSFlowConfig
from defectflow.dnfad import DNFAD, DNFADConfig
from defectflow.flow import Flow, Maps
from defectflow.multiflow import MultiFlow, MultiFlowConfig
from defectflow.patchflow import PatchFlow, PatchFlowConfig
from defectflow.registry import FLOWS, build_flow, fitting_config

__all__ = [
    "DNFAD",
    "FLOWS",
    "CSFlow",
    "CSFlowConfig",
    "DNFADConfig",
    "Flow",
    "Maps",
    "MultiFlow",
    "MultiFlowConfig",
    "PatchFlow",
    "PatchFlowConfig",
    "build_flow",
    "fitting_config",
]
