"""Starts a service of the stack: ``start.py FILE COMMAND...`` ends what its last life left, and becomes COMMAND.

A process that dies of SIGKILL leaves its children behind. They keep its ports, and the supervisor would start it again
and again in vain. They are still in its process group, whose number FILE keeps.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 20.0


def this_boot() -> str:
    """A name of the time since the machine was started, in which numbers of processes mean what they meant."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


def end_leftovers(file: Path) -> None:
    """Kills the process group of the service's last life, and waits until it is gone.

    As long as a group has a process, the number of its dead leader is given to no other process. So a leader that lives
    is a stranger's, and a group without one is what the service has left.
    """
    with suppress(FileNotFoundError, ValueError):
        boot, number = file.read_text().split()
        group, deadline = int(number), time.monotonic() + PATIENCE_S
        with suppress(ProcessLookupError):
            while boot == this_boot() and not _lives(group) and time.monotonic() < deadline:
                os.killpg(group, signal.SIGKILL)
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
    file, command = Path(sys.argv[1]), sys.argv[2:]
    end_leftovers(file)
    file.write_text(f"{this_boot()} {os.getpid()}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
