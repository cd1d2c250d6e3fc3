"""Starts a service of the stack: ``start.py FILE SIGNAL COMMAND...`` ends what its last life left, and becomes COMMAND.

A process that dies of SIGKILL leaves its children behind. They keep its ports, and the supervisor would start it again
and again in vain. They are still in its process group, whose number FILE keeps. SIGNAL lets them end their work.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE_S = 5.0
"""From the signal to SIGKILL."""
PATIENCE_S = 20.0
"""Until it is tried with them still there."""


def this_boot() -> str:
    """A name of the time since the machine was started, in which numbers of processes mean what they meant."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


def end_leftovers(file: Path, end: signal.Signals) -> None:
    """Ends the process group of the service's last life, and waits until it is gone.

    As long as a group has a process, the number of its dead leader is given to no other process. So a leader that lives
    is a stranger's, and a group without one is what the service has left.
    """
    with suppress(FileNotFoundError, ValueError):
        boot, number = file.read_text().split()
        group, began = int(number), time.monotonic()
        if boot != this_boot() or _lives(group):
            return
        with suppress(ProcessLookupError):
            os.killpg(group, end)
            while time.monotonic() < began + PATIENCE_S:
                os.killpg(group, 0 if time.monotonic() < began + GRACE_S else signal.SIGKILL)
                time.sleep(0.1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def main() -> None:
    """Reads the arguments, of which the command has the path of its program."""
    file, end, command = Path(sys.argv[1]), signal.Signals[f"SIG{sys.argv[2]}"], sys.argv[3:]
    end_leftovers(file, end)
    file.write_text(f"{this_boot()} {os.getpid()}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
