"""An empty tracking store on SQLite, for one module."""

from collections.abc import Iterator

import mlflow
import pytest
from upath import UPath

from sprue.store import location
from sprue.tracking.server import connect


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
