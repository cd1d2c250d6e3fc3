"""Champions are loaded when they are asked for, and follow a real registry; only the backbone is a tiny one."""

import asyncio
import threading
import time
from types import SimpleNamespace

import mlflow
import pytest

from sprue.errors import SprueError
from sprue.serving import agreement, loading, responses
from sprue.serving import champions as module
from sprue.serving.champions import CacheSettings, Champions
from sprue.serving.coordinator import Coordinator
from sprue.serving.errors import ApiError
from sprue.tracking import registry
from sprue.tracking.summary import SUMMARY_TAG

NAMES = ("a", "b", "c", "d")


class Plant:
    """A registry of a few classes; counts downloads and loads, and can hold back a class's load."""

    def __init__(self, release, folder, detectors):
        self._release, self._folder, self._detectors = release, folder, detectors
        self.loads = []
        self.held = {}

    def release(self, name, seed=0, views=("",), **arguments):
        return self._release(self._folder, name, self._detectors(views=views, seed=seed), **arguments)

    def hold(self, name):
        self.held[name] = threading.Event()
        return self.held[name]


@pytest.fixture
def plant(store, release, tmp_path, tiny_detector, tiny_engine, monkeypatch):
    monkeypatch.setenv("SPRUE_CACHE", str(tmp_path / "cache"))
    plant = Plant(release, tmp_path, tiny_detector)
    load_detector = registry.load_detector

    def load(champion):
        plant.loads.append(str(champion))
        if champion.model_name in plant.held:
            assert plant.held[champion.model_name].wait(30)
        return load_detector(champion)

    monkeypatch.setattr(registry, "load_detector", load)
    monkeypatch.setattr(loading, "registered_engine", lambda detector, threads: tiny_engine())
    monkeypatch.setattr(module, "WARM_UP_S", 0.0)  # one class is loaded at the start
    monkeypatch.setattr(agreement, "SWITCH_S", 0.0)
    monkeypatch.setattr(agreement, "LEASE_S", 60.0)
    yield plant
    for model in registry.registered_models():
        mlflow.MlflowClient().delete_registered_model(model.name)


def hide_flow(folder):
    (folder / "flow.safetensors").rename(folder.parent / "hidden")


class Replica(Champions):
    """The champions of one of the replicas that a coordinator, in this process, keeps to the same versions."""

    def __init__(self, settings, coordinator, name):
        super().__init__(settings, threads=1)
        self.coordinator, self._name, self._seen = coordinator, name, 0

    async def join(self):
        update = await self.coordinator.join(self._name, {})
        if not update.entries:
            raise SprueError(update.registry_error)
        self.begin(update.entries)
        self._seen = update.number
        await self.start()

    async def follow(self):
        """One of the questions that a follower asks all the time."""
        agreement = self.coordinator.agreement
        agreement.record(self._name, self.reports)
        agreement.decide()
        self.apply(agreement.changes(self._seen))
        self._seen = agreement.number

    async def refresh(self):
        """Lets the coordinator read the registry, and begins to load what is new."""
        await self.coordinator._look()
        await self.follow()


async def refreshed(champions):
    """Reads the registry, waits for what begins to be loaded, and for the switch."""
    await champions.refresh()
    while champions._new:
        await asyncio.sleep(0.01)
    await champions.follow()


async def until_version(champions, name, version):
    while champions.find(name).version != version:
        await champions.follow()
        await asyncio.sleep(0.01)


async def started(max_bytes=2**30, pinned=(), beside=None):
    coordinator = beside.coordinator if beside else Coordinator(refresh_s=3600)
    champions = Replica(CacheSettings(max_bytes, pinned), coordinator, "b" if beside else "a")
    await champions.join()
    return champions


def refusal(error):
    return error.value.status, error.value.code


def without_flow(folder):
    (folder / "flow.safetensors").unlink()


def test_a_few_classes_are_loaded_at_the_start_and_share_an_engine(plant, monkeypatch):
    monkeypatch.setattr(module, "WARM_UP_S", 60.0)
    for name in NAMES:
        plant.release(f"textures.{name}")
    plant.release("parcels.box", views=("0", "1"))

    async def run():
        champions = await started()
        assert (champions.loaded, champions.engines, champions.failures) == (5, 2, {})
        loaded = [await champions.load(champions.find(f"textures.{name}")) for name in NAMES]
        assert len({id(each.engine) for each in loaded}) == 1
        loaded.append(await champions.load(champions.find("box")))
        assert champions.bytes == sum(each.bytes for each in loaded)
        assert len(plant.loads) == 5

    asyncio.run(run())


