"""A client gets its rate and no more, whatever it asks for, and learns when to come again."""

import math

import pytest

from sprue.errors import SprueError
from sprue.serving import rates
from sprue.serving.rates import Rate, RateLimiter


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("text", ["", "20", "0/s", "-1/s", "1.5/s", "20/day", "20 /s", "1234567/s", "20/s\n"])
def test_what_is_no_rate_is_named(text: str) -> None:
    with pytest.raises(SprueError, match="is no rate; write a number of requests and s, min or h"):
        Rate.of(text)


@pytest.mark.parametrize("text", ["1/s", "20/s", "90/min", "100/h"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_client_that_asks_all_the_time_gets_its_rate(text: str, replicas: int) -> None:
    rate, clock = Rate.of(text), Clock()
    limiters = [RateLimiter(lambda: replicas, clock) for _ in range(replicas)]
    step_s, granted, periods = rate.seconds / rate.requests / 10, 0, 30
    for _ in range(round(periods * rate.seconds / step_s)):
        granted += sum(limiter.wait_s("line", rate) == 0 for limiter in limiters)
        clock.now += step_s
    at_once = max(rate.requests, replicas)  # a replica grants one at least
    assert abs(granted - (periods * rate.requests + at_once)) <= replicas


def test_the_wait_is_exact() -> None:
    rate, clock = Rate.of("2/s"), Clock()
    limiter = RateLimiter(now=clock)
    assert [limiter.wait_s("line", rate) for _ in range(3)] == [0, 0, pytest.approx(0.5)]
    clock.now += 0.49
    assert limiter.wait_s("line", rate) == pytest.approx(0.01)
    clock.now += 0.01
    assert limiter.wait_s("line", rate) == 0 and limiter.wait_s("line", rate) > 0
    assert limiter.wait_s("another", rate) == 0


def test_clients_are_remembered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MAX_CLIENTS", 100)
    rate, clock = Rate.of("10/h"), Clock()
    limiter = RateLimiter(now=clock)
    greedy = [limiter.wait_s("greedy", rate) for _ in range(11)]
    assert greedy[:10] == [0] * 10 and greedy[10] > 0
    for number in range(1000):
        limiter.wait_s(str(number), rate)
    assert len(limiter._full_at) <= 101
    assert math.isclose(limiter.wait_s("greedy", rate), greedy[10])
