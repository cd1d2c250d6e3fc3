"""The detector: feature spec, flow and calibration in one object, which is what is calibrated, evaluated and served.

A sample is one picture of a part or several, its views.

Shapes: B samples, V views, N pictures of all samples (those of the first, then those of the second ...), S side of the
backbone's input, C channels, H rows, W columns of a map, h and w of a picture.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from defectflow import Flow, build_flow
from defectflow.flow import Evidence
from sprue.errors import SprueError
from sprue.inference.calibration import Calibration
from sprue.inference.engines import Engine, EngineName, build_engine
from sprue.inference.images import model_input
from sprue.inference.precision import use_full_precision
from sprue.inference.spec import FeatureSpec

BATCH = 16
"""Pictures that go through the backbone together."""

FLOW_BATCH = 16
"""Samples that go through the flow together."""

FORMAT = 5
"""Version of the files that `Detector.save` writes."""

READ = (3, 4, FORMAT)
"""Versions that `Detector.load` reads; the third has no threshold for pixels."""

AS_BEFORE = {"dnfad": {"rectified": ("local", "global"), "upsampling": 1}}
"""What flows of versions before the fifth were, whose configs do not say it."""


SampleImages: TypeAlias = Image.Image | Sequence[Image.Image]
"""A sample: a picture of each view, in the views' order, or the one picture that there is."""


