"""Decides which requests are scored: reads bodies under a deadline, and bounds their memory and the queue behind them.

A replica accepts far more connections than it can score. A request passes four gates, each of which refuses within
milliseconds: there is room, and the deadline can be met; the body arrives in time; its bytes fit into the memory of all
bodies; there is still a place in the queue. Nothing waits for a gate.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

from starlette.requests import ClientDisconnect

from sprue.inference.detector import BATCH
from sprue.serving.errors import BUSY, ApiError
from sprue.serving.turns import Turns

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
LENGTHEN, SHORTEN = 0.1, 0.9
"""Places that an answer adds to the queue, and the factor for a client that leaves: where one in 20 or so leaves, the
queue is as long as they bear."""


@dataclass(frozen=True)
class AdmissionLimits:
    """What a replica takes on.

    Attributes:
        max_queued: Requests whose body is read and that are not answered yet; a batch, and the one behind it.
        max_reading: Requests whose body is being read.
        max_body_bytes: Memory of the bodies of both.
        grace_s: Seconds for a body's first byte; each `min_rate` bytes that have arrived give it one more.
        min_rate: Bytes a second.
        default_timeout_s: Seconds that a request may take, its body included, if it does not say.
        max_timeout_s: The most that it may ask for.
    """

    max_queued: int = 2 * BATCH
    max_reading: int = 1000
    max_body_bytes: int = 512 * 2**20
    grace_s: float = 5.0
    min_rate: int = 64 * 2**10
    default_timeout_s: float = 10.0
    max_timeout_s: float = 60.0


class Admission:
    """Counts the requests of a replica and what they hold; used on one event loop."""

    def __init__(self, limits: AdmissionLimits, seconds_per_sample: Callable[[], float]) -> None:
        """Starts empty; the pace of scoring is asked for at each request."""
        self.limits = limits
        self.reading = self.queued = self.body_bytes = 0
        self.places = float(limits.max_queued)
        """Length of the queue at present: where clients leave before they are answered, it is too long for them."""
        self._seconds_per_sample = seconds_per_sample
        self._turns = Turns()

    @asynccontextmanager
    async def admit(self, headers: Mapping[str, str], scored: bool = True) -> AsyncIterator["Admitted"]:
        """Admits a request to having its body read, and ends it at its deadline.

        One that is not to be scored needs no place in the queue.

        Raises:
            ApiError: 422 for a malformed timeout, 503 if there is no room or the deadline can't be met, 408 if it
                passes while the body is read, 504 if it passes later.
        """
        timeout_s = self._timeout(headers)
        if scored:
            self._require_turn(timeout_s)
        if self.reading >= self.limits.max_reading:
            raise self.refusal(BUSY, f"the bodies of {self.reading} requests are being read")
        admitted = Admitted(self)
        self.reading += 1
        try:
            async with asyncio.timeout(timeout_s):
                yield admitted
                if admitted.queued:
                    self.places = min(float(self.limits.max_queued), self.places + LENGTHEN)
        except TimeoutError as error:
            self._shorten(admitted)
            raise admitted.too_late(timeout_s) from error
        except asyncio.CancelledError:  # the client has gone
            self._shorten(admitted)
            raise
        finally:
            admitted.release()

    def _shorten(self, admitted: "Admitted") -> None:
        if admitted.queued:
            self.places = max(self.limits.max_queued / 4, self.places * SHORTEN)

    def _timeout(self, headers: Mapping[str, str]) -> float:
        given, largest = headers.get(TIMEOUT_HEADER), round(1000 * self.limits.max_timeout_s)
        if given is None:
            return self.limits.default_timeout_s
        if not (given.isascii() and given.isdecimal() and 1 <= int(given[:9]) <= largest and len(given) < 9):
            message = f"{TIMEOUT_HEADER} is not a whole number of milliseconds from 1 to {largest}"
            raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_timeout", message)
        return int(given) / 1000

    def _require_turn(self, timeout_s: float) -> None:
        self.require_place()
        wait_s = self.queued * self._seconds_per_sample()
        if wait_s > timeout_s:
            raise self.refusal(
                "deadline_too_short", f"a score takes about {wait_s:.1f} s now, and the request allows {timeout_s:g} s"
            )

    def require_place(self) -> None:
        """Checks that the queue has a place; raises ApiError 503 if not."""
        if self.queued >= self.places:
            raise self.refusal(BUSY, f"{self.queued} requests are waiting to be scored")

    def refusal(self, code: str, reason: str) -> ApiError:
        """A refusal whose Retry-After is the client's turn behind those queued and those refused before it."""
        now = asyncio.get_running_loop().time()
        retry_s = self._turns.retry_s(now, self.queued, self._seconds_per_sample())
        message = f"{reason}; try again in {retry_s} s"
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, code, message, {"Retry-After": str(retry_s)})


class Admitted:
    """An admitted request: its body is read first, then it has a place in the queue until it is answered.

    Attributes:
        sent: Whether its body is being read or was; before that, it waits for its class to be loaded.
        queued: Whether it has the place.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._bytes, self.sent, self.queued = 0, False, False

    async def read(self, stream: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """A body's parts, as long as they arrive in time and there is memory for them.

        Raises:
            ApiError: 408 if they are too slow, 503 if the bodies of all requests are too large together, 400 if the
                client leaves.
        """
        limits, loop = self._admission.limits, asyncio.get_running_loop()
        started, self.sent = loop.time(), True
        while True:
            try:
                async with asyncio.timeout_at(started + limits.grace_s + self._bytes / limits.min_rate):
                    part = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise _slow_body(f"{self._bytes:,} bytes in {loop.time() - started:.1f} s") from error
            except ClientDisconnect as error:  # nobody reads this, but it is no failure of the service
                raise ApiError(HTTPStatus.BAD_REQUEST, "client_gone", "the client left while it sent") from error
            self._bytes += len(part)
            self._admission.body_bytes += len(part)
            if self._admission.body_bytes > limits.max_body_bytes:
                raise self._admission.refusal(BUSY, "the bodies of other requests fill the memory for them")
            yield part

    def enqueue(self) -> None:
        """Takes a place in the queue, once the body is read.

        Raises:
            ApiError: 503 if there is none.
        """
        self._admission.require_place()
        self.queued = True
        self._admission.reading -= 1
        self._admission.queued += 1

    def too_late(self, timeout_s: float) -> ApiError:
        """The error of a request whose deadline has passed."""
        if self.sent and not self.queued:
            return _slow_body(f"{self._bytes:,} bytes in the {timeout_s:g} s that the request allows")
        late = "sample was not scored" if self.queued else "class was not loaded"
        message = f"the {late} within {timeout_s:g} s; {TIMEOUT_HEADER} may allow more"
        return ApiError(HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded", message)

    def release(self) -> None:
        """Gives back what the request holds."""
        self._admission.body_bytes -= self._bytes
        if self.queued:
            self._admission.queued -= 1
        else:
            self._admission.reading -= 1


def _slow_body(arrived: str) -> ApiError:
    """Also closes the connection, on which the rest of the body could otherwise be mistaken for a request."""
    message = f"the body arrives too slowly: {arrived}"
    return ApiError(HTTPStatus.REQUEST_TIMEOUT, "slow_body", message, {"Connection": "close"})
