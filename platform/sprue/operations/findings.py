"""What `sprue doctor` finds, and how its probes are run."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["OK", "WARN", "FAIL"]
"""Fine; to be looked at; in the way of work."""

DEADLINE_S = 2.5
"""How long the probes may take; they run at the same time."""


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's page.

    Attributes:
        level: How bad it is.
        subject: What was looked at.
        words: What was found and, where it is not fine, what to do.
    """

    level: Level
    subject: str
    words: str

    def __str__(self) -> str:
        """The line."""
        return f"{self.level:<5} {self.subject:<10} {self.words}"


@dataclass(frozen=True)
class Probe:
    """Looks at something.

    Attributes:
        subject: At what.
        look: Returns the findings; what it raises is one, too.
        late: How bad it is if it takes longer than the deadline.
    """

    subject: str
    look: Callable[[], Sequence[Finding]]
    late: Level = "FAIL"


def run_probes(probes: Sequence[Probe], deadline_s: float = DEADLINE_S) -> list[Finding]:
    """Runs probes at the same time; their findings in the probes' order.

    A probe that has not ended by then is left behind: its thread ends with the process.
    """
    found: dict[int, Sequence[Finding]] = {}

    def run(number: int, probe: Probe) -> None:
        try:
            found[number] = probe.look()
        except Exception as error:  # a probe that breaks is a finding, and must not hide the others
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            found[number] = [Finding("FAIL", probe.subject, reason)]

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(probes)]
    for thread in threads:
        thread.start()
    ended = threading.Event()
    timer = threading.Timer(deadline_s, ended.set)
    timer.daemon = True
    timer.start()
    for thread in threads:
        while thread.is_alive() and not ended.is_set():
            thread.join(0.02)
    timer.cancel()
    late = {
        number: [Finding(probe.late, probe.subject, f"no answer within {deadline_s:g} s")]
        for number, probe in enumerate(probes)
    }
    return [finding for number in range(len(probes)) for finding in found.get(number, late[number])]
