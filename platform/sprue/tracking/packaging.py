"""Packages a detector as an MLflow model that runs without Ray and DVC."""

import logging
import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.protos.databricks_pb2 import BAD_REQUEST, ErrorCode
from mlflow.types import ColSpec, DataType, Schema

import defectflow
import sprue
from sprue.inference.detector import Detector
from sprue.tracking.provenance import pinned
from sprue.tracking.registry import DETECTOR_TAG
from sprue.tracking.runs import FitRun

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""To log a model. MLflow's client repeats a call whose response was lost, and a server that had done what the first one
asked refuses the second; a new model is not affected."""

REQUIREMENTS = ("FrEIA", "numpy", "openvino", "pandas", "pillow", "pydantic", "safetensors", "timm", "torch")


def signature(views: Sequence[str]) -> ModelSignature:
    """From a column of encoded images (PNG, JPEG ...) for each view to one row of scores a sample."""
    scores = [f"score_{view}" for view in views] if len(views) > 1 else []
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, view or "image") for view in views]),
        outputs=Schema(
            [
                ColSpec(DataType.double, "score"),
                ColSpec(DataType.double, "p_value"),
                ColSpec(DataType.boolean, "is_anomalous"),
                *(ColSpec(DataType.double, name) for name in scores),
            ]
        ),
    )


def log_detector(
    folder: Path, weights: str, run: FitRun, detector_key: str, example: Sequence[bytes], metadata: dict[str, Any]
) -> str:
    """Packages a saved detector and logs it to a run, unless the run has it; deletes what interrupted attempts left.

    The caller holds the model's lock.

    Code (`defectflow` and `sprue.inference`), the flow and pinned requirements travel with it. It is logged as code,
    not pickled. The backbone's weights are read from where they are, and verified, when the model is loaded; its
    configuration may name another place: ``mlflow.pyfunc.load_model(uri, model_config={"weights": FILE})``.

    Args:
        folder: Where `Detector.save` has written a calibrated detector.
        weights: URI of the backbone's weights; see `sprue.tracking.backbones.log_backbone`.
        run: That of the fit.
        detector_key: Names the detector by its inputs.
        example: A sample's encoded images, kept as the input example.
        metadata: Facts about the model, as JSON.

    Returns:
        The logged model's URI.

    Raises:
        MlflowException: If MLflow refuses `ATTEMPTS` times, or fails in another way.
    """
    for attempt in range(1, ATTEMPTS + 1):
        complete = [model for model in logged_models(run, detector_key) if model.status == LoggedModelStatus.READY]
        try:
            uri = complete[0].model_uri if complete else _log(folder, weights, run, detector_key, example, metadata)
            break
        except MlflowException as error:
            if attempt == ATTEMPTS or error.error_code != ErrorCode.Name(BAD_REQUEST):
                raise
            logger.warning("the model of run %s is logged once more: %s", run.run_id, str(error).partition("\n")[0])
    for model in logged_models(run, detector_key):
        if model.model_uri != uri:
            mlflow.MlflowClient().delete_logged_model(model.model_id)
    return uri


def logged_models(run: FitRun, detector_key: str) -> list[LoggedModel]:
    """A run's models of a detector, complete or not."""
    found = mlflow.MlflowClient().search_logged_models([run.experiment_id], f"source_run_id = '{run.run_id}'")
    return [model for model in found if model.tags.get(DETECTOR_TAG) == detector_key]


def _log(
    folder: Path, weights: str, run: FitRun, detector_key: str, example: Sequence[bytes], metadata: dict[str, Any]
) -> str:
    """Logs the model with a client's single calls.

    `mlflow.pyfunc.log_model` would fetch the weights, load each model to try it, and open, read and end the run.
    """
    client, detector = mlflow.MlflowClient(), Detector.load(folder)
    # A class's name may have characters that MLflow takes in no logged model's name.
    name = re.sub("[/:.%\"']", "-", detector.class_name)
    model = client.create_logged_model(run.experiment_id, name, run.run_id, {DETECTOR_TAG: detector_key}, run.params)
    client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step=0)])
    with tempfile.TemporaryDirectory() as temporary:
        # The artifact's folder gets the name of the source.
        shutil.copytree(folder, Path(temporary, "detector"))
        mlflow.pyfunc.save_model(
            Path(temporary, "model"),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=run.run_id,
                metadata=metadata,
                model_id=model.model_id,
            ),
            python_model=str(Path(__file__).parent / "pyfunc_model.py"),
            artifacts={"detector": str(Path(temporary, "detector"))},
            model_config={"weights": weights},
            code_paths=[str(_portable_code(Path(temporary)))],
            signature=signature(detector.views),
            input_example=pd.DataFrame([example], columns=[view or "image" for view in detector.views]),
            pip_requirements=["mlflow-skinny==" + version("mlflow"), *pinned(REQUIREMENTS)],
        )
        client.log_model_artifacts(model.model_id, str(Path(temporary, "model")))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model.model_uri


def _portable_code(folder: Path) -> Path:
    """An archive of the packages that prediction imports, and of nothing else of sprue.

    It is one file, as each is a request to the tracking server for each class; ``pyfunc_model.py`` finds it.
    """
    flows, platform = Path(defectflow.__file__).parent, Path(sprue.__file__).parent
    modules = [platform / name for name in ("__init__.py", "errors.py", "formats.py", "config.py")]
    files = {
        path.relative_to(package.parent): path
        for package, found in (
            (flows, flows.rglob("*.py")),
            (platform, [*modules, *platform.glob("inference/**/*.py")]),
        )
        for path in found
    }
    with ZipFile(folder / "code.zip", "w", ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            # A time of its own would make equal code differ.
            archive.writestr(ZipInfo(name.as_posix()), path.read_bytes(), ZIP_DEFLATED)
    return folder / "code.zip"
