"""What `sprue doctor` looks at on this machine: packages, processor, cache, keys, and who can reach it."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from sprue.errors import SprueError
from sprue.inference.cache import cache_folder, limit
from sprue.operations.archive import in_words
from sprue.operations.findings import Finding

NAMED = ("ray", "torch", "mlflow", "dvc", "openvino", "numpy")
"""Packages whose versions are listed."""
SERVICES = {
    "Ray": re.compile(r"\bray::|\b(raylet|gcs_server|haproxy)\b|/ray/|\bray (start|job)"),
    "MLflow": re.compile(r"\bmlflow\b"),
    "sprue": re.compile(r"\bsprue\b"),
    "SeaweedFS": re.compile(r"\bweed\b"),
    "Postgres": re.compile(r"\bpostgres\b"),
    "Prometheus": re.compile(r"\bprometheus\b"),
    "Grafana": re.compile(r"\bgrafana\b"),
}
"""Services that have to do with sprue, by what is in the command lines of their processes."""


def packages() -> list[Finding]:
    """The versions of Python and of the packages, and those that are not what sprue needs."""
    try:
        needed = [Requirement(text) for text in importlib.metadata.requires("sprue") or ()]
    except importlib.metadata.PackageNotFoundError:
        return [Finding("FAIL", "packages", "sprue is not installed: run pip install -e . in the repository")]
    unmet = []
    for each in needed:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        found = _version(each.name)
        if found is None:
            unmet.append(f"{each.name} is missing")
        elif not each.specifier.contains(found, prereleases=True):
            unmet.append(f"{each.name} is {found}, and has to be {each.specifier}")
    named = ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("sprue", *NAMED))
    versions = Finding("OK", "packages", f"Python {platform.python_version()}, {named}")
    if not unmet:
        return [versions]
    return [versions, Finding("FAIL", "packages", f"{'; '.join(unmet)}: run pip install -r requirements.txt")]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> list[Finding]:
    """Cores, vector instructions, memory and GPU, and what sprue chooses with them."""
    flags = _cpu_flags()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if name in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{cores} cores {' '.join(known)}, {in_words(psutil.virtual_memory().total)} of memory"
    gpu, findings = _gpu(), []
    has_openvino = _version("openvino") is not None
    if gpu and _torch_cuda() is None:
        findings = [Finding("WARN", "GPU", f"{gpu}, but torch was built without CUDA: install another torch")]
        gpu = ""
    elif gpu:
        findings = [Finding("OK", "GPU", f"{gpu}, torch is built for CUDA {_torch_cuda()}")]
    engine = "torch on the GPU" if gpu else "OpenVINO" if has_openvino else "torch"
    fits = "bfloat16" if gpu or {"avx512_bf16", "amx_bf16"} & flags else "float32"
    words += f"; the backbone runs on {engine} in float32, couplings are fitted in {fits}"
    if not gpu and not has_openvino:
        return [Finding("WARN", "processor", f"{words}; OpenVINO, which is several times faster, is missing")]
    return [Finding("OK", "processor", words), *findings]


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _gpu() -> str:
    """The GPUs' names and memory; empty without any."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=2, check=False)
    return "; ".join(done.stdout.split("\n")[:-1]) if done.returncode == 0 else ""


def _torch_cuda() -> str | None:
    """The CUDA that torch is built for. Read from its file: to import torch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = Path(found.origin).with_name("version.py").read_text()
    cuda = re.search(r"^cuda[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return cuda[1] if cuda else None


def cache() -> list[Finding]:
    """The size of the user's cache folder, and whether it can be written."""
    folder = cache_folder()
    try:
        most = limit()
    except SprueError as error:
        return [Finding("FAIL", "cache", str(error))]
    if not is_writable(folder):
        return [Finding("FAIL", "cache", f"{folder} can't be written: name another folder with SPRUE_CACHE")]
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return [Finding("OK", "cache", f"{folder}: {in_words(size)}; downloads take up to {in_words(most)}")]


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the one in which it would be made."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def keys_file(path: Path) -> list[Finding]:
    """Who can read and change the service's file of keys."""
    if not path.exists():
        return []
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        return [Finding("FAIL", "keys", f"others can change {path}, and make keys: chmod 600 {path}")]
    if mode & 0o044:
        return [Finding("WARN", "keys", f"others can read {path}, which has the keys' hashes: chmod 600 {path}")]
    return [Finding("OK", "keys", f"{path}: its owner alone can read it")]


def exposure() -> list[Finding]:
    """What listens on addresses that other machines reach."""
    open_to_others: dict[str, set[int]] = {}
    unknown = 0
    for each in psutil.net_connections("tcp"):
        if each.status != psutil.CONN_LISTEN or ip_address(each.laddr.ip).is_loopback:
            continue
        name = _service(each.pid)
        if name is None:
            unknown += each.pid is None
        else:
            open_to_others.setdefault(name, set()).add(each.laddr.port)
    if not open_to_others:
        more = f"; {unknown} sockets are other users'" if unknown else ""
        return [Finding("OK", "exposure", f"none of sprue's services listens beyond the loopback address{more}")]
    return [
        Finding(
            "WARN",
            "exposure",
            f"{name} listens beyond the loopback address on {_listed(sorted(ports))}: let a firewall or a network "
            "policy admit its clients alone",
        )
        for name, ports in sorted(open_to_others.items())
    ]


def _service(pid: int | None) -> str | None:
    """The service that a process is of; None if it has nothing to do with sprue."""
    if pid is None:
        return None
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return None
    return next((name for name, words in SERVICES.items() if words.search(command)), None)


def _listed(ports: Sequence[int]) -> str:
    shown = ", ".join(map(str, ports[:6]))
    word = "port" if len(ports) == 1 else "ports"
    return f"{word} {shown}" + (f" and {len(ports) - 6} more" if len(ports) > 6 else "")
