"""The coordinator reads a registry, speaks with replicas and replaces one that has died; without Ray."""

import asyncio
import contextlib
import time

import mlflow
import pytest

from sprue.serving import agreement, coordinator
from sprue.serving.coordinator import Coordinator
from sprue.tracking import registry
from sprue.tracking.digests import DIGEST_TAG

MODEL = "textures.a"


def release():
    client = mlflow.MlflowClient()
    made = client.create_model_version(MODEL, "file:///nowhere", tags={f"{DIGEST_TAG}flow.safetensors": "ab"})
    client.set_registered_model_alias(MODEL, registry.CHAMPION, made.version)
    return int(made.version)


@pytest.fixture
def model(store):
    tags = {registry.DATASET_TAG: "textures", registry.CLASS_TAG: "a"}
    mlflow.MlflowClient().create_registered_model(MODEL, tags=tags)
    assert release() == 1
    yield
    mlflow.MlflowClient().delete_registered_model(MODEL)


@contextlib.asynccontextmanager
async def running(**arguments):
    found = Coordinator(**arguments)
    task = asyncio.create_task(found.run())
    yield found
    task.cancel()


def test_replicas_hear_at_once_what_to_load_and_when_to_serve_it(model):
    async def run():
        async with running(refresh_s=3600) as found:
            update = await found.join("x", {})
            assert (update.entries[MODEL].term.champion.version, update.registry_error) == (1, "")
            assert (await found.join("y", {})).entries == update.entries
            release()
            await found.look()
            started = time.monotonic()
            update_of_x = await found.follow("x", update.epoch, update.number, {})
            candidate = update_of_x.entries[MODEL].candidate
            assert candidate.version == 2 and update_of_x.entries[MODEL].term == update.entries[MODEL].term
            waiting = asyncio.create_task(found.follow("x", update.epoch, update_of_x.number, {candidate: ""}))
            await found.report("y", update.epoch, {candidate: ""})
            switched = await waiting
            assert time.monotonic() - started < coordinator.POLL_S
            assert switched.entries[MODEL].term.champion == candidate
            assert (await found.follow("x", update.epoch, switched.number, {})).entries == {}
            assert await found.follow("x", "another life", 0, {}) is None

    asyncio.run(run())


def test_a_registry_that_fails_is_named_and_what_is_served_goes_on(model, monkeypatch):
    async def run():
        async with running(refresh_s=0.1) as found:
            update = await found.join("x", {})
            with monkeypatch.context() as patch:
                patch.setattr(registry, "with_aliases", lambda *_: 1 / 0)
                await asyncio.sleep(1)
                update_of_x = await found.follow("x", update.epoch, 0, {})
            assert update_of_x.registry_error == "division by zero" and update_of_x.entries == update.entries
            mlflow.MlflowClient().delete_registered_model_alias(MODEL, registry.CHAMPION)
            while "no champion" not in update_of_x.registry_error:
                update_of_x = await found.follow("x", update.epoch, 0, {})
                await asyncio.sleep(0.1)
            assert update_of_x.entries == update.entries

    asyncio.run(run())


def test_one_that_replaces_another_is_told_what_is_served(model):
    async def run():
        async with running(refresh_s=0.1) as first:
            terms = {name: each.term for name, each in (await first.join("x", {})).entries.items()}
        release()
        async with running(refresh_s=0.1, replaces=True) as second:
            new = asyncio.create_task(second.join("new", {}))
            await asyncio.sleep(0.5)
            assert not new.done()
            update_of_x = await second.join("x", terms)
            assert {name: each.term for name, each in update_of_x.entries.items()} == terms
            assert (await new).entries.keys() == terms.keys()
            candidate = second.agreement.changes(0)[MODEL].candidate
            assert candidate.version == 2
            await second.report("x", update_of_x.epoch, {candidate: ""})
            await second.report("new", update_of_x.epoch, {candidate: ""})
            # The others may still be on their way.
            assert second.agreement.changes(0)[MODEL].candidate == candidate
            second._decides_at = 0.0
            await second.report("x", update_of_x.epoch, {candidate: ""})
            assert second.agreement.changes(0)[MODEL].term.champion == candidate

    asyncio.run(run())


def test_it_ends_when_there_are_no_replicas(model, monkeypatch):
    monkeypatch.setattr(coordinator, "IDLE_S", 0.5)
    monkeypatch.setattr(agreement, "LEASE_S", 2.0)

    async def run():
        found = Coordinator(refresh_s=3600)
        await found.join("x", {})
        joined = time.monotonic()
        await asyncio.wait_for(found.run(), 10)
        assert time.monotonic() - joined >= agreement.LEASE_S  # not before
        assert found.agreement.followers == 0

    asyncio.run(run())
