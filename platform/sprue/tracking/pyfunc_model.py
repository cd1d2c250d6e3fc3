"""The detector behind MLflow's model interface; MLflow runs this file when it loads the model."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel

# The packages that are imported below, in a logged model.
if (archive := Path(__file__).parent / "code" / "code.zip").is_file():
    sys.path.insert(0, str(archive))

from sprue.inference.detector import Detector
from sprue.inference.images import open_image


class DetectorModel(PythonModel):
    """Scores encoded images with the detector among the model's artifacts.

    A row of the frame is a sample, a column a view, of the view's name; the one image of single-view samples is in
    the column ``image``.
    """

    def load_context(self, context: Any) -> None:
        """Loads the detector and an engine for it, with the backbone's weights that the configuration names."""
        self.detector = Detector.load(Path(context.artifacts["detector"]))
        with tempfile.TemporaryDirectory() as folder:
            weights = mlflow.artifacts.download_artifacts(context.model_config["weights"], dst_path=folder)
            self.engine = self.detector.build_engine(Path(weights))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row of score, p_value and is_anomalous for each sample, and where it has several views ``score_<view>``.

        Raises:
            sprue.errors.SprueError: If an image can't be decoded.
        """
        columns = model_input[[view or "image" for view in self.detector.views]]
        samples = [
            [open_image(data, f"{name} of row {row}") for name, data in zip(columns, images, strict=True)]
            for row, images in enumerate(columns.itertuples(index=False, name=None))
        ]
        predictions = self.detector.predict(samples, self.engine)
        answer = pd.DataFrame(
            {
                "score": predictions.score_B.astype(float),
                "p_value": predictions.p_value_B,
                "is_anomalous": predictions.is_anomalous_B,
            }
        )
        if len(self.detector.views) > 1:
            for view, score_B in zip(self.detector.views, predictions.image_score_BV.T, strict=True):
                answer[f"score_{view}"] = score_B.astype(float)
        return answer


mlflow.models.set_model(DetectorModel())
