"""Two replicas change versions together, at once when the tracking server says so, on a real Ray Serve.

A challenger shadows the champion on both.
"""

import base64
import hashlib
import hmac
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlflow
import pytest
import ray

from sprue.release.decision_store import FOLDER as DECISIONS
from sprue.release.decision_store import DecisionStore
from sprue.release.shadowing import FOLDER, Shadowing, read_shadowing
from sprue.serving.coordinator import NAME, NAMESPACE
from sprue.serving.decision_log import FLUSH_S, DecisionLogSettings
from sprue.serving.launch import ServeSettings, serve_champions, stop_serving
from sprue.store import location
from sprue.tracking import registry
from sprue.tracking.webhook import ROUTE

SECRET = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def pair(plant):
    """The plant's service with two replicas, which look into the registry when they are told to."""
    stop_serving()
    secret = plant.folder / "webhook.secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    settings = ServeSettings(
        port=plant.port,
        refresh_s=3600,
        replicas=2,
        keys=plant.keys,
        webhook_secret=secret,
        decisions=DecisionLogSettings(str(plant.folder / "store" / DECISIONS), sample=0.0),
        shadow=1.0,
    )
    serve_champions(settings)
    return plant


def event(pair, secret=SECRET, sent=None, signed=b"{}"):
    """Tells the service of a change, as MLflow does."""
    sent = str(int(time.time())) if sent is None else sent
    digest = hmac.new(secret.encode(), f"id.{sent}.".encode() + signed, hashlib.sha256).digest()
    headers = {
        "X-MLflow-Signature": f"v1,{base64.b64encode(digest).decode()}",
        "X-MLflow-Timestamp": sent,
        "X-MLflow-Delivery-Id": "id",
        "Authorization": "",
    }
    return pair.client.post(ROUTE, content=b"{}", headers=headers)


class Crowd:
    """Clients that score all the time; keep when they asked and had the answer, and which version made it."""

    def __init__(self, pair):
        self.pair, self.seen, self.stopped = pair, [], threading.Event()

    def __enter__(self):
        self.pool = ThreadPoolExecutor(4)
        image = self.pair.image("brick")
        self.clients = [self.pool.submit(self.score, image) for _ in range(4)]
        return self

    def score(self, image):
        while not self.stopped.is_set():
            asked = time.monotonic()
            body = self.pair.post("brick", image).raise_for_status().json()
            self.seen.append((asked, time.monotonic(), body["model"]["version"], body["threshold"]))

    def __exit__(self, *_):
        self.stopped.set()
        for each in self.clients:
            each.result()
        self.pool.shutdown()

    def wait_for(self, version, seconds=60):
        end = time.monotonic() + seconds
        while not any(each[2] == version for each in self.seen):
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(1)


def late(seen, version):
    """How many asked after somebody had had an answer of a version, and got one of another."""
    first = min(answered for _, answered, found, _ in seen if found == version)
    return sum(asked > first and found != version for asked, _, found, _ in seen)


def test_an_event_makes_all_replicas_switch_at_one_instant(pair):
    with Crowd(pair) as crowd:
        crowd.wait_for(1)
        version = pair.release("textures.brick", pair.detectors["gräs 2"])
        time.sleep(2)
        assert {each[2] for each in crowd.seen} == {1}  # nobody has looked
        assert event(pair).status_code == 204
        crowd.wait_for(version)
    assert late(crowd.seen, version) == 0
    assert {(each[2], each[3]) for each in crowd.seen} == {
        (1, pair.detectors["brick"].calibration.threshold),
        (version, pair.detectors["gräs 2"].calibration.threshold),
    }
    listed = pair.client.get("/v1/classes").json()["classes"][0]
    assert listed["model"]["digest"] == registry.find_registered("textures.brick", "champion").digest
    assert len({str(pair.client.get("/v1/classes").json()["classes"]) for _ in range(10)}) == 1


def test_events_that_are_not_the_servers_are_refused(pair):
    for wrong in ({"secret": "x" * 32}, {"sent": str(int(time.time()) - 400)}, {"sent": "soon"}, {"signed": b"{ }"}):
        answer = event(pair, **wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "bad_signature")
    answer = pair.client.post(ROUTE, content=bytes(300_000))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_bytes")