def test_memory_is_bounded_and_a_class_comes_back(plant):
    for seed, name in enumerate(NAMES):
        plant.release(f"textures.{name}", seed)

    async def run():
        champions = await started()
        size = champions.bytes
        assert champions.loaded == 1
        champions = await started(max_bytes=2 * size, pinned=("d",))
        for name in NAMES * 2:
            served = await champions.load(champions.find(name))
            assert served.champion.class_name == name
            assert champions.bytes <= 2 * size
        assert champions.loaded == 2
        plant.loads.clear()
        for name in ("d", "c"):
            await champions.load(champions.find(name))
        assert plant.loads == []  # the pinned one, and the last
        assert {each.class_name for each in champions.available} == set(NAMES)

    asyncio.run(run())


def test_a_request_waits_for_its_own_class_alone(plant):
    for name in NAMES:
        plant.release(f"textures.{name}")

    async def run():
        champions = await started()
        plant.loads.clear()
        hold = plant.hold("textures.b")
        waiting = [asyncio.create_task(champions.load(champions.find("b"))) for _ in range(3)]
        for name in ("a", "c", "d"):
            await asyncio.wait_for(champions.load(champions.find(name)), 30)
        assert not any(each.done() for each in waiting)
        waiting[0].cancel()  # its client has gone; the others still wait for the same load
        hold.set()
        first, second = await asyncio.gather(*waiting[1:])
        assert first is second and plant.loads.count("textures.b version 1") == 1

    asyncio.run(run())


def test_downloads_that_hang_hold_up_no_class_that_is_on_the_disk(plant):
    cold = [f"textures.cold{number}" for number in range(module.LOADERS + 1)]
    for seed, name in enumerate(["textures.a", "textures.b", *cold]):
        plant.release(name, seed)

    async def run():
        champions = await started(max_bytes=(await started()).bytes)  # of one class
        for name in ("a", "b"):
            await champions.load(champions.find(name))
        plant.loads.clear()
        holds = [plant.hold(name) for name in cold]
        waiting = [asyncio.create_task(champions.load(champions.find(name))) for name in cold]
        for name in ("a", "b", "a"):
            await asyncio.wait_for(champions.load(champions.find(name)), 20)
        assert {"textures.a version 1", "textures.b version 1"} < set(plant.loads)
        assert not any(each.done() for each in waiting)
        for hold in holds:
            hold.set()
        await asyncio.gather(*waiting)

    asyncio.run(run())


def test_a_download_that_hangs_holds_up_no_other_change(plant):
    for name in NAMES:
        plant.release(f"textures.{name}")

    async def run():
        champions = await started()
        plant.release("textures.a", seed=1)
        plant.release("textures.b", seed=1)
        mlflow.MlflowClient().delete_registered_model("textures.d")
        hold = plant.hold("textures.a")
        await asyncio.wait_for(champions.refresh(), 20)
        await until_version(champions, "b", 2)
        plant.release("textures.c", seed=1)
        await champions.refresh()
        await until_version(champions, "c", 2)
        assert [(each.class_name, each.version) for each in champions.available] == [("a", 1), ("b", 2), ("c", 2)]
        hold.set()
        await refreshed(champions)
        assert champions.find("a").version == 2 and plant.loads.count("textures.a version 2") == 1

    asyncio.run(run())


def test_a_new_class_that_can_not_be_listed_is_not_available(plant):
    plant.release("textures.a")

    async def run():
        champions = await started()
        version = plant.release("textures.b")
        mlflow.MlflowClient().delete_model_version_tag("textures.b", str(version), SUMMARY_TAG)
        await champions.refresh()
        assert [responses.summary(each, champions.since(each)).class_name for each in champions.available] == ["a"]
        assert "textures.b version 1 has no summary" in champions.failures["textures.b"]

    asyncio.run(run())


def test_a_new_champion_is_loaded_before_it_replaces_the_old_one(plant):
    plant.release("textures.a")
    plant.release("textures.b")

    async def run():
        champions = await started()
        old = await champions.load(champions.find("a"))
        plant.release("textures.a", seed=1)
        hold = plant.hold("textures.a")
        refresh = asyncio.create_task(refreshed(champions))
        while "textures.a version 2" not in plant.loads:
            await asyncio.sleep(0.01)
        assert await champions.load(champions.find("a")) is old
        hold.set()
        await refresh
        new = await champions.load(champions.find("a"))
        assert (new.champion.version, champions.find("a").version) == (2, 2)
        assert new.engine is old.engine and champions.loaded == 1

    asyncio.run(run())