@dataclass(frozen=True)
class Scoring:
    """How a picture's score is made of its positions' evidence.

    Attributes:
        evidence: ``latent`` for the latent norm, ``likelihood`` for the negative log-likelihood.
        top: Share of the positions (DNFAD: of its upsampled map), those with the largest evidence, whose mean is the
            score; the flow's own if None.
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
    """What a detector says of B samples.

    Attributes:
        score_B: The higher, the less likely.
        p_value_B: Conformal p-values; see `sprue.inference.calibration`.
        is_anomalous_B: Whether the p-value is at most the detector's alpha.
        picture_score_BV: The score of each of a sample's pictures, given the others; a lone picture's is the sample's.
        evidence_BVHW: How unusual each position of each picture is, at the feature maps' resolution.
    """

    score_B: NDArray[np.float32]
    p_value_B: NDArray[np.float64]
    is_anomalous_B: NDArray[np.bool_]
    picture_score_BV: NDArray[np.float32]
    evidence_BVHW: NDArray[np.float32]

    def anomaly_map(self, index: int, size: tuple[int, int], view: int = 0) -> NDArray[np.float32]:
        """The evidence of the pixels of a sample's view; see `anomaly_map`."""
        return anomaly_map(self.evidence_BVHW[index, view], size)

    def __getitem__(self, samples: slice) -> "Predictions":
        """What it says of some of the samples."""
        return Predictions(*(getattr(self, field.name)[samples] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Those of several parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass
class Detector:
    """Scores samples of one product class.

    Attributes:
        class_name: The product class.
        spec: The resolved feature spec.
        flow_name: The flow's key in `defectflow.FLOWS`.
        flow: The fitted flow.
        scoring: How a score is made.
        calibration: What a score means.
        views: Names of a sample's views, in order; one, without a name, for samples of one picture.
    """

    class_name: str
    spec: FeatureSpec
    flow_name: str
    flow: Flow
    scoring: Scoring
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
        """Scores samples of RGB pictures of any size.

        Args:
            samples: Pictures as `sprue.inference.images.open_image` returns them, a sample's in the order of `views`.
            engine: An engine for this detector's feature spec; detectors with equal fingerprints can share one.

        Raises:
            SprueError: If a sample has another number of pictures than there are views.
        """
        inputs = []
        for number, sample in enumerate(samples):
            pictures = [sample] if isinstance(sample, Image.Image) else sample
            if len(pictures) != len(self.views):
                raise SprueError(
                    f"class {self.class_name}: sample {number} has {len(pictures)} pictures; its detector reads "
                    f"{len(self.views)} {', '.join(self.views)}".rstrip()
                )
            inputs += [model_input(picture, self.spec.input_size) for picture in pictures]
        return self.predict_inputs(np.stack(inputs), engine)

    def predict_inputs(self, inputs_NSS3: NDArray[np.uint8], engine: Engine) -> Predictions:
        """Scores samples whose pictures are already resized to the backbone's input."""
        step = max(1, BATCH // len(self.views)) * len(self.views)
        return Predictions.concatenate(
            [
                self.predict_pictures(engine(inputs_NSS3[start : start + step]))
                for start in range(0, len(inputs_NSS3), step)
            ]
        )

    def predict_pictures(self, maps: Sequence[NDArray[np.float16]]) -> Predictions:
        """Scores samples by their pictures' backbone maps [N, C, H, W], as an engine returns them."""
        views = len(self.views)
        return self.predict_features([map_NCHW[view::views] for view in range(views) for map_NCHW in maps])

    def predict_features(self, maps: Sequence[NDArray[np.float16]]) -> Predictions:
        """Scores samples by their views' backbone maps [B, C, H, W]: those of the first view, of the second ..."""
        score_B, picture_score_BV, evidence_BVHW = score_features(self.flow, self.scoring, maps)
        p_value_B = self.calibration.p_values(score_B)
        is_anomalous_B = p_value_B <= self.calibration.alpha
        return Predictions(score_B, p_value_B, is_anomalous_B, picture_score_BV, evidence_BVHW)

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
            "views": list(self.views),
        }
        (folder / "detector.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        safetensors.torch.save_file(portable_state(self.flow), folder / "flow.safetensors")
        # Who only fits or scores flows is spared timm, which takes seconds to import.
        from sprue.inference.backbone import load_backbone

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
        if facts.get("format") not in READ:
            known = ", ".join(map(str, READ))
            raise SprueError(f"{folder} has format {facts.get('format')}, this version of sprue reads {known}")
        name = facts["flow"]["name"]
        flow = build_flow(name, **AS_BEFORE.get(name, {}) | facts["flow"]["config"])
        flow.load_state_dict(state)
        calibration = facts["calibration"]
        return cls(
            facts["class_name"],
            replace(FeatureSpec.from_mapping(facts["spec"]), weights=f"file:{folder / 'backbone.safetensors'}"),
            name,
            flow,
            Scoring(**facts["scoring"]),
            Calibration(**calibration | {"scores": tuple(calibration["scores"])}),
            tuple(facts["views"]),
        )

    def build_engine(self, name: EngineName = "auto", threads: int | None = None) -> Engine:
        """An engine for this detector; see `sprue.inference.engines.build_engine`."""
        return build_engine(self.spec, name, threads)


def anomaly_map(evidence_HW: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """The evidence of a picture's pixels, [h, w], for its size (rows, columns); bilinear."""
    evidence = torch.from_numpy(evidence_HW)[None, None]
    return torch.nn.functional.interpolate(evidence, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_views(class_name: str, flow_name: str, flow: Flow, views: int) -> None:
    """Makes sure that a flow reads samples of a number of views.

    Raises:
        SprueError: If it does not; the message names the class.
    """
    if flow.views == views:
        return
    advice = f"set flow.views to {views}" if flow_name == "multiflow" else "choose the flow multiflow"
    if views == 1:
        advice = "choose a flow of single pictures, such as patchflow"
    raise SprueError(
        f"class {class_name}: its samples have {views} pictures each, and {flow_name} reads {flow.views}; {advice}"
    )


def score_features(
    flow: Flow, scoring: Scoring, maps: Sequence[NDArray[np.float16]]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Assesses samples by their views' backbone maps [B, C, H, W], see `Detector.predict_features`.

    The flow is set to evaluation: in training it would add noise, and read a part of the positions.

    Returns:
        Scores [B] of the samples, scores [B, V] and evidence [B, V, H, W] of their pictures.
    """
    flow.eval()
    use_full_precision()
    device = next(flow.buffers()).device
    parts = []
    for batch in _batches(maps):
        with torch.inference_mode():
            maps_on_device = [map_BCHW.to(device).float() for map_BCHW in batch]
            assessed = flow.assess_pictures(maps_on_device, scoring.evidence, scoring.top)
            parts.append([each.cpu().numpy() for each in assessed])
    score_B, picture_score_BV, evidence_BVHW = (np.concatenate(each) for each in zip(*parts, strict=True))
    return score_B, picture_score_BV, evidence_BVHW


def portable_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers as safetensors takes them: on the CPU, contiguous, none shared."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}


def _batches(maps: Sequence[NDArray[np.float16]]) -> Iterator[list[Tensor]]:
    # No samples are one empty batch, which has the right shapes; maps that the flow does not read may be empty.
    for start in range(0, max(1, *map(len, maps)), FLOW_BATCH):
        yield [torch.from_numpy(map_BCHW[start : start + FLOW_BATCH]) for map_BCHW in maps]
