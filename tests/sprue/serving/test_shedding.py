"""What the proxy refuses by itself, and what it learns from the replicas."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sprue.serving import shedding
from sprue.serving.errors import error_response
from sprue.serving.shedding import Shedding

pytestmark = pytest.mark.anyio

PATH = "/v1/classes/brick/score"


class Replica:
    """Answers when it is told to; refuses what it has no place for."""

    def __init__(self, places: int) -> None:
        self.places, self.taken = places, 0
        self.asked: list[str] = []
        self.answers = asyncio.Semaphore(0)
        self.code = "overloaded"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        while (await receive()).get("more_body"):
            pass
        if self.taken >= self.places:
            await error_response(503, self.code, "words", {"Retry-After": "3"})(scope, receive, send)
            return
        self.taken += 1
        try:
            await self.answers.acquire()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
        finally:
            self.taken -= 1


class Clients:
    """Sends requests through the proxy, and keeps what came back."""

    def __init__(self, replica: Replica) -> None:
        self.now = 100.0
        self.proxy = Shedding(replica, lambda: self.now)
        self.replica = replica
        self.tasks: list[asyncio.Task[None]] = []

    def send(self, path: str = PATH, *, whole: bool = True, keep: Any = None) -> list[Any]:
        """Sends a request in two parts, of which the second may stay out; `keep` takes the response in its place."""
        parts = iter([b"im", b"age"] if whole else [b"im"])
        sent: list[Any] = []

        async def receive() -> Any:
            if (part := next(parts, None)) is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": part, "more_body": part == b"im"}

        async def append(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "headers": []}
        self.tasks.append(asyncio.create_task(self.proxy(scope, receive, keep or append)))  # type: ignore[arg-type]
        return sent

    async def answer(self, count: int) -> None:
        """Lets the replica answer some of the requests that it has taken."""
        for _ in range(count):
            self.replica.answers.release()
        await settle()

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def settle() -> None:
    """Lets everything run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


def status(sent: list[Any]) -> int:
    return sent[0]["status"] if sent else 0


def retry_s(sent: list[Any]) -> int:
    return int(dict(sent[0]["headers"])[b"retry-after"])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def clients(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Clients]:
    """Clients before the proxy of a replica with two places, which is also the fewest that are passed on."""
    monkeypatch.setattr(shedding, "FEWEST", 2)
    clients = Clients(Replica(places=2))
    clients.proxy._probe_at = clients.now + shedding.PROBE_S
    yield clients
    await clients.end()
    assert clients.proxy.on_way == 0


async def test_as_many_are_passed_on_as_the_replicas_take(clients: Clients) -> None:
    clients.replica.places = 4
    first = [clients.send() for _ in range(7)]
    await settle()
    assert [status(each) for each in first] == [0] * 4 + [503] * 3
    assert len(clients.replica.asked) == 5

    # The replica is not asked again, but for what is no request to score.
    crowd = [clients.send() for _ in range(3)]
    other = clients.send("/v1/classes")
    await settle()
    assert [status(each) for each in [*crowd, other]] == [503] * 4
    assert len(clients.replica.asked) == 6

    # Each place that is free is taken.
    for _ in range(3):
        await clients.answer(3)
        asked = len(clients.replica.asked)
        again = [clients.send() for _ in range(5)]
        await settle()
        assert [status(each) for each in again] == [0] * 3 + [503] * 2
        assert len(clients.replica.asked) == asked + 3


async def test_one_more_is_passed_on_every_now_and_then(clients: Clients) -> None:
    for _ in range(3):
        clients.send()
    await settle()
    assert clients.proxy.most == 2
    clients.replica.places = 4
    asked = []
    for _ in range(4):
        clients.now += shedding.PROBE_S
        before = len(clients.replica.asked)
        for _ in range(5):
            clients.send()
        await settle()
        asked.append(len(clients.replica.asked) - before)
    assert asked == [1, 1, 1, 1]
    assert clients.proxy.most == clients.replica.taken == 4


async def test_requests_that_hang_do_not_keep_all_others_out(clients: Clients) -> None:
    clients.replica.places = 9
    for _ in range(5):
        clients.send()
    await settle()
    clients.proxy.most = 2  # as after some that were not scored in time
    asked = []
    for _ in range(2):
        clients.now += shedding.PROBE_S
        for _ in range(3):
            clients.send()
        await settle()
        asked.append(len(clients.replica.asked))
    assert asked == [6, 7]


