"""Who runs this process."""

import getpass
import os
import socket


def whoami() -> str:
    """This process's user (a number where it has no name) and machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
