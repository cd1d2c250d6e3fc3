"""`sprue doctor`: in one page what is installed, reachable, writable, too old and exposed."""

from functools import partial
from pathlib import Path

from upath import UPath

from sprue.operations import machine, services
from sprue.operations.findings import Finding, Probe, run_probes


def examine(store: UPath, keys: Path) -> list[Finding]:
    """Looks at everything at the same time, for a few seconds at most.

    Args:
        store: The store.
        keys: The service's file of keys, which need not exist.
    """
    return run_probes(
        [
            Probe("packages", machine.packages),
            Probe("processor", machine.processor),
            Probe("store", partial(services.store, store)),
            Probe("registry", partial(services.registry, store)),
            Probe("Ray", services.ray_cluster),
            Probe("keys", partial(machine.keys_file, keys)),
            Probe("cache", machine.cache, late="WARN"),
            Probe("exposure", machine.exposure, late="WARN"),
        ]
    )
