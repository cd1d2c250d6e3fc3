"""The backbones' weights: once for each digest on the tracking server, however many detectors read them.

They are the artifact of a run in an experiment of their own, which names the digest in a tag. Jobs that register at
the same time may both log one: either serves.
"""

import tempfile
from pathlib import Path

import mlflow
import safetensors
import safetensors.torch
from mlflow.exceptions import MlflowException
from upath import UPath

from sprue.errors import SprueError
from sprue.inference.cache import cached
from sprue.inference.detector import Detector
from sprue.inference.engines import Engine
from sprue.inference.weights import state_digest
from sprue.tracking.server import experiment_id

EXPERIMENT = "sprue-backbones"
WEIGHTS_TAG = "sprue.weights"
FILE = "backbone.safetensors"


def log_backbone(digest: str, file: UPath, store: UPath) -> str:
    """Logs a backbone's weights, unless the tracking server has them; returns their URI.

    Args:
        digest: The `weights_digest` of the feature specs that read them.
        file: The file, which `sprue.inference.backbone.backbone_state` has made.
        store: Where the artifacts of a tracking database without a server are.

    Raises:
        SprueError: If the file is missing, or holds other weights.
    """
    if found := _find(digest):
        return found
    if not file.is_file():
        raise SprueError(f"there is no {file}; run the features stage first")
    client = mlflow.MlflowClient()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, FILE)
        copy.write_bytes(file.read_bytes())
        _require_digest(copy, digest, str(file))
        run = client.create_run(experiment_id(EXPERIMENT, store), run_name=digest[:16], tags={WEIGHTS_TAG: digest})
        client.log_artifact(run.info.run_id, str(copy))
    client.set_terminated(run.info.run_id)
    return _uri(run)


def fetch_backbone(digest: str) -> Path:
    """The file of a backbone's weights in the user's cache folder, downloaded if they are not there.

    Raises:
        SprueError: If the tracking server has none of this digest, or they can't be had, or are others.
    """

    def download(folder: Path) -> None:
        uri = _find(digest)
        if uri is None:
            raise SprueError(
                f"the tracking server has no backbone weights with digest {digest[:16]}: register a detector that "
                "reads them anew"
            )
        try:
            found = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
        except (MlflowException, OSError) as error:
            raise SprueError(f"the backbone weights {uri} can't be had: {error}") from error
        _require_digest(found, digest, uri)

    return cached(f"weights/{digest}", download, lambda folder: _digest(folder / FILE) == digest) / FILE


def registered_engine(detector: Detector, threads: int | None = None) -> Engine:
    """An engine for a registered detector; raises as `fetch_backbone` and `sprue.inference.engines.build_engine`."""
    return detector.build_engine(fetch_backbone(detector.spec.weights_digest), threads=threads)


def _find(digest: str) -> str | None:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    # A run whose upload was interrupted has not finished.
    query = f"tags.`{WEIGHTS_TAG}` = '{digest}' and attributes.status = 'FINISHED'"
    found = client.search_runs([experiment.experiment_id], query, max_results=1)
    return _uri(found[0]) if found else None


def _uri(run: mlflow.entities.Run) -> str:
    return f"{run.info.artifact_uri}/{FILE}"


def _require_digest(file: Path, digest: str, name: str) -> None:
    if (found := _digest(file)) != digest:
        raise SprueError(f"{name} holds other backbone weights than those with digest {digest[:16]}: {found[:16]}")


def _digest(file: Path) -> str:
    """The digest of a file's weights; empty if it has none."""
    try:
        return state_digest(safetensors.torch.load_file(file))
    except (OSError, ValueError, safetensors.SafetensorError):
        return ""
