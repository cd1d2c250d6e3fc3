"""Settings of `Fusion`."""

from dataclasses import dataclass

from defectflow.config.csflow import CSFlowConfig

FUSION_TOP = 0.01
"""Fraction of the positions whose scores make an image's: that at which the members' scores are standardised."""


@dataclass(frozen=True)
class FusionConfig(CSFlowConfig):
    """Settings of `Fusion`: those of its CS-Flow, and its Gaussians.

    Attributes:
        gaussians: The maps that each Gaussian reads. Different blocks and scales see defects of different kinds.
        scored: The Gaussians, counted from 0, that score images beside the CS-Flow; all if empty.
        located: The Gaussians, counted from 0, whose position scores make the anomaly map beside the CS-Flow's; all if
            empty. Fine maps show where, coarse ones blur it.
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
