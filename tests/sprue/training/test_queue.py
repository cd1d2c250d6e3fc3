"""Slots take classes from one queue, and get an interrupted one again."""

import asyncio

from sprue.training.queue import ATTEMPTS, FitQueue, News


def heard(queue):
    """All that the queue passes on, so far."""

    async def drain():
        return [await queue.news() for _ in range(queue.told.qsize())]

    return asyncio.run(drain())


def test_each_class_is_given_once_and_an_interrupted_one_again():
    queue = FitQueue(["brick", "grass", "gravel"], slots=2)

    async def fits():
        taken = [await queue.take(0), await queue.take(1)]
        await queue.epoch("brick", {"epoch": 1})
        await queue.end(0, "brick")
        await queue.end(0, "brick", "said by a second process of the slot")
        taken += [await queue.take(0), await queue.take(1)]
        await queue.end(1, "grass", "it has no likelihood")
        await queue.end(0, "gravel")
        return [*taken, await queue.take(0), await queue.take(1)]

    assert asyncio.run(fits()) == ["brick", "grass", "gravel", "grass", None, None]
    assert heard(queue) == [
        News("brick", {"epoch": 1}),
        News("brick"),
        News("grass", failure="it has no likelihood"),
        News("gravel"),
    ]


def test_a_class_that_ends_its_process_again_and_again_is_given_up():
    queue = FitQueue(["brick", "grass"], slots=1)

    async def fits():
        taken = [await queue.take(0) for _ in range(ATTEMPTS + 1)]
        await queue.stumble("brick", "RuntimeError: out of memory")
        await queue.stumble("brick", "RuntimeError: connection closed by peer")
        taken += [await queue.take(0) for _ in range(ATTEMPTS + 1)]
        return [*taken, await queue.take(0)]

    given = ["brick"] * (ATTEMPTS + 1) + ["grass"] * (ATTEMPTS + 1) + [None]
    assert asyncio.run(fits()) == given
    assert heard(queue) == [
        News("brick", failure=f"RuntimeError: out of memory (tried {ATTEMPTS + 1} times)", lost=True),
        News("grass", failure=f"the process that fits it dies (tried {ATTEMPTS + 1} times)", lost=True),
    ]


def test_what_ended_slots_leave_has_failed():
    queue = FitQueue(["brick", "grass", "gravel"], slots=2)

    async def fits():
        await queue.take(0)
        await queue.take(1)
        await queue.close(0, "its machine is gone")
        first = queue.told.qsize()
        await queue.end(1, "grass")
        await queue.close(1, "the other too")
        return first

    assert asyncio.run(fits()) == 1
    assert heard(queue) == [
        News("brick", failure="its machine is gone", lost=True),
        News("grass"),
        News("gravel", failure="the other too", lost=True),
    ]


def test_an_epoch_that_was_stored_but_not_told_of_is_told_by_who_goes_on():
    queue = FitQueue(["brick"], slots=1)

    async def fits():
        await queue.take(0)
        await queue.resume("brick", {"epoch": 4})
        await queue.epoch("brick", {"epoch": 5})
        await queue.take(0)
        await queue.resume("brick", {"epoch": 6})
        await queue.take(0)
        await queue.resume("brick", {"epoch": 6})

    asyncio.run(fits())
    assert heard(queue) == [News("brick", {"epoch": 5}), News("brick", {"epoch": 6})]


def test_in_lockstep_a_fit_waits_until_it_is_heard_and_ends_when_it_is_cancelled():
    queue = FitQueue(["brick", "grass"], slots=1, lockstep=True)

    async def fits():
        await queue.take(0)
        waits = asyncio.create_task(queue.epoch("brick", {"epoch": 1}))
        assert await queue.news() == News("brick", {"epoch": 1})
        assert not waits.done()
        await queue.heard("brick", 1)
        goes_on = [await waits]
        waits = asyncio.create_task(queue.epoch("brick", {"epoch": 2}))
        await queue.news()
        await queue.cancel()
        return [*goes_on, await waits, await queue.epoch("brick", {"epoch": 3}), await queue.take(0)]

    assert asyncio.run(fits()) == [True, False, False, None]
