"""Worker groups take classes from one queue; an interrupted class is handed out again."""

import asyncio

from sprue.training.class_queue import ATTEMPTS, ClassQueue, Event


def events_of(queue):
    """All events so far."""

    async def drain():
        return [await queue.next_event() for _ in range(queue.events.qsize())]

    return asyncio.run(drain())


def test_each_class_is_handed_out_once_and_an_interrupted_one_again():
    queue = ClassQueue(["brick", "grass", "gravel"], groups=2)

    async def fits():
        taken = [await queue.take(0), await queue.take(1)]
        await queue.report_epoch("brick", {"epoch": 1})
        await queue.end(0, "brick")
        await queue.end(0, "brick", "reported by a second process of the group")
        taken += [await queue.take(0), await queue.take(1)]
        await queue.end(1, "grass", "it has no likelihood")
        await queue.end(0, "gravel")
        return [*taken, await queue.take(0), await queue.take(1)]

    assert asyncio.run(fits()) == ["brick", "grass", "gravel", "grass", None, None]
    assert events_of(queue) == [
        Event("brick", {"epoch": 1}),
        Event("brick"),
        Event("grass", failure="it has no likelihood"),
        Event("gravel"),
    ]


def test_a_class_whose_processes_keep_dying_is_given_up():
    queue = ClassQueue(["brick", "grass"], groups=1)

    async def fits():
        taken = [await queue.take(0) for _ in range(ATTEMPTS + 1)]
        await queue.report_error("brick", "RuntimeError: out of memory")
        await queue.report_error("brick", "RuntimeError: connection closed by peer")
        taken += [await queue.take(0) for _ in range(ATTEMPTS + 1)]
        return [*taken, await queue.take(0)]

    expected = ["brick"] * (ATTEMPTS + 1) + ["grass"] * (ATTEMPTS + 1) + [None]
    assert asyncio.run(fits()) == expected
    assert events_of(queue) == [
        Event("brick", failure=f"RuntimeError: out of memory (tried {ATTEMPTS + 1} times)", lost=True),
        Event("grass", failure=f"the process that fits it dies (tried {ATTEMPTS + 1} times)", lost=True),
    ]


def test_a_group_that_grows_has_not_failed():
    queue = ClassQueue(["brick"], groups=1)

    async def fits():
        return [await queue.take(0, workers) for workers in (2, 3, 4, 5, 6, 7, 6)]

    assert asyncio.run(fits()) == ["brick"] * 7
    assert not events_of(queue)


def test_a_class_whose_workers_keep_dying_and_coming_back_is_given_up():
    queue = ClassQueue(["brick"], groups=1)

    async def fits():
        return [await queue.take(0, workers) for workers in (2, 1) * (ATTEMPTS + 2)]

    assert asyncio.run(fits()) == ["brick"] * (2 * ATTEMPTS + 1) + [None] * 3
    assert [event.failure for event in events_of(queue)] == [
        f"the process that fits it dies (tried {ATTEMPTS + 1} times)"
    ]


def test_deaths_between_epochs_do_not_add_up():
    """A spot machine may be taken away any number of times, as long as an epoch is finished in between."""
    queue = ClassQueue(["brick"], groups=1)

    async def fits():
        await queue.take(0)
        for epoch in range(1, 2 * ATTEMPTS):
            assert await queue.take(0) == "brick"
            await queue.report_epoch("brick", {"epoch": epoch})
        return await queue.finished(0)

    assert asyncio.run(fits()) == 2 * ATTEMPTS - 1
    assert [event.failure for event in events_of(queue)] == [""] * (2 * ATTEMPTS - 1)


def test_classes_that_closed_groups_leave_have_failed():
    queue = ClassQueue(["brick", "grass", "gravel"], groups=2)

    async def fits():
        await queue.take(0)
        await queue.take(1)
        await queue.close(0, "its machine is gone")
        first = queue.events.qsize()
        await queue.end(1, "grass")
        await queue.close(1, "the other too")
        return first

    assert asyncio.run(fits()) == 1
    assert events_of(queue) == [
        Event("brick", failure="its machine is gone", lost=True),
        Event("grass"),
        Event("gravel", failure="the other too", lost=True),
    ]


def test_an_epoch_that_was_stored_but_not_reported_is_reported_on_resuming():
    queue = ClassQueue(["brick"], groups=1)

    async def fits():
        await queue.take(0)
        await queue.resume("brick", {"epoch": 4})
        await queue.report_epoch("brick", {"epoch": 5})
        await queue.take(0)
        await queue.resume("brick", {"epoch": 6})
        await queue.take(0)
        await queue.resume("brick", {"epoch": 6})

    asyncio.run(fits())
    assert events_of(queue) == [Event("brick", {"epoch": 5}), Event("brick", {"epoch": 6})]


def test_a_synchronous_fit_waits_for_an_acknowledgement_and_ends_when_it_is_cancelled():
    queue = ClassQueue(["brick", "grass"], groups=1, synchronous=True)

    async def fits():
        await queue.take(0)
        waits = asyncio.create_task(queue.report_epoch("brick", {"epoch": 1}))
        assert await queue.next_event() == Event("brick", {"epoch": 1})
        assert not waits.done()
        await queue.acknowledge("brick", 1)
        continues = [await waits]
        waits = asyncio.create_task(queue.report_epoch("brick", {"epoch": 2}))
        await queue.next_event()
        await queue.cancel()
        return [*continues, await waits, await queue.report_epoch("brick", {"epoch": 3}), await queue.take(0)]

    assert asyncio.run(fits()) == [True, False, False, None]
