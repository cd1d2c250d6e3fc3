"""The service refuses to start where it can't run, and stops without a trace."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.config import HTTPOptions

from sprue.errors import SprueError
from sprue.serving.keys import add_key
from sprue.serving.launch import ServeSettings, require_free_port, serve_champions, stop_serving


def test_a_busy_port_is_refused_before_anything_starts(cluster: Any, unused_port: int) -> None:
    port = unused_port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(SprueError, match=f"port {port} of 127.0.0.1 is busy"):
            serve_champions(ServeSettings(port=port))
    assert serve.status().proxies == {}
    require_free_port("127.0.0.1", port)
    with pytest.raises(SprueError, match=r"can't listen on 192\.0\.2\.1"):  # an address of no machine
        require_free_port("192.0.2.1", port)
    for none in (0, 70_000):
        with pytest.raises(SprueError, match=f"port {none} is not between 1 and 65535"):
            require_free_port("127.0.0.1", none)


def test_others_are_served_with_keys_or_on_purpose(cluster: Any, tmp_path: Path, unused_port: int) -> None:
    keys = tmp_path / "keys.json"
    with pytest.raises(SprueError, match=r"everybody who reaches 0\.0\.0\.0 could score"):
        serve_champions(ServeSettings("0.0.0.0", unused_port))
    with pytest.raises(SprueError, match="the keys can't be read"):
        serve_champions(ServeSettings("0.0.0.0", unused_port, keys=keys))
    add_key(keys, "line", ["score"])
    for granted in ({"keys": keys}, {"without_keys": True}):
        with pytest.raises(SprueError, match="run the pipeline first"):  # the next check
            serve_champions(ServeSettings("0.0.0.0", unused_port, **granted))


def test_an_empty_registry_says_to_run_the_pipeline(cluster: Any, unused_port: int) -> None:
    with pytest.raises(SprueError, match="run the pipeline first"):
        serve_champions(ServeSettings(port=unused_port))


def test_stopping_is_silent_and_can_be_repeated(cluster: Any, unused_port: int, capfd: Any) -> None:
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=unused_port))
    assert serve.status().proxies
    stop_serving()
    stop_serving()
    assert serve.status().proxies == {}
    time.sleep(1)  # Ray prints its messages from a thread
    printed = "".join(capfd.readouterr())
    # The proxy may die a moment after the controller, and then reports its own call, `listen_for_change`.
    assert "ServeController.graceful_shutdown" not in printed
    assert "ServeController.check_alive" not in printed
