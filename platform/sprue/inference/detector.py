"""The detector: feature spec, flow and calibration in one object, which is what is calibrated, evaluated and served.

Shapes: B pictures, S side of the backbone's input, C channels, H rows, W columns of a map, h and w of a picture.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from defectflow import Flow, build_flow
from defectflow.flow import Evidence
from sprue.errors import SprueError
from sprue.inference.backbone import load_backbone
from sprue.inference.calibration import Calibration
from sprue.inference.engines import Engine, EngineName, build_engine
from sprue.inference.images import model_input
from sprue.inference.spec import FeatureSpec

BATCH = 16
"""Pictures that go through the backbone together."""

FLOW_BATCH = 4
"""Pictures that go through the flow together: on a CPU larger batches spend their time on fresh memory pages."""

FORMAT = 1
"""Version of the files that `Detector.save` writes."""


@dataclass(frozen=True)
class Scoring:
    """How a picture's score is made of its positions' evidence.

    Attributes:
        evidence: ``latent`` for the latent norm, ``likelihood`` for the negative log-likelihood.
        top: Share of the positions, those with the largest evidence, whose mean is the score; the flow's own if None.
    """

    evidence: Evidence = "latent"
    top: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            SprueError: If a field is out of range.
        """
        if self.evidence not in ("latent", "likelihood"):
            raise SprueError(f"scoring.evidence: {self.evidence!r} is neither 'latent' nor 'likelihood'")
        if self.top is not None and not 0 < self.top <= 1:
            raise SprueError(f"scoring.top: {self.top} is not a share above 0, at most 1")


@dataclass(frozen=True)
class Predictions:
    """What a detector says of B pictures.

    Attributes:
        score_B: The higher, the less likely.
        p_value_B: Conformal p-values; see `sprue.inference.calibration`.
        is_anomalous_B: Whether the p-value is at most the detector's alpha.
        evidence_BHW: How unusual each position is, at the feature maps' resolution.
    """

    score_B: NDArray[np.float32]
    p_value_B: NDArray[np.float64]
    is_anomalous_B: NDArray[np.bool_]
    evidence_BHW: NDArray[np.float32]

    def anomaly_map(self, index: int, size: tuple[int, int]) -> NDArray[np.float32]:
        """The evidence of one picture's pixels, [h, w], for its own size (rows, columns); bilinear."""
        evidence = torch.from_numpy(self.evidence_BHW[index])[None, None]
        return torch.nn.functional.interpolate(evidence, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


@dataclass
class Detector:
    """Scores pictures of one product class.

    Attributes:
        class_name: The product class.
        spec: The resolved feature spec.
        flow_name: The flow's key in `defectflow.FLOWS`.
        flow: The fitted flow.
        scoring: How a score is made.
        calibration: What a score means.
    """

    class_name: str
    spec: FeatureSpec
    flow_name: str
    flow: Flow
    scoring: Scoring
    calibration: Calibration

    def __post_init__(self) -> None:
        """Moves the flow to the GPU if there is one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.flow = self.flow.to(self.device).eval()

    def predict(self, images: Sequence[Image.Image], engine: Engine) -> Predictions:
        """Scores RGB pictures of any size.

        Args:
            images: Pictures as `sprue.inference.images.open_image` returns them.
            engine: An engine for this detector's feature spec; detectors with equal fingerprints can share one.
        """
        inputs_BSS3 = np.stack([model_input(image, self.spec.input_size) for image in images])
        return self.predict_inputs(inputs_BSS3, engine)

    def predict_inputs(self, inputs_BSS3: NDArray[np.uint8], engine: Engine) -> Predictions:
        """Scores pictures that are already resized to the backbone's input."""
        return _concatenate(
            [
                self.predict_features(engine(inputs_BSS3[start : start + BATCH]))
                for start in range(0, len(inputs_BSS3), BATCH)
            ]
        )

    def predict_features(self, maps: Sequence[NDArray[np.float16]]) -> Predictions:
        """Scores pictures by their backbone maps [B, C, H, W], as an engine returns them and tables store them."""
        score_B, evidence_BHW = score_features(self.flow, self.scoring, maps)
        p_value_B = self.calibration.p_values(score_B)
        return Predictions(score_B, p_value_B, p_value_B <= self.calibration.alpha, evidence_BHW)

    def save(self, folder: Path) -> None:
        """Writes everything that prediction needs: ``detector.json``, the flow's and the backbone's weights."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "format": FORMAT,
            "class_name": self.class_name,
            "spec": self.spec.to_mapping(),
            "flow": {"name": self.flow_name, "config": asdict(self.flow.config)},
            "scoring": asdict(self.scoring),
            "calibration": asdict(self.calibration),
        }
        (folder / "detector.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        safetensors.torch.save_file(portable_state(self.flow), folder / "flow.safetensors")
        safetensors.torch.save_file(portable_state(load_backbone(self.spec).model), folder / "backbone.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Detector":
        """Reads what `save` wrote; the backbone's weights are taken from the folder.

        Raises:
            SprueError: If a file is missing or of another format, or the backbone's weights are not those that the
                spec names (found when an engine is built).
        """
        try:
            facts: dict[str, Any] = json.loads((folder / "detector.json").read_text())
            state = safetensors.torch.load_file(folder / "flow.safetensors")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise SprueError(f"{folder} is not a saved detector: {error}") from error
        if facts.get("format") != FORMAT:
            raise SprueError(f"{folder} has format {facts.get('format')}, this version of sprue reads {FORMAT}")
        flow = build_flow(facts["flow"]["name"], **facts["flow"]["config"])
        flow.load_state_dict(state)
        calibration = facts["calibration"]
        return cls(
            facts["class_name"],
            replace(FeatureSpec.from_mapping(facts["spec"]), weights=f"file:{folder / 'backbone.safetensors'}"),
            facts["flow"]["name"],
            flow,
            Scoring(**facts["scoring"]),
            Calibration(**calibration | {"scores": tuple(calibration["scores"])}),
        )

    def build_engine(self, name: EngineName = "auto", threads: int | None = None) -> Engine:
        """An engine for this detector; see `sprue.inference.engines.build_engine`."""
        return build_engine(self.spec, name, threads)


def score_features(
    flow: Flow, scoring: Scoring, maps: Sequence[NDArray[np.float16]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores [B] and evidence [B, H, W] of pictures by their backbone maps [B, C, H, W]."""
    device = next(flow.buffers()).device
    scores, evidence = [], []
    for batch in _batches(maps):
        with torch.inference_mode():
            maps_on_device = [map_BCHW.to(device).float() for map_BCHW in batch]
            score_B, evidence_BHW = flow.assess(maps_on_device, scoring.evidence, scoring.top)
            scores.append(score_B.cpu().numpy())
            evidence.append(evidence_BHW.cpu().numpy())
    return np.concatenate(scores), np.concatenate(evidence)


def portable_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers as safetensors takes them: on the CPU, contiguous, none shared."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}


def _batches(maps: Sequence[NDArray[np.float16]]) -> Iterator[list[Tensor]]:
    # No pictures are one empty batch, which has the right shapes.
    for start in range(0, max(1, len(maps[0])), FLOW_BATCH):
        yield [torch.from_numpy(map_NCHW[start : start + FLOW_BATCH]) for map_NCHW in maps]


def _concatenate(parts: Sequence[Predictions]) -> Predictions:
    return Predictions(
        np.concatenate([part.score_B for part in parts]),
        np.concatenate([part.p_value_B for part in parts]),
        np.concatenate([part.is_anomalous_B for part in parts]),
        np.concatenate([part.evidence_BHW for part in parts]),
    )
