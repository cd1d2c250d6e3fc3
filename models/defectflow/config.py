"""The settings of all flows. Imports no torch, so that settings are checked at once."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

Shape = tuple[int, int, int]
"""Channels, rows and columns of a feature map."""

ScoreType = Literal["latent", "likelihood"]
"""What a position's anomaly score is: the squared norm of its latent vector, or its negative log-likelihood."""

NoiseScheme = Literal["simplenet", "softflow", "uniform"]
"""The noise level: constant and without conditioning; random per image; random per position and node."""

Adaptation = Literal["whiten", "standardise", "none"]
"""Decorrelate a node's channels to unit variance, scale each channel to unit variance, or change nothing."""

Adaptor = Literal["whiten", "orthogonal", "trained"]
"""How the fused channels are reduced; see `PatchFlowConfig`."""

Localisation = Literal["finest", "all"]
"""The scales whose position scores make the anomaly map."""

Branch = Literal["local", "global"]

SampleScore = Literal["max", "mean"]
"""How the scores of a sample's images are combined."""

POSITIONS_PER_CHANNEL = 5
"""Training positions per channel below which an estimated covariance is too uncertain for whitening."""


def check_choice(field: str, value: str, choices: Any) -> None:
    """Raises a ValueError if a setting is not one of the choices of its `Literal` type.

    >>> check_choice("score_type", "loss", ScoreType)
    Traceback (most recent call last):
    ...
    ValueError: score_type: 'loss' is not one of 'latent', 'likelihood'
    """
    if value not in get_args(choices):
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


def check_odd(field: str, values: Iterable[int]) -> None:
    """Raises a ValueError if a side of a kernel or a neighbourhood is even or below 1."""
    for value in values:
        if value < 1 or value % 2 == 0:
            raise ValueError(f"{field}: {value} is not an odd number from 1")


def top_and_ring(views: int) -> tuple[tuple[int, ...], ...]:
    """The published graph: the top view, 0, is connected with all side views, each side view with its ring neighbours.

    >>> top_and_ring(5)
    ((1, 2, 3, 4), (0, 2, 4), (0, 1, 3), (0, 2, 4), (0, 1, 3))
    >>> top_and_ring(1), top_and_ring(3)
    (((),), ((1, 2), (0, 2), (0, 1)))
    """
    sides = views - 1
    graph = [tuple(range(1, views))]
    for side in range(sides):
        ring = {(side - 1) % sides, (side + 1) % sides} - {side}
        graph.append((0, *sorted(1 + other for other in ring)))
    return tuple(graph)


