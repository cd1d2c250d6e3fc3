"""The frozen backbone: from pictures to the feature maps of several blocks at several scales.

Shapes: B pictures, S side of the input, C channels, H rows, W columns of a map.
"""

import difflib
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import EfficientNet
from torch import Tensor, nn

from sprue.errors import SprueError
from sprue.inference import weights
from sprue.inference.spec import FeatureSpec


class Backbone(nn.Module):
    """A timm model that is tapped at a spec's blocks, once for each scale.

    Takes 8-bit pictures and normalises them itself, so that what travels between processes is small and every
    engine reads the same numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: FeatureSpec, model: nn.Module) -> None:
        """Wraps a model whose weights are loaded; sets it to evaluation and freezes it."""
        super().__init__()
        self.spec = spec
        self.model = model
        mean, std = (spec.mean, spec.std) if spec.mean and spec.std else _normalisation(model)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.taps: dict[str, Any] = {"indices": list(spec.blocks), "intermediates_only": True, "stop_early": True}
        if isinstance(model, EfficientNet):
            # Index 0 is the stem's output there, so block n has index n + 1.
            self.taps |= {"indices": [block + 1 for block in spec.blocks], "extra_blocks": True}
        self.eval().requires_grad_(False)

    def forward(self, images_BSS3: Tensor) -> list[Tensor]:
        """The maps [B, C, H, W] of 8-bit pictures: for each scale, largest first as configured, each block's."""
        x = (images_BSS3.permute(0, 3, 1, 2).float() / 255.0 - self.mean) / self.std
        maps: list[Tensor] = []
        for scale in self.spec.scales:
            factor = round(1 / scale)
            scaled = x if factor == 1 else F.avg_pool2d(x, factor)
            maps += self.model.forward_intermediates(scaled, **self.taps)  # type: ignore[operator]
        return maps


def _normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each colour, as the model's weights expect them."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    return tuple(cfg.get("mean", (0.5,) * 3)), tuple(cfg.get("std", (0.5,) * 3))


def _has_no_head(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether weights that go by this model's names lack its classifier, as those of a saved detector do."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    return not set(state).isdisjoint(model.state_dict()) and not any(key.startswith(prefixes) for key in state)


def _create(spec: FeatureSpec) -> nn.Module:
    if not timm.is_model(spec.backbone):
        near = difflib.get_close_matches(spec.backbone, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise SprueError(f"features.backbone: timm has no model {spec.backbone!r}{hint}")
    kwargs: dict[str, Any] = {"pretrained": False}
    name = spec.backbone
    if spec.weights.startswith("hub:"):
        tag = spec.weights.removeprefix("hub:")
        if not tag:
            raise SprueError("features.weights: hub: needs a weight tag, such as hub:in1k; the default ones may change")
        name, kwargs["pretrained"] = f"{name}.{tag}", True
    if timm.models.model_entrypoint(spec.backbone).__module__ == "timm.models.vision_transformer":
        kwargs |= {"img_size": spec.input_size, "dynamic_img_size": True}
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:
        if kwargs["pretrained"]:
            raise SprueError(f"features.weights: {spec.weights} of {spec.backbone} can't be had: {error}") from error
        raise


def load_backbone(spec: FeatureSpec) -> Backbone:
    """Builds the backbone, without its classifier, and loads its weights.

    Raises:
        SprueError: If the model, a block or the weights source is unknown, if the weights don't fit, or if they are
            not those whose digest the spec names.
    """
    model = _create(spec)
    if not spec.weights.startswith("hub:"):
        state = weights.read_weights(spec.weights)
        if _has_no_head(model, state):
            model.reset_classifier(0)  # type: ignore[operator]
        weights.fill(model, state, spec.weights, spec.backbone)
    model.reset_classifier(0)  # type: ignore[operator]
    found = weights.digest(model)
    if spec.weights_digest not in ("", found):
        raise SprueError(
            f"features.weights: {spec.weights} has digest {found[:16]}, the spec names {spec.weights_digest[:16]}; "
            "these are other weights than the features were made with"
        )
    backbone = Backbone(spec, model)
    try:
        with torch.inference_mode():
            backbone(torch.zeros(1, spec.input_size, spec.input_size, 3, dtype=torch.uint8))
    except (AssertionError, AttributeError, TypeError, IndexError, RuntimeError) as error:
        raise SprueError(
            f"features: {spec.backbone} can't be tapped at blocks {list(spec.blocks)} with scales {list(spec.scales)} "
            f"of {spec.input_size} pixels: {error}"
        ) from error
    return backbone


def resolve(spec: FeatureSpec) -> FeatureSpec:
    """The spec with the digest of its weights and the colours they expect, from which on it has a fingerprint.

    Raises:
        SprueError: As `load_backbone`.
    """
    model = load_backbone(spec).model
    mean, std = (spec.mean, spec.std) if spec.mean and spec.std else _normalisation(model)
    return replace(spec, weights_digest=weights.digest(model), mean=mean, std=std)
