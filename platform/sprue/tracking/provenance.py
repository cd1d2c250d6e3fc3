"""What made a run's weights: code, data, packages and machine, as tags of the run."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import ray

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable in the driver of a job; it has no public function that tells the job's submission id."""

PACKAGES = ("torch", "FrEIA", "timm", "openvino", "ray", "numpy")
"""What the weights depend on, besides code and data."""


def commit() -> str:
    """The code's commit: ``$SPRUE_COMMIT`` where there is no repository, as in a Ray job; ``unknown`` without both."""
    named = os.environ.get("SPRUE_COMMIT")
    if named:
        return named
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # a node without git
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def provenance(data: str, fingerprint: str) -> dict[str, str]:
    """Tags of a run.

    Args:
        data: Digest of the manifest, which has each image's digest.
        fingerprint: Of the feature spec.
    """
    return {
        "sprue.commit": commit(),
        "sprue.data": data,
        "sprue.features": fingerprint,
        "sprue.packages": " ".join(pinned(PACKAGES)),
        "sprue.machine": f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores",
        "sprue.job": job(),
        "sprue.cluster": ", ".join(f"{count:g} {name}" for name, count in _resources().items()) or "none",
    }


def job() -> str:
    """The submission id of the Ray job that this process runs in; ``none`` outside of one."""
    config = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    return str(config.get("metadata", {}).get("job_submission_id", "none"))


def pinned(packages: Iterable[str]) -> list[str]:
    """``name==version`` of the installed packages; OpenVINO does not exist for every machine.

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