@dataclass(frozen=True)
class FlowConfig:
    """Settings that all detectors have.

    Attributes:
        channels: Channels of each backbone map, in the feature spec's order.
        maps: Indices of the maps that are read; all if empty.
    """

    channels: tuple[int, ...]
    maps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: If a setting is out of range; the message begins with the field and a colon.
        """
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is tuple:  # files hold lists
                object.__setattr__(self, name, tuple(getattr(self, name)))
            elif get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), hint)
        object.__setattr__(self, "maps", self.maps or tuple(range(len(self.channels))))
        self.check_maps("maps", self.maps)

    def check_maps(self, field: str, maps: Iterable[int]) -> None:
        """Raises a ValueError if there is no map of one of the indices."""
        if not set(maps) <= set(range(len(self.channels))):
            raise ValueError(f"{field}: {list(maps)} are not indices of the {len(self.channels)} feature maps")

    def check_least(self, **least: int) -> None:
        """Raises a ValueError if a setting is below its least value."""
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}: {getattr(self, name)} is below {minimum}")

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """The config for given feature shapes and a number of training images.

        See `config_for_features` for the arguments.

        Raises:
            ValueError: If a setting is out of range or the shapes do not suit the flow.
        """
        return cls(**{"channels": tuple(shape[0] for scale in scales for shape in scale), **settings})

    @property
    def read(self) -> tuple[int, ...]:
        """Indices of all maps that are needed, sorted."""
        return tuple(sorted(set(self.maps)))

    @property
    def fused(self) -> int:
        """Sum of the channels of `maps`."""
        return sum(self.channels[index] for index in self.maps)


@dataclass(frozen=True)
class CouplingConfig(FlowConfig):
    """Settings that all flows of couplings have.

    Attributes:
        steps: Number of coupling blocks.
        clamp: Bound of the log-scales.
        noise: Largest standard deviation of the noise on the adapted features in training.
        noise_scheme: Distribution of the noise level, and whether couplings are conditioned on it; see
            `defectflow.noise`.
    """

    steps: int = 1
    clamp: float = 1.9
    noise: float = 0.0
    noise_scheme: NoiseScheme = "simplenet"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        self.check_least(steps=1, noise=0)
        if self.clamp <= 0:
            raise ValueError(f"clamp: {self.clamp} is not above 0")

    @property
    def noise_channels(self) -> int:
        """Channels of the condition that carries the noise level: 0 without noise or without conditioning."""
        return 1 if self.noise > 0 and self.noise_scheme != "simplenet" else 0


@dataclass(frozen=True)
class GaussianConfig(FlowConfig):
    """Settings of `Gaussian`: the maps that make a position's feature vector.

    Attributes:
        neighbourhood: Side of the square of positions whose features are averaged, odd. Means over 3 x 3 positions make
            quieter anomaly maps; 1 sees smaller defects.
    """

    neighbourhood: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        if self.neighbourhood < 1 or self.neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood is {self.neighbourhood}: give an odd number")


@dataclass(frozen=True)
class PatchFlowConfig(CouplingConfig):
    """Settings of `PatchFlow`; the defaults are the published ones where the paper states them.

    Attributes:
        maps: Indices of the maps (paper: all, three scales of three blocks). Coarse maps add channels but few
            independent positions, so with some hundred images the whitening overfits them.
        adaptor: The projection of the fused channels. None of the three can shrink its output. ``whiten``: principal
            components with unit variance. ``orthogonal``: random orthogonal directions of the standardised channels.
            ``trained``: starts as ``whiten``; a rotation of all whitened features is trained with the flow.
        adapted: Channels after the adaptor (paper: 768), at most the fused ones. ``whiten`` drops the directions with
            the least variance, though defects often show there.
        bottleneck: Hidden channels of a subnetwork (paper: 128).
        steps: Number of coupling blocks (paper: 1).
        clamp: Bound of the log-scales (not stated; 1.9 as in the related CFlow-AD and Multi-Flow).
        neighbourhood: Side of the averaged neighbourhood (3; see `defectflow.pyramid`).
        stride: Stride of the positions read in training, from a random offset per step (paper: 1, all). Adjacent
            positions are nearly equal, so a step of stride 2 learns as much in a quarter of the time.
    """

    adaptor: Adaptor = "whiten"
    adapted: int = 768
    bottleneck: int = 128
    neighbourhood: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        object.__setattr__(self, "adapted", min(self.adapted, self.fused))
        if self.adapted < 2:
            raise ValueError(f"adapted: {self.adapted} is below 2 (of {self.fused} fused channels)")
        self.check_least(bottleneck=1, stride=1)
        check_odd("neighbourhood", [self.neighbourhood])

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """As `FlowConfig.for_features`; if `maps` are not given, they follow from the number of training images.

        Scales are added, the largest first, while the coarsest map has `POSITIONS_PER_CHANNEL` positions in all images
        for each fused channel. The first scale is always read.

        >>> scales = [[(40, 48, 48), (192, 12, 12)], [(40, 24, 24), (192, 6, 6)]]
        >>> PatchFlowConfig.for_features(scales, images=500).maps, PatchFlowConfig.for_features(scales, images=50).maps
        ((0, 1, 2, 3), (0, 1))
        """
        maps, fused = 0, 0
        for scale in scales:
            fused += sum(channels for channels, _, _ in scale)
            positions = images * min(rows * columns for _, rows, columns in scale)
            if maps and positions < POSITIONS_PER_CHANNEL * fused:
                break
            maps += len(scale)
        return super().for_features(scales, images, **{"maps": tuple(range(maps)), **settings})


@dataclass(frozen=True)
class CSFlowConfig(CouplingConfig):
    """Settings of `CSFlow`; the defaults are the published ones.

    Attributes:
        steps: Number of coupling blocks (paper: 4).
        hidden: Channels of a subnetwork's hidden maps (authors' code: 1024).
        clamp: Bound of the log-scales (authors' code: 3).
        kernels: Kernel sides of all blocks but the last, and of the last (paper: 3 and 5).
        adaptation: The linear map of each scale's channels before the couplings (paper: none).
        localise: Whether the anomaly map is the finest scale's position scores (paper) or the mean of all scales'.
    """

    steps: int = 4
    hidden: int = 1024
    clamp: float = 3.0
    kernels: tuple[int, int] = (3, 5)
    adaptation: Adaptation = "none"
    localise: Localisation = "finest"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        channels = [self.channels[index] for index in self.maps]
        if len(set(channels)) != 1:
            raise ValueError(f"maps: the maps share one number of channels; they have {channels}")
        self.check_least(hidden=1)
        check_odd("kernels", self.kernels)

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """As `FlowConfig.for_features`; if `maps` are not given, the deepest block's map of each scale is read.

        Raises:
            ValueError: If a setting is out of range or a scale is not half the one before.

        >>> CSFlowConfig.for_features([[(40, 8, 8), (192, 4, 4)], [(40, 4, 4), (192, 2, 2)]], images=9).maps
        (1, 3)
        """
        deepest = itertools.accumulate((len(scale) for scale in scales), initial=-1)
        maps = tuple(settings.pop("maps", ())) or tuple(deepest)[1:]
        config = super().for_features(scales, images, maps=maps, **settings)
        sizes = [shape[1:] for scale in scales for shape in scale]
        for finer, coarser in itertools.pairwise(config.maps):
            if sizes[finer] != (2 * sizes[coarser][0], 2 * sizes[coarser][1]):
                raise ValueError(
                    f"maps: CS-Flow's scales halve one another, but map {coarser} is {sizes[coarser]} after "
                    f"{sizes[finer]}; choose other scales or an input size that halves evenly"
                )
        return config


@dataclass(frozen=True)
class DNFADConfig(CouplingConfig):
    """Settings of `DNFAD`; the defaults are the published ones.

    Attributes:
        maps: Indices of the maps, resized to the finest and concatenated (paper: two blocks of a ViT).
        steps: Number of coupling blocks of each branch (paper: 6; authors' code: 4).
        hidden: Channels of a subnetwork's hidden map; 0 for as many as its output has.
        clamp: Bound of the log-scales (authors' code: 2).
        position_channels: Channels of the local branch's position code (authors' code: 64).
        branches: The branches (paper: both).
        rectified: Branches whose subnetworks end in a ReLU (authors' code: the local one). Then all log-scales and
            shifts of a half have one sign.
        adaptation: The linear map of the channels before the couplings (paper: none).
        relative: Whether a branch's log-probabilities are relative to each image's maximum (authors' code). Then an
            image that is anomalous everywhere to the same degree gets a low score.
        upsampling: Factor by which the map is upsampled before it is scored, bilinear with aligned corners (authors'
            code: 8, to the image's size). A position at the border, where a backbone sees padding, gets half the
            weight and one in a corner a quarter. 1 does not upsample.
    """

    steps: int = 6
    hidden: int = 0
    clamp: float = 2.0
    position_channels: int = 64
    branches: tuple[Branch, ...] = ("local", "global")
    rectified: tuple[Branch, ...] = ("local",)
    adaptation: Adaptation = "none"
    relative: bool = False
    upsampling: int = 8

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        for field in ("branches", "rectified"):
            for branch in getattr(self, field):
                check_choice(field, branch, Branch)
        if not self.branches:
            raise ValueError("branches: there is none; name 'local', 'global' or both")
        if self.position_channels < 0 or self.position_channels % 4:
            raise ValueError(f"position_channels: {self.position_channels} is not a multiple of 4 from 0")
        self.check_least(hidden=0, upsampling=1)

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """As `FlowConfig.for_features`; if `maps` are not given, the deepest block's map of the first scale is read.

        >>> DNFADConfig.for_features([[(40, 8, 8), (192, 4, 4)], [(40, 4, 4), (192, 2, 2)]], images=9).maps
        (1,)
        """
        maps = tuple(settings.pop("maps", ())) or (len(scales[0]) - 1,)
        return super().for_features(scales, images, maps=maps, **settings)


@dataclass(frozen=True)
class MultiFlowConfig(CouplingConfig):
    """Settings of `MultiFlow`; the defaults are the published ones.

    Attributes:
        maps: Index of the one map that is read of each view; the first if empty.
        views: Images of a sample.
        neighbours: For each view, the views that it gets messages from; the published graph if empty. A view without
            neighbours is scored independently.
        steps: Number of coupling blocks (paper: 6).
        hidden: Channels of a subnetwork's hidden maps (paper: 64).
        kernels: Kernel sides of all blocks but the last, and of the last (paper: 3 and 5).
        adaptation: The linear map of each view's channels before the couplings (paper: none).
        noise: Largest standard deviation (paper: a variance of 0.15; authors' code: a deviation of 0.15).
        sample_score: A sample's score is the maximum of its images' (paper) or their mean (authors' code).
    """

    views: int = 5
    neighbours: tuple[tuple[int, ...], ...] = ()
    steps: int = 6
    hidden: int = 64
    kernels: tuple[int, int] = (3, 5)
    adaptation: Adaptation = "none"
    noise: float = 0.15**0.5
    noise_scheme: NoiseScheme = "uniform"
    sample_score: SampleScore = "max"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        object.__setattr__(self, "maps", tuple(self.maps or (0,)))
        super().__post_init__()
        if len(self.maps) != 1:
            raise ValueError(f"maps: Multi-Flow reads one map of each view; got {list(self.maps)}")
        self.check_least(views=1, hidden=1)
        check_odd("kernels", self.kernels)
        graph = tuple(tuple(sources) for sources in self.neighbours) or top_and_ring(self.views)
        object.__setattr__(self, "neighbours", graph)
        for view, sources in enumerate(graph):
            if not set(sources) <= set(range(self.views)) - {view}:
                raise ValueError(f"neighbours: view {view} can't have {list(sources)} among {self.views} views")
        if len(graph) != self.views:
            raise ValueError(f"neighbours: {len(graph)} lists of neighbours for {self.views} views")

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """As `FlowConfig.for_features`; if `maps` are not given, the deepest block's map of the first scale is read.

        >>> MultiFlowConfig.for_features([[(40, 8, 8), (192, 4, 4)]], images=9, views=3).maps
        (1,)
        """
        maps = tuple(settings.pop("maps", ())) or (len(scales[0]) - 1,)
        return super().for_features(scales, images, maps=maps, **settings)


@dataclass(frozen=True)
class FusionConfig(CSFlowConfig):
    """Settings of `Fusion`: those of its CS-Flow, and its Gaussians.

    Attributes:
        gaussians: The maps that each Gaussian reads. Different blocks and scales see defects of different kinds.
        scored: The Gaussians, counted from 0, that score images beside the CS-Flow; all if empty.
        located: The Gaussians, counted from 0, whose position scores make the anomaly map; all if empty. Fine maps
            show where, coarse ones blur it.
        averaged: The Gaussians, counted from 0, that read means over 3 x 3 positions; see `GaussianConfig`.
    """

    gaussians: tuple[tuple[int, ...], ...] = ()
    scored: tuple[int, ...] = ()
    located: tuple[int, ...] = ()
    averaged: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        if not self.gaussians:
            raise ValueError("gaussians: there is none; name the maps of each")
        for maps in self.gaussians:
            self.check_maps("gaussians", maps)
        object.__setattr__(self, "gaussians", tuple(tuple(maps) for maps in self.gaussians))
        for field in ("scored", "located", "averaged"):
            if not set(getattr(self, field)) <= set(range(len(self.gaussians))):
                indices = list(getattr(self, field))
                raise ValueError(f"{field}: {indices} are not indices of the {len(self.gaussians)} Gaussians")

    @property
    def read(self) -> tuple[int, ...]:
        """Indices of all maps that are needed, sorted."""
        return tuple(sorted({*self.maps, *(index for maps in self.gaussians for index in maps)}))


CONFIGS: dict[str, type[FlowConfig]] = {
    "csflow": CSFlowConfig,
    "dnfad": DNFADConfig,
    "fusion": FusionConfig,
    "gaussian": GaussianConfig,
    "multiflow": MultiFlowConfig,
    "patchflow": PatchFlowConfig,
}
"""The configs by the flows' names."""


def config_class(name: str, settings: Mapping[str, Any]) -> type[FlowConfig]:
    """The config class of a flow, if it has all the settings.

    Raises:
        ValueError: If there is no flow of that name, or a setting is unknown.
    """
    if name not in CONFIGS:
        raise ValueError(f"name: there is no flow {name!r}; there are {', '.join(sorted(CONFIGS))}")
    known = [field.name for field in fields(CONFIGS[name])]
    for key in settings:
        if key not in known:
            raise ValueError(f"{key}: {name} has no such setting; it has {', '.join(known)}")
    return CONFIGS[name]


def config_for_features(
    name: str, scales: Sequence[Sequence[Shape]], images: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """A flow's complete config for given feature shapes and a number of training images.

    Args:
        name: A key of `CONFIGS`.
        scales: Shapes of the feature maps of each scale of the image, the largest scale first.
        images: Number of training images.
        settings: Fields set explicitly; the others have published values or follow from the features.

    Raises:
        ValueError: If there is no flow of that name, or a field is unknown or out of range.
    """
    return asdict(config_class(name, settings).for_features(scales, images, **settings))
