"""Settings of `Gaussian`."""

from dataclasses import dataclass

from defectflow.config.base import FlowConfig, check_odd


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
        check_odd("neighbourhood", [self.neighbourhood])
