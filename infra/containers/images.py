"""Pins and builds images.

``images.py pin`` asks the registries for the digests of the images in images.txt and writes images.lock, a file for
``docker compose --env-file``. ``images.py check`` ends with status 1 unless each of them is pinned there. ``images.py
build`` builds one of ours from the pinned base; it needs Docker with buildx, and so does ``pin``.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NAMES, LOCK = FOLDER / "images.txt", FOLDER / "images.lock"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ImageError(Exception):
    """Why an image is not pinned or built, in a line."""


def read(path: Path) -> dict[str, str]:
    """The lines NAME=VALUE of a file."""
    if not path.exists():
        raise ImageError(
            f"there is no {path}: `python infra/containers/images.py pin` writes it, with a registry in reach"
        )
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def pinned(names: Path, lock: Path) -> dict[str, str]:
    """The images with their digests.

    Raises:
        ImageError: If one is not pinned, or pinned under another tag.
    """
    wanted, found = read(names), read(lock)
    for name, image in wanted.items():
        tag, _, digest = found.get(name, "").partition("@")
        if tag != image or not DIGEST.fullmatch(digest):
            raise ImageError(f"{name}={image} is not pinned in {lock}: run `python infra/containers/images.py pin`")
    return found


def pin() -> None:
    """Writes images.lock."""
    lines = ["# Written by infra/containers/images.py pin."]
    for name, image in read(NAMES).items():
        command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{json .Manifest}}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ImageError(f"{image}: {done.stderr.strip()}")
        digest = json.loads(done.stdout)["digest"]
        if not DIGEST.fullmatch(digest):
            raise ImageError(f"{image}: the registry answers {digest!r}, which is no digest")
        lines.append(f"{name}={image}@{digest}")
    LOCK.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[1:]))


def build(kind: str, variant: str, tag: str, version: str, torch_index: str, options: list[str]) -> None:
    """Builds an image for the Docker that runs here, or as buildx's `options` say."""
    base = pinned(NAMES, LOCK)["PYTHON_IMAGE"]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    arguments = {
        "PYTHON_IMAGE": base, "SET": kind, "VARIANT": variant, "TORCH_INDEX": torch_index, "VERSION": version,
        "REVISION": revision.stdout.strip(),
    }  # fmt: skip
    given = [each for name, value in arguments.items() for each in ("--build-arg", f"{name}={value}")]
    command = ["docker", "buildx", "build", "--file", str(FOLDER / "Dockerfile"), "--tag", tag, *given, *options, "."]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ImageError(f"{tag} was not built")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("pin", help="write images.lock")
    actions.add_parser("check", help="fail unless all images are pinned")
    builder = actions.add_parser(
        "build", help="build an image of sprue; what follows `--` goes to `docker buildx build`"
    )
    builder.add_argument("kind", choices=["platform", "scoring"])
    builder.add_argument("variant", choices=["cpu", "cuda"])
    builder.add_argument("--tag", required=True)
    builder.add_argument("--version", default="0")
    builder.add_argument("--torch-index", default="", help="index of torch's builds without CUDA, for `cpu`")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:end])
    try:
        if given.action == "pin":
            pin()
        elif given.action == "check":
            pinned(NAMES, LOCK)
        else:
            build(given.kind, given.variant, given.tag, given.version, given.torch_index, words[end + 1 :])
    except ImageError as error:
        sys.exit(f"images: {error}")


if __name__ == "__main__":
    main()
