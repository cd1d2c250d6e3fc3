"""The detector behind MLflow's model interface; MLflow runs this file when it loads the model."""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from sprue.inference.detector import Detector
from sprue.inference.images import open_image


class DetectorModel(PythonModel):
    """Scores encoded pictures, the ``image`` column of a frame, with the detector among the model's artifacts."""

    def load_context(self, context: Any) -> None:
        """Loads the detector and an engine for it."""
        self.detector = Detector.load(Path(context.artifacts["detector"]))
        self.engine = self.detector.build_engine()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row of score, p_value and is_anomalous for each picture.

        Raises:
            sprue.errors.SprueError: If a picture can't be decoded.
        """
        images = [open_image(data, f"row {row}") for row, data in enumerate(model_input["image"])]
        predictions = self.detector.predict(images, self.engine)
        return pd.DataFrame(
            {
                "score": predictions.score_B.astype(float),
                "p_value": predictions.p_value_B,
                "is_anomalous": predictions.is_anomalous_B,
            }
        )


mlflow.models.set_model(DetectorModel())
