"""The main job on the embedded dataset: from pictures of good parts to scored HTTP requests."""

import logging
import socket
import sys
from pathlib import Path

import pandas as pd
import requests
from run import run

from sprue.data.manifest import Manifest
from sprue.data.textures import write_textures
from sprue.errors import SprueError
from sprue.serving.run import serve_champions, stop_serving
from sprue.store import location

TEXTURES = Path("data/textures")


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def score_examples(url: str) -> pd.DataFrame:
    """One good and one defective picture of each class, scored over HTTP."""
    manifest = Manifest.read(location("store/textures/manifest.parquet"))
    answers = []
    for class_name in manifest.classes:
        rows = manifest.select(class_name, "test")
        for label in (0, 1):
            row = rows[rows["label"] == label].iloc[0]
            data = (TEXTURES / row["path"]).read_bytes()
            headers = {"Content-Type": "image/png"}
            answer = requests.post(f"{url}/v1/classes/{class_name}/score", data=data, headers=headers, timeout=60)
            answer.raise_for_status()
            answers.append({"picture": row["path"], **answer.json()})
    return pd.DataFrame(answers)[["picture", "score", "p_value", "alpha", "is_anomalous"]]


def main() -> None:
    """Makes the dataset, runs the pipeline, serves the champions and scores pictures; leaves nothing running."""
    if not TEXTURES.exists():
        write_textures(TEXTURES)
    run(TEXTURES, "textures", first_recipe="patchflow-cpu")
    url = serve_champions(port=free_port())
    try:
        print(f"\nthe champions are served at {url}; one good and one defective picture of each class over HTTP:\n")
        print(score_examples(url).to_string(index=False))
    finally:
        stop_serving()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except SprueError as error:
        sys.exit(f"sprue demo: {error}")
