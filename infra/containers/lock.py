"""Writes the images' requirements with hashes, at the versions of requirements.txt. It needs ``pip install uv``.

``lock.py`` writes build.txt, platform.txt, scoring.txt and torch-cuda.txt for Python 3.11 on Linux on x86-64: one line
for each package, with the hashes of the files that fit there. ``lock.py --torch-cpu INDEX`` writes torch-cpu.txt alone,
from the index of torch's builds without CUDA, which PyPI has not.
"""

import argparse
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "containers" / "requirements"
PYTHON, PLATFORM = "3.11", "x86_64-manylinux_2_28"
TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.+")
"""Packages that differ between the variants of an image."""
SOURCES = {
    "build": [str(FOLDER / "build.in")],
    "platform": [str(ROOT / "pyproject.toml"), str(FOLDER / "platform.in")],
    "scoring": [str(FOLDER / "scoring.in")],
}


def resolve(source: list[str], *options: str) -> list[dict[str, Any]]:
    """The packages that a source needs, at the versions of requirements.txt, with the files that fit the images."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "pylock.toml"
        subprocess.run(
            [
                "uv", "pip", "compile", *source, "--constraints", str(ROOT / "requirements.txt"),
                "--quiet", "--no-config", "--python-version", PYTHON, "--python-platform", PLATFORM,
                "--format", "pylock.toml", "-o", str(lock), *options,
            ],
            check=True,
        )  # fmt: skip
        return list(tomllib.loads(lock.read_text())["packages"])


def line(package: dict[str, Any]) -> str:
    """A package's line in a file of requirements."""
    files = package.get("wheels") or [package["sdist"]]
    hashes = sorted(file["hashes"]["sha256"] for file in files)
    return " ".join([f"{package['name']}=={package['version']}", *(f"--hash=sha256:{each}" for each in hashes)])


def write(name: str, packages: list[dict[str, Any]]) -> None:
    """Writes a file of requirements."""
    lines = ["# Written by infra/containers/lock.py.", *(line(package) for package in packages)]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"{name}.txt: {len(packages)} packages")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-cpu", metavar="INDEX", help="write torch-cpu.txt alone, from this package index")
    index = parser.parse_args().torch_cpu
    if index:
        # Those builds carry a local version, as in 2.14.1+cpu, which satisfies 2.14.1.
        found = resolve(SOURCES["scoring"], "--extra-index-url", index, "--index-strategy", "unsafe-best-match")
        write("torch-cpu", [each for each in found if TORCH.fullmatch(each["name"])])
        return
    for name, source in SOURCES.items():
        found = resolve(source)
        write(name, [each for each in found if not TORCH.fullmatch(each["name"])])
    write("torch-cuda", [each for each in found if TORCH.fullmatch(each["name"])])


if __name__ == "__main__":
    main()
