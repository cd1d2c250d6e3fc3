"""When refused clients are to come back: one after the other, at the pace of scoring, rather than all at once."""

import math

MAX_RETRY_AFTER_S = 15.0
"""Clients that come back too early take turns that they don't use; more of them would let others wait in vain."""


class Turns:
    """Hands out the seconds of ``Retry-After``."""

    def __init__(self) -> None:
        self._next = 0.0

    def retry_s(self, now: float, ahead: int, pace_s: float) -> int:
        """Whole seconds until a client's turn, behind requests on their way and the clients refused before it.

        Args:
            now: The time in seconds.
            ahead: Requests on their way.
            pace_s: Seconds that each takes.

        >>> turns = Turns()
        >>> [turns.retry_s(100.0, ahead=4, pace_s=0.5) for _ in range(4)]
        [3, 3, 4, 4]
        """
        turn = max(now + ahead * pace_s, self._next) + pace_s
        self._next = min(turn, now + MAX_RETRY_AFTER_S)
        return max(1, math.ceil(self._next - now))
