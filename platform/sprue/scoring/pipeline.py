"""Scores samples on Ray Data: decodes them in tasks, scores them on each engine, and draws heat maps in tasks.

Shapes: N samples, V views, S side of the backbone's input, H rows, W columns of position scores.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import mlflow
import ray
import torch
from upath import UPath

from sprue.features.extraction import IO_CPUS, engine_placement, on_ray_data
from sprue.inference.detector import BATCH, Detector
from sprue.inference.priority import in_background, lower_priority
from sprue.scoring.decoding import Batch, Record, decode, from_column
from sprue.scoring.drawing import draw
from sprue.scoring.parts import Part
from sprue.scoring.rows import Figures
from sprue.tracking.backbones import registered_engine
from sprue.tracking.registry import RegisteredDetector, load_detector


def score_parts(
    registered: RegisteredDetector, detector: Detector, root: UPath, parts: Sequence[Part], heatmaps: UPath | None
) -> Iterator[tuple[Record, Figures]]:
    """Scores the samples of parts, in any order.

    A block of Ray Data is a batch of the engine, and a batch is of one part: so a sample's figures, to the last digit,
    do not depend on what else a run has to score.

    Args:
        registered: The version that scores.
        detector: Its detector.
        root: The folder of the images.
        parts: What is scored.
        heatmaps: The folder of the heat maps; none are drawn if None.

    Raises:
        SprueError: If the detector can't be loaded by an actor, or a heat map can't be written.
    """
    placement, views = engine_placement(), detector.views
    step = max(1, BATCH // len(views))
    batches = [
        {"batch": json.dumps([(part.name, each.name, each.paths) for each in part.samples[start : start + step]])}
        for part in parts
        for start in range(0, len(part.samples), step)
    ]
    with on_ray_data():
        dataset = (
            ray.data.from_items(batches, override_num_blocks=len(batches))
            .map_batches(
                in_background(decode),
                fn_args=(root, views, detector.spec.input_size),
                batch_size=None,
                num_cpus=IO_CPUS,
            )
            .map_batches(
                _ScoringWorker,
                fn_constructor_args=(registered, mlflow.get_tracking_uri(), placement.threads, heatmaps is not None),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=placement.workers),
                num_cpus=placement.num_cpus,
                num_gpus=placement.num_gpus,
            )
        )
        if heatmaps is not None:
            arguments = (root, heatmaps, views, detector.calibration)
            dataset = dataset.map_batches(in_background(draw), fn_args=arguments, batch_size=None, num_cpus=IO_CPUS)
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
            records = from_column(batch.pop("record"))
            for index, record in enumerate(records):
                yield record, {name: values[index] for name, values in batch.items()}


class _ScoringWorker:
    """Runs a registered detector in a Ray actor."""

    def __init__(self, registered: RegisteredDetector, tracking_uri: str, threads: int, positions: bool) -> None:
        mlflow.set_tracking_uri(tracking_uri)
        mlflow.set_registry_uri(tracking_uri)
        # Ray sets as many threads as the actor reserves CPUs; the flow may use the cores that the engine uses.
        torch.set_num_threads(threads)
        lower_priority()
        self.detector, self.positions = load_detector(registered), positions
        self.engine = registered_engine(self.detector, threads=threads)

    def __call__(self, batch: Batch) -> Batch:
        """Scores samples [N, V, S, S, 3], also black ones, whose figures are dropped."""
        images_NVSS3 = batch["images"]
        predictions = self.detector.predict_inputs(images_NVSS3.reshape(-1, *images_NVSS3.shape[2:]), self.engine)
        figures: dict[str, Any] = {
            "score": predictions.score_B,
            "p_value": predictions.p_value_B,
            "is_anomalous": predictions.is_anomalous_B,
            "image_score": predictions.image_score_BV,
        }
        if self.positions:
            figures["position_scores"] = predictions.position_scores_BVHW
        return {"record": batch["record"], **figures}
