"""Where a run's weights come from: code, data, packages and machine, as the tags of its run."""

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

PACKAGES = ("torch", "FrEIA", "timm", "openvino", "ray", "numpy")
"""What the weights depend on, besides the code and the data."""


def provenance(commit: str, data: str, fingerprint: str) -> dict[str, str]:
    """Tags of a run.

    Args:
        commit: The code's.
        data: Digest of the manifest, which names each picture by its digest.
        fingerprint: Of the feature spec.
    """
    return {
        "sprue.commit": commit,
        "sprue.data": data,
        "sprue.features": fingerprint,
        "sprue.packages": " ".join(pinned(PACKAGES)),
        "sprue.machine": f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores",
        "sprue.job": job(),
        "sprue.cluster": ", ".join(f"{count:g} {name}" for name, count in _resources().items()) or "none",
    }


def job() -> str:
    """The Ray job that this process is part of, by the name under which it was submitted; ``none`` outside of one."""
    config = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return str(config.get("metadata", {}).get("job_submission_id", "none"))


def pinned(packages: Iterable[str]) -> list[str]:
    """``name==version`` of those that are installed; OpenVINO is not made for every machine.

    >>> pinned(["numpy", "no-such-package"]) == [f"numpy=={version('numpy')}"]
    True
    """
    found = []
    for name in packages:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster that this process is connected to, and how many machines there are."""
    if not ray.is_initialized():
        return {}
    found = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return {"nodes": nodes} | {name: found[name] for name in ("CPU", "GPU") if name in found}
