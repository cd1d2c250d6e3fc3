"""The demo: the pipeline on an embedded dataset, and its champions served over HTTP."""

import socket
from pathlib import Path

import pandas as pd
import requests

from sprue.data.manifest import Manifest
from sprue.demo.textures import write_textures
from sprue.demo.views import write_views
from sprue.serving.launch import ServeSettings, serve_champions, stop_serving
from sprue.stages.dvc import run
from sprue.store import location


def run_demo() -> None:
    """Runs the pipeline on three textures, serves the champions and scores images; leaves nothing running."""
    data = Path("data/textures")
    if not data.exists():
        write_textures(data)
    run("textures", data, first_recipe="patchflow-cpu")
    url = serve_champions(ServeSettings(port=_free_port()))
    try:
        print(f"\nthe champions are served at {url}; one good and one defective image of each class over HTTP:\n")
        print(_score_examples(url, data).to_string(index=False))
    finally:
        stop_serving()


def run_views_demo() -> None:
    """Runs the pipeline on samples of three views with Multi-Flow."""
    data = Path("data/views")
    if not data.exists():
        write_views(data)
    run("views", data, layout="mvtec-views", first_recipe="multiflow-cpu")


def _free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _score_examples(url: str, data: Path) -> pd.DataFrame:
    """One good and one defective image of each class, scored over HTTP."""
    manifest = Manifest.read(location(f"store/{data.name}/manifest.parquet"))
    answers = []
    for class_name in manifest.classes:
        rows = manifest.select(class_name, "test")
        for label in (0, 1):
            path = rows[rows["label"] == label].iloc[0]["path"]
            answer = requests.post(
                f"{url}/v1/classes/{data.name}.{class_name}/score",
                data=(data / path).read_bytes(),
                headers={"Content-Type": "image/png"},
                timeout=60,
            )
            answer.raise_for_status()
            answers.append({"image": path, **answer.json()})
    return pd.DataFrame(answers)[["image", "score", "p_value", "alpha", "is_anomalous"]]