def test_a_coordinator_that_dies_takes_nothing_with_it(pair):
    before = pair.client.get("/v1/classes").json()["classes"]
    (name,) = (
        each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["name"].startswith(NAME)
    )
    for no_restart in (False, True):  # Ray starts another one; after that the replicas do
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=no_restart)
        assert pair.post("brick", pair.image("brick")).status_code == 200
        pair.wait(lambda health: health["status"] == "ready")
        time.sleep(1)
        assert pair.client.get("/v1/classes").json()["classes"] == before
        with Crowd(pair) as crowd:
            version = pair.release("textures.brick", pair.detectors["brick"])
            for _ in range(100):
                if event(pair).status_code == 204:
                    break
                time.sleep(0.1)
            crowd.wait_for(version)
        assert late(crowd.seen, version) == 0
        before = pair.client.get("/v1/classes").json()["classes"]


def test_a_challenger_scores_what_the_champion_has_answered(pair):
    """It is the same detector with a lower threshold: the two disagree where only that one is passed."""
    detector, name = pair.detectors["brick"], "textures.brick"
    champion = pair.post("brick", pair.image("brick")).json()["model"]["version"]
    challenger = pair.challenge(name, replace(detector, calibration=replace(detector.calibration, alpha=0.5)))
    assert event(pair).status_code == 204
    store, deadline, answers = location(str(pair.folder / "store")), time.monotonic() + 120, {}
    while (found := read_shadowing(store, name, challenger, champion)) is None or found.samples < 16:
        assert time.monotonic() < deadline
        answer = pair.post("brick", pair.image("brick", len(answers) % 20))
        answers[answer.headers["x-request-id"]] = answer.json()
        assert answer.json()["model"]["version"] == champion
        time.sleep(0.3)
    before = None
    while found != before:  # until the last rows are in the store
        before = found
        time.sleep(FLUSH_S + 1)
        found = read_shadowing(store, name, challenger, champion)
    shadow = DecisionStore(store / FOLDER)
    columns = ["request_id", "score", "threshold", "is_anomalous", "kept"]
    rows = [row for day in shadow.days() for row in shadow.of_version(day, name, challenger, columns)]
    for row in rows:
        answer = answers[row["request_id"]]
        assert row["score"] == pytest.approx(answer["score"], rel=1e-5)  # a batch's size changes the last digits
        assert row["threshold"] < answer["threshold"]
        assert row["is_anomalous"] == (row["score"] > row["threshold"])
        assert row["kept"] or not row["is_anomalous"]
    assert len(shadow.read_images(next(shadow.newest(name, 1, kept=["alarm"])))) == 1
    mine = {row["request_id"] for row in rows if row["is_anomalous"]}
    theirs = {id for id, answer in answers.items() if answer["is_anomalous"]} & {row["request_id"] for row in rows}
    expected = Shadowing(len(rows), len(mine & theirs), len(mine - theirs), len(theirs - mine))
    assert replace(found, alarms=()) == expected
    assert found.alarms and all(location(each).is_file() for each in found.alarms)
    assert expected.challenger_alone > 0 and expected.champion_alone == 0
    mlflow.MlflowClient().delete_registered_model_alias(name, registry.CHALLENGER)


def test_a_new_replica_serves_what_the_others_serve(pair):
    """Also while the registry names a version that nobody can load."""
    served = pair.client.get("/v1/classes").json()["classes"][0]["model"]["version"]
    damaged = pair.release(
        "textures.brick", pair.detectors["brick"], lambda folder: (folder / "flow.safetensors").unlink()
    )
    assert event(pair).status_code == 204
    pair.wait(lambda health: f"version {damaged}" in health.get("failures", {}).get("textures.brick", ""))
    ray.kill(replicas()[0])
    deadline = time.monotonic() + 60
    while len(replicas()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    versions = {pair.post("brick", pair.image("brick")).json()["model"]["version"] for _ in range(20)}
    assert versions == {served}
    assert all("textures.brick" in pair.client.get("/readyz").json()["failures"] for _ in range(10))


def replicas():
    """The actors of the replicas that live."""
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    return [ray.get_actor(name, namespace="serve") for name in names if "#scoring#" in name]
