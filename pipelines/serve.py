"""Keeps the scoring service up on the registered champions until it is interrupted."""

import argparse
import logging
import signal
import sys

from sprue.errors import SprueError
from sprue.pipeline import connect_ray
from sprue.serving.run import require_free_port, serve_champions, stop_serving
from sprue.store import location
from sprue.tracking.server import connect

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--store", default="store", help="folder of the store (default: %(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        require_free_port(arguments.host, arguments.port)
        connect(location(arguments.store))
        connect_ray()
        url = serve_champions(arguments.host, arguments.port)
        print(f"scoring at {url}  (its interface: {url}/docs; end it with Ctrl-C)", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        stop_serving()
    except SprueError as error:
        sys.exit(f"sprue serve: {error}")
