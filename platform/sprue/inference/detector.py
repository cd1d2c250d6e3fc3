"""The detector: feature spec, flow and calibration in one object, which is calibrated, evaluated and served.

A sample is one image of a part, or several images: its views.

Shapes: B samples, V views, N images of all samples (those of the first, then those of the second ...), S side of the
backbone's input, C channels, H rows and W columns of a feature map or of its position scores, h and w of an image.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from torch import Tensor

from defectflow import Ensemble, Flow, build_flow
from sprue.config import ScoringSettings
from sprue.errors import SprueError
from sprue.formats import DETECTOR
from sprue.inference.calibration import Calibration
from sprue.inference.engines import Engine, EngineName, build_engine
from sprue.inference.images import model_input
from sprue.inference.precision import use_full_precision
from sprue.inference.spec import FeatureSpec
from sprue.inference.weights import portable_state

BATCH = 16
"""Images that the backbone takes together."""

FLOW_BATCH = 16
"""Samples that the flow takes together."""

SampleImages: TypeAlias = Image.Image | Sequence[Image.Image]
"""A sample: an image of each view, in the views' order, or its only image."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for B samples.

    Attributes:
        score_B: Anomaly scores.
        p_value_B: Conformal p-values; see `sprue.inference.calibration`.
        is_anomalous_B: Whether the score is above the calibration's threshold.
        image_score_BV: The score of each image, given the sample's others; an only image's is the sample's.
        position_scores_BVHW: The score of each position of each image, at the feature maps' resolution.
    """

    score_B: NDArray[np.float32]
    p_value_B: NDArray[np.float64]
    is_anomalous_B: NDArray[np.bool_]
    image_score_BV: NDArray[np.float32]
    position_scores_BVHW: NDArray[np.float32]

    def anomaly_map(self, index: int, size: tuple[int, int], view: int = 0) -> NDArray[np.float32]:
        """Anomaly map [h, w] of a sample's view, for its size (rows, columns); see the function `anomaly_map`."""
        return anomaly_map(self.position_scores_BVHW[index, view], size)

    def __getitem__(self, samples: slice) -> "Predictions":
        """The predictions for some of the samples."""
        return Predictions(*(getattr(self, field.name)[samples] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Joins the predictions for several batches."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass
class Detector:
    """Scores samples of one product class.

    Attributes:
        dataset: The dataset.
        class_name: The product class in it.
        spec: The feature spec.
        flow_name: The flow's key in `defectflow.FLOWS`.
        flow: The fitted flow, or several that cross-conformal calibration has fitted.
        scoring: How a score is made of position scores.
        calibration: Thresholds and p-values.
        views: Names of a sample's views, in order; ``("",)`` for samples of one image.
    """

    dataset: str
    class_name: str
    spec: FeatureSpec
    flow_name: str
    flow: Flow | Ensemble
    scoring: ScoringSettings
    calibration: Calibration
    views: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        """Moves the flow to the GPU if there is one.

        Raises:
            SprueError: If the flow reads another number of views.
        """
        require_views(self.class_name, self.flow_name, self.flow, len(self.views))
        self.device = best_device()
        self.flow = self.flow.to(self.device).eval()

    def predict(self, samples: Sequence[SampleImages], engine: Engine) -> Predictions:
        """Scores samples of RGB images of any size.

        Args:
            samples: Images as `sprue.inference.images.open_image` returns them, a sample's in the order of `views`.
            engine: An engine for this detector's feature spec; detectors with equal fingerprints can share one.

        Raises:
            SprueError: If a sample does not have one image for each view.
        """
        inputs = []
        for number, sample in enumerate(samples):
            images = [sample] if isinstance(sample, Image.Image) else sample
            if len(images) != len(self.views):
                raise SprueError(
                    f"class {self.class_name}: sample {number} has {len(images)} images; its detector reads "
                    f"{len(self.views)} {', '.join(self.views)}".rstrip()
                )
            inputs += [model_input(image, self.spec.input_size) for image in images]
        return self.predict_inputs(np.stack(inputs), engine)

    def predict_inputs(self, inputs_NSS3: NDArray[np.uint8], engine: Engine) -> Predictions:
        """Scores samples whose images are already resized to the backbone's input [N, S, S, 3]."""
        step = max(1, BATCH // len(self.views)) * len(self.views)
        return Predictions.concatenate(
            [self.predict_maps(engine(inputs_NSS3[start : start + step])) for start in range(0, len(inputs_NSS3), step)]
        )

    def predict_maps(self, maps: Sequence[NDArray[np.float16]]) -> Predictions:
        """Scores samples by their images' backbone maps [N, C, H, W], as an engine returns them."""
        views = len(self.views)
        return self.predict_features([map_NCHW[view::views] for view in range(views) for map_NCHW in maps])

    def predict_features(self, maps: Sequence[NDArray[np.float16]]) -> Predictions:
        """Scores samples by their views' backbone maps [B, C, H, W]: those of the first view, then of the second ..."""
        score_B, image_score_BV, position_scores_BVHW = score_features(self.flow, self.scoring, maps)
        p_value_B = self.calibration.p_values(score_B)
        is_anomalous_B = self.calibration.is_anomalous(score_B)
        return Predictions(score_B, p_value_B, is_anomalous_B, image_score_BV, position_scores_BVHW)

    def save(self, folder: Path) -> None:
        """Writes ``detector.json`` and ``flow.safetensors``.

        The backbone's weights, which many detectors read, are kept apart: the feature spec has their digest.
        """
        folder.mkdir(parents=True, exist_ok=True)
        members = len(self.flow.members) if isinstance(self.flow, Ensemble) else 1
        saved = _SavedDetector(**vars(self), flow_config=asdict(self.flow.config), members=members)
        content = DETECTOR.stamped(saved.model_dump(mode="json"))
        (folder / "detector.json").write_text(json.dumps(content, indent=2) + "\n")
        safetensors.torch.save_file(portable_state(self.flow), folder / "flow.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Detector":
        """Reads what `save` wrote.

        Raises:
            SprueError: If a file is missing, damaged or of another format.
        """
        try:
            content = DETECTOR.current(json.loads((folder / "detector.json").read_text()), folder / "detector.json")
            saved = _SavedDetector.model_validate_json(json.dumps(content))
            state = safetensors.torch.load_file(folder / "flow.safetensors")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise SprueError(f"{folder} is not a saved detector: {error}") from error
        flows = [build_flow(saved.flow_name, **saved.flow_config) for _ in range(saved.members)]
        flow = flows[0] if len(flows) == 1 else Ensemble(flows)
        flow.load_state_dict(state)
        values = dict(saved) | {"flow": flow}
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def build_engine(self, weights: Path, name: EngineName = "auto", threads: int | None = None) -> Engine:
        """An engine for this detector, see `sprue.inference.engines.build_engine`, with its weights from a file.

        `sprue.inference.backbone.backbone_state` makes such files. Others than those whose digest the feature spec has
        are refused.
        """
        return build_engine(self.spec.model_copy(update={"weights": f"file:{weights}"}), name, threads)


class _SavedDetector(BaseModel):
    """The file ``detector.json``; see `Detector` for the fields."""

    dataset: str
    class_name: str
    spec: FeatureSpec
    flow_name: str
    flow_config: dict[str, Any]
    members: int
    """Flows of this configuration, whose mean scores."""
    scoring: ScoringSettings
    calibration: Calibration
    views: tuple[str, ...]


def anomaly_map(position_scores_HW: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Upsamples an image's position scores to its pixels, [h, w], for its size (rows, columns); bilinear."""
    scores_11HW = torch.from_numpy(position_scores_HW)[None, None]
    return torch.nn.functional.interpolate(scores_11HW, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_views(class_name: str, flow_name: str, flow: Flow | Ensemble, views: int) -> None:
    """Checks that a flow takes samples of a number of views.

    Raises:
        SprueError: If it does not; the message names the class.
    """
    if flow.views == views:
        return
    advice = f"set flow.views to {views}" if flow_name == "multiflow" else "choose the flow multiflow"
    if views == 1:
        advice = "choose a flow of single images, such as patchflow"
    raise SprueError(
        f"class {class_name}: its samples have {views} images each, and {flow_name} reads {flow.views}; {advice}"
    )


def score_features(
    flow: Flow | Ensemble, scoring: ScoringSettings, maps: Sequence[NDArray[np.float16]]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Scores samples by their views' backbone maps [B, C, H, W]; see `Detector.predict_features`.

    Sets the flow to evaluation: in training it would add noise and read only some of the positions.

    Returns:
        Scores [B] of the samples, scores [B, V] and position scores [B, V, H, W] of their images.
    """
    flow.eval()
    use_full_precision()
    device = next(flow.buffers()).device
    parts = []
    for batch in _batches(maps):
        with torch.inference_mode():
            maps_on_device = [map_BCHW.to(device).float() for map_BCHW in batch]
            predicted = flow.predict_images(maps_on_device, scoring.score_type, scoring.top)
            parts.append([each.cpu().numpy() for each in predicted])
    score_B, image_score_BV, position_scores_BVHW = (np.concatenate(each) for each in zip(*parts, strict=True))
    return score_B, image_score_BV, position_scores_BVHW


def _batches(maps: Sequence[NDArray[np.float16]]) -> Iterator[list[Tensor]]:
    # Without samples there is one empty batch, whose results have the right shapes. Maps that the flow does not read
    # may be empty.
    for start in range(0, max(1, *map(len, maps)), FLOW_BATCH):
        yield [torch.from_numpy(map_BCHW[start : start + FLOW_BATCH]) for map_BCHW in maps]