def test_the_old_champion_goes_on_even_if_it_has_to_be_loaded_again(plant, monkeypatch):
    for name in NAMES:
        plant.release(f"textures.{name}")

    async def run():
        size = (await started()).bytes
        champions = await started(max_bytes=size)
        sources = []
        plant.release("textures.b", damage=lambda folder: sources.append(folder) or hide_flow(folder))  # not loaded
        await refreshed(champions)
        reason = champions.failures["textures.b"]
        assert "the files of textures.b version 2 are not those that were registered" in reason
        for name in ("b", "c", "b"):
            assert (await champions.load(champions.find(name))).champion.version == 1
        assert {each.class_name for each in champions.available} == set(NAMES)

        # It is not downloaded at each refresh, but it is tried again after a while.
        plant.loads.clear()
        await refreshed(champions)
        assert plant.loads == []
        monkeypatch.setattr(
            module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + module.FIRST_RETRY_S, time=time.time)
        )
        for _ in range(2):
            await refreshed(champions)
        assert plant.loads == ["textures.b version 2"]
        (sources[0].parent / "hidden").rename(sources[0] / "flow.safetensors")
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float("inf"), time=time.time))
        await refreshed(champions)
        assert champions.failures == {}
        assert (await champions.load(champions.find("b"))).champion.version == 2

    asyncio.run(run())


def test_a_class_of_which_nothing_can_be_loaded_is_unavailable(plant):
    plant.release("textures.a")
    plant.release("textures.b", damage=without_flow)

    async def run():
        champions = await started()
        for _ in range(2):
            with pytest.raises(ApiError, match=r"textures\.b version 1") as error:
                await champions.load(champions.find("b"))
            assert refusal(error) == (503, "class_unavailable") and int(error.value.headers["Retry-After"]) > 0
        assert plant.loads.count("textures.b version 1") == 1
        assert [each.class_name for each in champions.available] == ["a"]
        plant.release("textures.b")
        await refreshed(champions)
        assert (await champions.load(champions.find("b"))).champion.version == 2
        assert champions.failures == {}

        # A class that is new and damaged is reported before anybody asks for it.
        plant.release("textures.c", damage=without_flow)
        await refreshed(champions)
        assert list(champions.failures) == ["textures.c"]

    asyncio.run(run())


def test_a_registry_that_was_replaced_is_noticed(plant):
    """A backup's version may have the same number, and come from another run or be calibrated otherwise."""
    plant.release("textures.a", run_id="1" * 32)

    async def run():
        champions = await started()
        old = await champions.load(champions.find("a"))
        await refreshed(champions)
        assert await champions.load(champions.find("a")) is old
        mlflow.MlflowClient().delete_registered_model("textures.a")
        assert plant.release("textures.a", seed=1, run_id="2" * 32) == 1
        await refreshed(champions)
        assert (await champions.load(champions.find("a"))).champion.run_id == "2" * 32
        mlflow.MlflowClient().delete_registered_model("textures.a")
        assert plant.release("textures.a", seed=2, run_id="2" * 32) == 1
        await refreshed(champions)
        latest = await champions.load(champions.find("a"))
        (registered,) = registry.champions()
        assert dict(latest.champion.tags) == dict(registered.tags)
        mlflow.MlflowClient().delete_registered_model("textures.a")
        await refreshed(champions)
        assert "no champion to serve: run the pipeline first" in champions.coordinator._error
        assert await champions.load(champions.find("a")) is latest

    asyncio.run(run())


def test_the_classes_that_were_used_last_are_loaded_first(plant):
    for name in NAMES:
        plant.release(f"textures.{name}")

    async def run():
        champions = await started()
        for name in ("a", "d", "c"):
            await champions.load(champions.find(name))
        await champions.remember_recent()
        plant.loads.clear()
        await started()
        assert plant.loads == ["textures.c version 1"]
        module._recent_file().write_text("damaged")
        plant.loads.clear()
        await started()
        assert plant.loads == ["textures.a version 1"]

    asyncio.run(run())


def test_the_service_does_not_start_without_a_champion_or_a_pinned_class(plant):
    with pytest.raises(SprueError, match="no champion to serve: run the pipeline first"):
        asyncio.run(started())
    plant.release("textures.a", damage=without_flow)
    with pytest.raises(SprueError, match=r"no champion can be loaded: textures\.a version 1: .*flow\.safetensors"):
        asyncio.run(started())
    plant.release("textures.b")
    with pytest.raises(SprueError, match=r"there is no class 'x'; there are: textures\.a, textures\.b"):
        asyncio.run(started(pinned=("x",)))


