"""What can't be served is refused at once, bodies are read in time and in bounded memory, and all is released."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from selectors import DefaultSelector
from typing import Any, TypeVar

import pytest
from starlette.requests import ClientDisconnect

from sprue.serving.admission import Admission, AdmissionLimits, Admitted
from sprue.serving.errors import ApiError

Result = TypeVar("Result")
LIMITS = AdmissionLimits(max_queued=2, max_reading=3, max_body_bytes=100, grace_s=0.1, min_rate=1000)


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop that jumps to its next timer instead of waiting for it: a busy machine changes no result.

    Threads and sockets are not waited for.
    """

    class Selector(DefaultSelector):
        elapsed_s = 0.0

        def select(self, timeout: float | None = None) -> Any:
            if timeout is None:
                raise RuntimeError("nothing is left to wait for")
            self.elapsed_s += timeout
            return super().select(0)

    def __init__(self) -> None:
        self.selector = self.Selector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.elapsed_s


def simulate(main: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=SimulatedTime) as runner:
        return runner.run(main)


async def sends(parts: Sequence[bytes], pause_s: float = 0.0) -> AsyncGenerator[bytes]:
    """A body whose parts arrive with pauses before them."""
    for part in parts:
        await asyncio.sleep(pause_s)
        yield part


async def read(admitted: Admitted, parts: Sequence[bytes], pause_s: float = 0.0) -> bytes:
    return b"".join([part async for part in admitted.read(sends(parts, pause_s))])


