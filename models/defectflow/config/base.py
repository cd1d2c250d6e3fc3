"""What the settings of all flows share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

Shape = tuple[int, int, int]
"""Channels, rows and columns of a feature map."""

ScoreType = Literal["latent", "likelihood"]
"""What a position's anomaly score is: the squared norm of its latent vector, or its negative log-likelihood."""

NoiseScheme = Literal["simplenet", "softflow", "uniform"]
"""The noise level: constant and without conditioning; random per image; random per position and node."""

Adaptation = Literal["whiten", "standardise", "none"]
"""Decorrelate a node's channels to unit variance, scale each channel to unit variance, or change nothing."""


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