def test_pinned_classes_that_fail_or_take_too_much_are_reported(plant, caplog):
    for seed, name in enumerate(NAMES):
        plant.release(f"textures.{name}", seed, damage=without_flow if name == "b" else None)

    async def run():
        champions = await started(max_bytes=1, pinned=("a", "b"))
        assert champions.loaded == 1 and "textures.b version 1" in champions.failures["textures.b"]
        assert "pinned classes take more than the memory for all" in caplog.text
        assert (await champions.load(champions.find("c"))).champion.class_name == "c"
        assert champions.loaded == 1 and "textures.c version 1 is loaded for each request" in caplog.text

    asyncio.run(run())


def test_a_class_is_found_by_name(plant):
    for name in ("textures.a", "walls.a", "walls.b"):
        plant.release(name)

    async def run():
        champions = await started()
        assert champions.find("b") is champions.find("walls.b")
        for name, expected in {"bolt": (404, "unknown_class"), "a": (409, "ambiguous_class")}.items():
            with pytest.raises(ApiError) as error:
                champions.find(name)
            assert refusal(error) == expected

    asyncio.run(run())


def versions(*replicas):
    return [each.find("a").version for each in replicas]


def test_replicas_switch_when_all_of_them_have_loaded_a_version(plant):
    plant.release("textures.a")

    async def run():
        first = await started()
        second = await started(beside=first)
        plant.release("textures.a", seed=1)
        await refreshed(first)
        assert first.reports and versions(first, second) == [1, 1]
        for _ in range(3):
            await first.follow()
        assert versions(first, second) == [1, 1]
        await refreshed(second)
        await first.follow()
        assert versions(first, second) == [2, 2]
        assert first.since(first.find("a")) == second.since(second.find("a")) <= time.time()
        assert (first.loaded, first.reports) == (1, {})

    asyncio.run(run())


def test_a_version_that_one_replica_can_not_load_is_served_by_none(plant, monkeypatch):
    plant.release("textures.a")

    async def run():
        first = await started()
        second = await started(beside=first)
        load = second.loader
        second.loader = lambda champion: load(champion) if champion.version == 1 else broken()
        second.loader.is_local = load.is_local

        def broken():
            raise SprueError("the disk is full")

        plant.release("textures.a", seed=1)
        await refreshed(first)
        await refreshed(second)
        await first.follow()
        assert versions(first, second) == [1, 1]
        for each in (first, second):
            assert "textures.a version 2: the disk is full" in each.failures["textures.a"]
            assert [each.version for each in each.available] == [1]

        # It is tried again after a while.
        second.loader = load
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float("inf"), time=time.time))
        await refreshed(second)
        await first.follow()
        assert versions(first, second) == [2, 2] and first.failures == second.failures == {}

    asyncio.run(run())


def test_a_replica_that_dies_or_hangs_is_not_waited_for_long(plant, monkeypatch):
    plant.release("textures.a")

    async def run():
        first = await started()
        second = await started(beside=first)
        plant.release("textures.a", seed=1)
        await refreshed(first)
        assert versions(first) == [1]
        with monkeypatch.context() as patch:
            patch.setattr(agreement, "LEASE_S", 0.1)
            await asyncio.sleep(0.2)  # the second has died
            await first.follow()
        assert versions(first) == [2]

        # One that lives and whose download hangs goes on with what it has, and says so, until it has the new version.
        hold = plant.hold("textures.a")
        await second.follow()
        assert versions(second) == [1]
        assert "textures.a version 2 is served by other replicas" in second.failures["textures.a"]
        hold.set()
        while second._new:
            await asyncio.sleep(0.01)
        assert versions(second) == [2] and second.failures == {}

    asyncio.run(run())


def test_a_candidate_takes_no_memory_of_its_own_for_long(plant):
    for name in NAMES:
        plant.release(f"textures.{name}")

    async def run():
        size = (await started()).bytes
        champions = await started(max_bytes=size)
        for name in NAMES:
            plant.release(f"textures.{name}", seed=1)
        await refreshed(champions)
        for name in NAMES:
            await until_version(champions, name, 2)
            assert (await champions.load(champions.find(name))).champion.version == 2
        assert champions.bytes == size and champions._prepared.bytes == 0

    asyncio.run(run())
