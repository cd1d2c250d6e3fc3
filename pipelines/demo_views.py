"""Samples of several views: Multi-Flow on the embedded dataset of three cameras, from pictures to registered models."""

import logging
import sys
from pathlib import Path

from run import run

from sprue.data.views import write_views
from sprue.errors import SprueError

VIEWS = Path("data/views")

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if not VIEWS.exists():
            write_views(VIEWS)
        run(VIEWS, "views", recipe="multiflow-cpu", layout="mvtec-views")
    except SprueError as error:
        sys.exit(f"sprue demo: {error}")