async def test_refused_clients_get_turns_at_the_pace_of_the_answers(clients: Clients) -> None:
    for _ in range(3):
        clients.send()
    await settle()
    for _ in range(4):
        clients.now += 0.5
        await clients.answer(1)
        clients.send()
        await settle()
    crowd = [clients.send() for _ in range(6)]
    await settle()
    by_the_replica, *by_the_proxy = map(retry_s, crowd)
    assert by_the_replica == 3
    assert by_the_proxy == [2, 2, 3, 3, 4]


async def test_a_pause_is_no_pace(clients: Clients) -> None:
    clients.replica.places = 4
    for _ in range(2):
        clients.send()
    await settle()
    await clients.answer(2)
    clients.now += 10.0
    for _ in range(4):
        clients.send()
    await settle()
    clients.now += 0.25
    await clients.answer(1)
    clients.now += 0.25
    await clients.answer(1)
    assert list(clients.proxy._pace._gaps) == [0.0, 0.25]


async def test_a_burst_is_counted_before_a_replica_reads_it(clients: Clients) -> None:
    """A replica that is busy reads late; what it then has to refuse has waited for it."""
    free = asyncio.Event()

    async def read_late(scope: Any, receive: Any, send: Any) -> None:
        await free.wait()
        await clients.replica(scope, receive, send)

    clients.proxy._app, clients.proxy.most = read_late, 2
    burst = [clients.send() for _ in range(7)]
    await settle()
    assert [status(each) for each in burst] == [0] * 2 + [503] * 5
    free.set()
    await settle()
    await clients.answer(2)
    assert [status(each) for each in burst] == [200] * 2 + [503] * 5


async def test_a_body_that_does_not_arrive_takes_nobodys_place(clients: Clients) -> None:
    for _ in range(3):
        clients.send()
    await settle()
    await clients.answer(2)
    assert clients.proxy.most == 2
    idle = [clients.send(whole=False) for _ in range(5)]
    await asyncio.sleep(2 * shedding.ARRIVAL_S)
    assert len(clients.replica.asked) == 3 + 5
    scored = [clients.send() for _ in range(2)]
    await settle()
    await clients.answer(2)
    assert [status(each) for each in [*idle, *scored]] == [0] * 5 + [200] * 2


async def test_a_client_that_does_not_read_its_answer_keeps_no_place(clients: Clients) -> None:
    async def never(message: Any) -> None:
        await asyncio.Event().wait()

    for places in (2, 0):  # for an answer, and for a refusal
        clients.replica.places = places
        asked = len(clients.replica.asked)
        for _ in range(2):
            clients.send(keep=never)
        await settle()
        await clients.answer(places)
        assert len(clients.replica.asked) == asked + 2
        assert clients.proxy.on_way == 0


async def test_a_body_that_is_read_after_the_end_takes_no_place(clients: Clients) -> None:
    left: list[asyncio.Task[Any]] = []

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        left.append(asyncio.create_task(receive()))
        raise UnicodeDecodeError("ascii", b"\xff", 0, 1, "a header")

    clients.proxy._app = fail
    clients.send()
    await settle()
    assert all(task.done() for task in left) and left
    assert clients.proxy.on_way == 0


async def test_it_learns_nothing_from_other_errors(clients: Clients) -> None:
    clients.replica.places = 1
    clients.replica.code = "class_unavailable"
    for _ in range(9):
        clients.send()
    await settle()
    assert len(clients.replica.asked) == 9
    assert clients.proxy.most == shedding.FIRST


async def test_a_refusal_that_comes_late_counts_what_was_ahead(clients: Clients) -> None:
    clients.replica.places = 4
    refuse = asyncio.Event()

    async def hesitate(scope: Any, receive: Any, send: Any) -> None:
        if clients.replica.taken == 4:
            await receive(), await receive()
            await refuse.wait()
            await error_response(503, "overloaded", "words", {"Retry-After": "3"})(scope, receive, send)
        else:
            await clients.replica(scope, receive, send)

    clients.proxy._app = hesitate
    for _ in range(5):
        clients.send()
    await settle()
    await clients.answer(3)
    refuse.set()
    await settle()
    assert clients.proxy.most == 4


async def test_each_that_is_not_scored_in_time_shortens_the_queue(clients: Clients) -> None:
    clients.replica.places = 6
    clients.proxy.most = 6
    for _ in range(6):
        clients.send()
    await settle()
    for task in clients.tasks[:2]:  # their clients leave
        task.cancel()
    await settle()
    assert clients.proxy.most == 4
    await clients.answer(1)
    assert clients.proxy.most == 4


async def test_a_batch_is_always_passed_on(clients: Clients) -> None:
    clients.replica.places = 0
    for _ in range(4):
        clients.send()
    await settle()
    assert len(clients.replica.asked) == 4
    assert clients.proxy.most == 2
