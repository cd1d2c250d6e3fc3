"""The frozen backbone: from images to the feature maps of several blocks at several scales.

Shapes: B images, S side of the input, C channels, H rows, W columns of a map.
"""

import difflib
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models import EfficientNet
from torch import Tensor, nn

from sprue.config import FeatureSettings
from sprue.errors import SprueError
from sprue.inference import weights
from sprue.inference.spec import FeatureSpec


class Backbone(nn.Module):
    """A timm model that is tapped at a spec's blocks, once for each scale.

    Takes 8-bit images and normalises them itself, so that little data travels between processes and every engine
    reads the same values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: FeatureSpec, model: nn.Module) -> None:
        """Wraps a model whose weights are loaded; sets it to evaluation and freezes it."""
        super().__init__()
        self.spec = spec
        self.model = model
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1))
        self.taps: dict[str, Any] = {"indices": list(spec.blocks), "intermediates_only": True, "stop_early": True}
        if isinstance(model, EfficientNet):
            # Index 0 is the stem's output there, so block n has index n + 1.
            self.taps |= {"indices": [block + 1 for block in spec.blocks], "extra_blocks": True}
        self.eval().requires_grad_(False)

    def forward(self, images_BSS3: Tensor) -> list[Tensor]:
        """Maps [B, C, H, W] of 8-bit images [B, S, S, 3]: scale by scale in the spec's order, each block's."""
        x = (images_BSS3.permute(0, 3, 1, 2).float() / 255.0 - self.mean) / self.std
        maps: list[Tensor] = []
        for scale in self.spec.scales:
            factor = round(1 / scale)
            scaled = x if factor == 1 else F.avg_pool2d(x, factor)
            maps += self.model.forward_intermediates(scaled, **self.taps)  # type: ignore[operator]
        return [self._pooled(map_BCHW) for map_BCHW in maps]

    def _pooled(self, map_BCHW: Tensor) -> Tensor:
        """A map of at most the spec's grid."""
        grid = self.spec.grid
        if grid is None or max(map_BCHW.shape[2:]) <= grid:
            return map_BCHW
        factor = -(-max(map_BCHW.shape[2:]) // grid)
        return F.avg_pool2d(map_BCHW, factor, ceil_mode=True, count_include_pad=False)


def resolve(settings: FeatureSettings) -> FeatureSpec:
    """Reads the backbone and adds to its settings the digest of its weights and the colours that they expect.

    Raises:
        SprueError: If the model, a block or the weights source is unknown, or if the weights don't fit.
    """
    model = _load_model(settings)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    spec = FeatureSpec(
        **settings.model_dump(),
        weights_digest=weights.digest(model),
        mean=tuple(cfg.get("mean", (0.5,) * 3)),
        std=tuple(cfg.get("std", (0.5,) * 3)),
    )
    _tapped(spec, model)
    return spec


def load_backbone(spec: FeatureSpec) -> Backbone:
    """Builds the backbone, without its classifier, and loads its weights.

    Raises:
        SprueError: As `resolve`, and if the weights are not those whose digest the spec has.
    """
    model = _load_model(spec)
    found = weights.digest(model)
    if found != spec.weights_digest:
        raise SprueError(
            f"features.weights: {spec.weights} has digest {found[:16]}, the spec has {spec.weights_digest[:16]}; "
            "the features were made with other weights"
        )
    return _tapped(spec, model)


def backbone_state(spec: FeatureSpec) -> bytes:
    """The backbone's weights, without its classifier, as a safetensors file.

    Raises:
        SprueError: As `load_backbone`.
    """
    return safetensors.torch.save(weights.portable_state(load_backbone(spec).model))


def _load_model(settings: FeatureSettings) -> nn.Module:
    """The timm model with its weights and without its classifier."""
    model = _create_model(settings)
    if not settings.weights.startswith("hub:"):
        state = weights.read_weights(settings.weights)
        if _lacks_classifier(state, model):
            model.reset_classifier(0)  # type: ignore[operator]
        weights.fill(model, state, settings.weights, settings.backbone)
    model.reset_classifier(0)  # type: ignore[operator]
    return model


def _create_model(settings: FeatureSettings) -> nn.Module:
    if not timm.is_model(settings.backbone):
        near = difflib.get_close_matches(settings.backbone, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise SprueError(f"features.backbone: timm has no model {settings.backbone!r}{hint}")
    kind, _, tag = settings.weights.partition(":")
    pretrained = kind == "hub"
    name = f"{settings.backbone}.{tag}" if pretrained else settings.backbone
    kwargs: dict[str, Any] = {}
    if timm.models.model_entrypoint(settings.backbone).__module__ == "timm.models.vision_transformer":
        kwargs = {"img_size": settings.input_size, "dynamic_img_size": True}
    try:
        return timm.create_model(name, pretrained, **kwargs)
    except Exception as error:
        if not pretrained:
            raise
        raise SprueError(f"features.weights: can't load {settings.weights} of {settings.backbone}: {error}") from error


def _lacks_classifier(state: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether weights under this model's names have none for its classifier, as those of a saved detector."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    return not set(state).isdisjoint(model.state_dict()) and not any(key.startswith(prefixes) for key in state)


def _tapped(spec: FeatureSpec, model: nn.Module) -> Backbone:
    """The backbone; runs it once, so that blocks, scales or sizes that it does not have are reported early."""
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
