"""FrEIA's base class of modules, without the slow part of FrEIA's import.

FrEIA imports ``scipy.stats`` for one function, of a block that no flow here has. It is imported when that is called;
``benchmarks/imports.py`` says what the start of a worker would take otherwise.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

STATS = "scipy.stats"


class _Later:
    """`scipy.stats.special_ortho_group`, imported when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(STATS).special_ortho_group, name)


class _StandIn(ModuleType):
    """What FrEIA finds as ``scipy.stats``; another thread that imports it meanwhile gets the true one's content."""

    special_ortho_group = _Later()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove(self)
        return getattr(importlib.import_module(STATS), name)


def _remove(stand_in: ModuleType) -> None:
    if sys.modules.get(STATS) is stand_in:
        del sys.modules[STATS]


_stand_in = _StandIn(STATS)
sys.modules.setdefault(STATS, _stand_in)
try:
    from FrEIA.modules import InvertibleModule
finally:
    _remove(_stand_in)

__all__ = ["InvertibleModule"]
