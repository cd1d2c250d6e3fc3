"""A function is called for each class, here and in tasks alike; one that fails stops no other."""

import logging
import os

import pytest
import ray

from sprue.errors import SprueError
from sprue.stages.class_tasks import AHEAD, MANY, Done, for_each_class
from sprue.stages.runtime import init_ray

logger = logging.getLogger("sprue.test")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    init_ray(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def double(number):
    logger.warning("class %d in process %d", number, os.getpid())
    if number == 1:
        raise SprueError("it can't be doubled")
    if number == 2:
        raise FileNotFoundError("it is not there")
    if number == 3:
        os._exit(1)
    if number == 4:
        raise MemoryError("4 GB")
    return 2 * number


def outcomes(numbers):
    return {done.class_name: done for done in for_each_class(double, ((str(n), (n,)) for n in numbers), len(numbers))}


def test_a_few_are_done_here_in_their_order(caplog):
    found = outcomes([0, 1, 2, 4, 5])
    assert list(found.values()) == [
        Done("0", 0, ""),
        Done("1", None, "it can't be doubled"),
        Done("2", None, "it is not there"),
        Done("4", None, "MemoryError: 4 GB"),
        Done("5", 10, ""),
    ]
    logged = [message for message in caplog.messages if message != "a class failed unexpectedly"]
    assert len(logged) == 5 and all(f"in process {os.getpid()}" in message for message in logged)
    assert "Traceback" in caplog.text


def test_many_are_done_in_tasks_and_what_they_log_is_logged_here(caplog):
    caplog.set_level(logging.WARNING, "sprue")
    numbers = [0, 1, 2, *range(4, MANY + 2)]
    found = outcomes(numbers)
    assert {name: done.value for name, done in found.items() if not done.failure} == {
        str(number): 2 * number for number in numbers if number not in (1, 2, 4)
    }
    assert (found["1"].failure, found["2"].failure) == ("it can't be doubled", "it is not there")
    assert found["4"].failure == "MemoryError: 4 GB" and 'raise MemoryError("4 GB")' in caplog.text
    logged = [message for message in caplog.messages if message.startswith("class ")]
    assert len(logged) == len(numbers)
    assert not any(f"in process {os.getpid()}" in message for message in logged)


def test_a_process_that_dies_fails_its_class_alone():
    found = outcomes([*range(5, MANY + 5), 3])
    assert {name for name, done in found.items() if done.failure} == {"3"}
    assert "its process died" in found["3"].failure


def test_no_more_is_submitted_than_is_needed():
    taken = []

    def arguments():
        for number in range(100, 100 + 8 * AHEAD):
            taken.append(number)
            yield str(number), (number,)

    found = for_each_class(double, arguments(), 8 * AHEAD)
    next(found)
    assert len(taken) == 2 * AHEAD
    assert len(list(found)) == 8 * AHEAD - 1
