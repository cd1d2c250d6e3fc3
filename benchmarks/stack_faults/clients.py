"""Clients that score through the proxy without a pause, and what became of each of their requests."""

import socket
import ssl
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import CLASSES, DATASET
from plant import Plant

ANSWER_S = 60.0
"""How long a client waits for an answer, which the service has to give within 30 s."""
PAUSE_S = 0.5


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        answered: Requests that got a score.
        refused: Those that got another status, by status: the client knows that it has to repeat it, and when.
        unsent: Those that were not accepted: no connection, or it broke before the body was sent.
        lost: Those that were accepted whole, and got no answer: how, and when.
    """

    answered: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    unsent: int = 0
    lost: list[str] = field(default_factory=list)


class Client(threading.Thread):
    """Scores one image after the other, each on a connection of its own, so that it sees where it breaks."""

    def __init__(self, plant: Plant, images: Path, number: int) -> None:
        super().__init__(daemon=True, name=f"client {number}")
        self.plant, self.tally, self.stopped = plant, Tally(), threading.Event()
        name = CLASSES[number % len(CLASSES)]
        self.path = f"/v1/classes/{DATASET}.{name}/score"
        self.body = (images / name / "test/spot/000.png").read_bytes()
        self.tls = ssl.create_default_context(cafile=plant.client["SPRUE_CA"])

    def run(self) -> None:
        """The loop."""
        while not self.stopped.is_set():
            self._score()
            time.sleep(PAUSE_S)

    def renew(self) -> Tally:
        """What it has seen since the last time; the count of answers goes on."""
        seen, self.tally = self.tally, Tally(self.tally.answered)
        return seen

    def _score(self) -> None:
        url, sent = urlsplit(self.plant.url), False
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {self.plant.client['SPRUE_KEY']}"
            f"\r\nContent-Type: image/png\r\nContent-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
        )
        try:
            with (
                socket.create_connection((url.hostname, url.port), timeout=ANSWER_S) as plain,
                self.tls.wrap_socket(plain, server_hostname=url.hostname) as connection,
            ):
                connection.sendall(head.encode() + self.body)
                sent = True
                answer = HTTPResponse(connection)
                answer.begin()
                answer.read()
        except OSError as error:
            self._broken(sent, error)
        except Exception as error:  # http.client's, when the answer is not one
            self._broken(sent, error)
        else:
            if answer.status == 200:
                self.tally.answered += 1
            else:
                self.tally.refused[answer.status] += 1

    def _broken(self, sent: bool, error: Exception) -> None:
        if sent:
            self.tally.lost.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}")
        else:
            self.tally.unsent += 1