def refusal(run: Callable[[], Coroutine[Any, Any, None]]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        simulate(run())
    return caught.value


def held(admission: Admission) -> tuple[int, int, int]:
    return admission.reading, admission.queued, admission.body_bytes


def test_a_request_holds_its_body_and_then_a_place_until_it_is_answered() -> None:
    async def run() -> None:
        admission = Admission(LIMITS, lambda: 0.0)
        async with admission.admit({}) as admitted:
            assert held(admission) == (1, 0, 0)
            assert await read(admitted, [b"part 1", b"part 2"]) == b"part 1part 2"
            assert held(admission) == (1, 0, 12)
            admitted.enqueue()
            assert held(admission) == (0, 1, 12)
        assert held(admission) == (0, 0, 0)

    simulate(run())


@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_has_gone_leaves_nothing_behind(queued: bool) -> None:
    async def request(admission: Admission) -> None:
        async with admission.admit({}) as admitted:
            await read(admitted, [b"body"])
            if queued:
                admitted.enqueue()
            await asyncio.sleep(10)

    async def run() -> None:
        admission = Admission(LIMITS, lambda: 0.0)
        task = asyncio.create_task(request(admission))
        await asyncio.sleep(0.01)
        assert held(admission) == (int(not queued), int(queued), 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held(admission) == (0, 0, 0)

    simulate(run())


@pytest.mark.parametrize(
    ("parts", "pause_s", "arrived"),
    [([b"late"], 10.0, "0 bytes"), ([b"x" * 10] * 50, 0.05, r"\d0 bytes")],  # silent; 200 bytes a second, not 1000
)
def test_a_body_that_is_too_slow_is_a_408_and_closes_the_connection(
    parts: list[bytes], pause_s: float, arrived: str
) -> None:
    async def run() -> None:
        async with Admission(LIMITS, lambda: 0.0).admit({}) as admitted:
            await read(admitted, parts, pause_s)

    error = refusal(run)
    assert (error.status, error.code, error.headers) == (408, "slow_body", {"Connection": "close"})
    with pytest.raises(ApiError, match=f"too slowly: {arrived} in 0"):
        raise error


def test_a_client_that_leaves_while_it_sends_is_no_failure_of_the_service() -> None:
    admission = Admission(LIMITS, lambda: 0.0)

    async def breaks_off() -> AsyncGenerator[bytes]:
        yield b"part"
        raise ClientDisconnect

    async def run() -> None:
        async with admission.admit({}) as admitted:
            async for _ in admitted.read(breaks_off()):
                pass

    assert refusal(run).code == "client_gone"
    assert held(admission) == (0, 0, 0)
    assert admission.places == LIMITS.max_queued


def test_a_body_at_the_minimum_rate_may_take_longer_than_the_grace() -> None:
    async def run() -> float:
        started = asyncio.get_running_loop().time()
        async with Admission(replace(LIMITS, min_rate=100), lambda: 0.0).admit({}) as admitted:
            assert len(await read(admitted, [b"x" * 10] * 10, 0.03)) == 100
        return asyncio.get_running_loop().time() - started

    assert simulate(run()) > LIMITS.grace_s


def test_the_bodies_of_all_requests_are_bounded_together() -> None:
    admission = Admission(LIMITS, lambda: 0.0)

    async def run() -> None:
        async with admission.admit({}) as first, admission.admit({}) as second:
            await read(first, [b"x" * 60])
            await read(second, [b"x" * 30, b"x" * 30])

    error = refusal(run)
    assert (error.status, error.code) == (503, "overloaded")
    assert held(admission) == (0, 0, 0)


@pytest.mark.parametrize("queued", [False, True])
def test_a_full_replica_refuses_with_retry_after(queued: bool) -> None:
    admission = Admission(LIMITS, lambda: 0.6)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(LIMITS.max_queued if queued else LIMITS.max_reading):
                admitted = await stack.enter_async_context(admission.admit({}))
                if queued:
                    admitted.enqueue()
            await stack.enter_async_context(admission.admit({}))

    error = refusal(run)
    # Two are queued and take 1.2 s; the client's own turn is the next.
    assert (error.status, error.code, error.headers) == (503, "overloaded", {"Retry-After": "2" if queued else "1"})
    assert held(admission) == (0, 0, 0)


def test_what_is_not_scored_needs_no_place_but_has_a_deadline() -> None:
    admission = Admission(replace(LIMITS, max_queued=1), lambda: 60.0)

    async def run() -> None:
        async with admission.admit({}) as first:
            first.enqueue()
            async with admission.admit({}, scored=False) as review:
                assert await read(review, [b"review"]) == b"review"
            async with admission.admit({"X-Request-Timeout-Ms": "50"}, scored=False) as review:
                await read(review, [b"x"] * 10, 0.02)

    assert refusal(run).code == "slow_body"
    assert held(admission) == (0, 0, 0)


def test_a_place_that_was_taken_while_the_body_was_read_is_refused() -> None:
    admission = Admission(LIMITS, lambda: 0.0)

    async def run() -> None:
        async with admission.admit({}) as first, admission.admit({}) as second, admission.admit({}) as third:
            for each in (first, second, third):
                each.enqueue()

    assert refusal(run).code == "overloaded"
    assert held(admission) == (0, 0, 0)


def test_refused_clients_are_told_to_come_back_one_after_the_other() -> None:
    async def run() -> list[int]:
        admission = Admission(replace(LIMITS, max_queued=0), lambda: 2.0)
        retry_after_s = []
        for _ in range(20):
            with pytest.raises(ApiError) as caught:
                async with admission.admit({}):
                    pass
            assert caught.value.headers is not None
            retry_after_s.append(int(caught.value.headers["Retry-After"]))
        return retry_after_s

    retry_after_s = simulate(run())
    assert retry_after_s[:3] == [2, 4, 6]
    assert retry_after_s[-1] == 15  # and not later


def test_the_queue_is_as_long_as_clients_bear() -> None:
    """Whoever leaves it, or whose deadline passes in it, shortens it; answers lengthen it again."""
    admission = Admission(replace(LIMITS, max_queued=20), lambda: 0.0)

    async def request(headers: dict[str, str], queues: bool, seconds: float) -> None:
        async with admission.admit(headers) as admitted:
            if queues:
                admitted.enqueue()
            await asyncio.sleep(seconds)

    async def leave(queues: bool) -> None:
        task = asyncio.create_task(request({}, queues, 10))
        await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run() -> None:
        await leave(queues=False)
        assert admission.places == 20  # it never saw the queue
        await leave(queues=True)
        assert admission.places == pytest.approx(18)
        with pytest.raises(ApiError, match="was not scored"):
            await request({"X-Request-Timeout-Ms": "5"}, True, 10)
        assert admission.places == pytest.approx(16.2)
        for _ in range(30):
            await leave(queues=True)
        assert admission.places == 5
        for _ in range(200):
            await request({}, True, 0)
        assert admission.places == 20

    simulate(run())


def test_a_deadline_that_can_not_be_met_is_refused_before_the_body_is_read() -> None:
    admission = Admission(LIMITS, lambda: 0.5)

    async def run() -> None:
        async with admission.admit({}) as first:
            first.enqueue()
            async with admission.admit({"X-Request-Timeout-Ms": "600"}):
                pass
            async with admission.admit({"X-Request-Timeout-Ms": "400"}):
                pass

    error = refusal(run)
    assert (error.status, error.code) == (503, "deadline_too_short")
    assert error.headers is not None and error.headers["Retry-After"] == "1"
    assert "about 0.5 s now, and the request allows 0.4 s" in error.message


@pytest.mark.parametrize(
    ("stage", "status", "code", "words"),
    [
        ("loading", 504, "deadline_exceeded", "the class was not loaded within 0.02 s"),
        ("reading", 408, "slow_body", "0 bytes in the 0.02 s"),
        ("queued", 504, "deadline_exceeded", "the sample was not scored within 0.02 s"),
    ],
)
def test_a_request_ends_at_its_deadline(stage: str, status: int, code: str, words: str) -> None:
    async def silence() -> AsyncGenerator[bytes]:
        await asyncio.sleep(10)
        yield b""

    admission = Admission(LIMITS, lambda: 0.0)

    async def run() -> None:
        async with admission.admit({"X-Request-Timeout-Ms": "20"}) as admitted:
            if stage == "reading":
                await anext(admitted.read(silence()))
            if stage == "queued":
                admitted.enqueue()
            await asyncio.sleep(10)

    error = refusal(run)
    assert (error.status, error.code) == (status, code)
    assert words in error.message
    assert held(admission) == (0, 0, 0)


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "soon", "60001", "9" * 30, "٣"])
def test_a_malformed_timeout_is_a_422(value: str) -> None:
    async def run() -> None:
        async with Admission(LIMITS, lambda: 0.0).admit({"X-Request-Timeout-Ms": value}):
            pass

    error = refusal(run)
    assert (error.status, error.code) == (422, "invalid_timeout")
    assert "from 1 to 60000" in error.message
