"""Restarts SeaweedFS when its disk has room again: ``full_disk.py FOLDER``, which the supervisor tells of its log.

LevelDB, in which it keeps the names of objects, refuses every write after one that has found no room, for ever.
"""

import os
import shutil
import sys
from pathlib import Path

from supervisor import childutils

SERVICE, MARK = "seaweedfs", "no space left on device"
ROOM = 64 * 2**20
"""Free bytes with which it is worth to try."""


def main() -> None:
    """Takes the supervisor's events until it ends."""
    folder, was_full = Path(sys.argv[1]), False
    supervisor = childutils.getRPCInterface(os.environ).supervisor
    while True:
        headers, payload = childutils.listener.wait()
        if headers["eventname"].startswith("PROCESS_LOG"):
            was_full = was_full or MARK in payload
        elif was_full and shutil.disk_usage(folder).free > ROOM:
            print(f"{SERVICE} has met a full disk, and is restarted", file=sys.stderr, flush=True)
            supervisor.stopProcess(SERVICE)
            supervisor.startProcess(SERVICE)
            was_full = False
        childutils.listener.ok()


if __name__ == "__main__":
    main()
