"""Settings of `MemoryBank`."""

from dataclasses import dataclass

from defectflow.config.base import Adaptation, FlowConfig, check_odd


@dataclass(frozen=True)
class MemoryBankConfig(FlowConfig):
    """Settings of `MemoryBank`.

    Attributes:
        neighbourhood: Side of the square of positions whose features are averaged (paper: 3).
        adaptation: The linear map of the fused channels before distances are taken (paper: none).
        size: Feature vectors in the bank (paper: 1 to 25 % of all).
    """

    neighbourhood: int = 3
    adaptation: Adaptation = "none"
    size: int = 4000

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        check_odd("neighbourhood", [self.neighbourhood])
        self.check_least(size=1)
