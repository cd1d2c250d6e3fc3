"""Decisions are recorded, replayed, rechecked and counted, on a real Ray Serve."""

import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner

from sprue.cli import main
from sprue.errors import SprueError
from sprue.release.decision_store import FOLDER, rows_of
from sprue.release.replay import replay
from sprue.serving.decision_log import why_kept
from sprue.serving.launch import stop_serving
from sprue.serving.metrics import label
from sprue.tracking import registry


def test_a_decision_is_a_row_and_the_images_of_alarms_are_kept(plant: Any) -> None:
    image = plant.defective("brick")
    names = {"X-Request-Id": "line-7:4711", "X-Station": "line-7"}
    answer = plant.post("brick", image, headers=names, params={"heatmap": "true"})
    body, found = answer.json(), plant.decision(answer)
    assert (found.request_id, found.station, found.kept) == ("line-7:4711", "line-7", "alarm")
    for name in ("dataset", "class_name", "score", "p_value", "alpha", "threshold", "is_anomalous"):
        assert getattr(found, name) == body[name], name
    assert found.version == body["model"]["version"] and found.batch == 1
    assert abs(time.time() - found.at.timestamp()) < 60 and 0 < found.latency_s < 30
    assert found.images == (hashlib.sha256(plant.png(image)).hexdigest(),)
    assert plant.decisions.read_images(found) == [plant.png(image)]
    folder = plant.folder / "digests"
    plant.detectors["brick"].save(folder)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert dict(each.split(":") for each in found.files) == digests

    others = [plant.post("gräs 2", plant.image("gräs 2", seed)) for seed in range(6)]
    found = [plant.decision(answer) for answer in others]
    assert {len(answer.headers["x-request-id"]) for answer in others} == {36} and {each.station for each in found} == {
        ""
    }
    assert [each.score for each in found] == [answer.json()["score"] for answer in others]
    assert [each.kept for each in found] == [why_kept(each, 0.5) for each in found]
    assert "" in {each.kept for each in found}


@pytest.mark.parametrize("name", ["line 7", "x" * 129, "line\t7"])
def test_a_station_is_fit_for_a_table(plant: Any, name: str) -> None:
    answer = plant.post("brick", plant.image("brick"), headers={"X-Station": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_station")


def test_an_alarm_is_replayed(plant: Any) -> None:
    images = [plant.defective("brick", seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:  # so that some are scored together
        answers = list(pool.map(lambda image: plant.post("brick", image), images))
    found = [decision for decision in map(plant.decision, answers) if decision.kept]
    assert len(found) > 1
    for recorded in found:
        repeated = replay(plant.decisions, recorded.request_id)
        assert repeated.decision == recorded and repeated.equal and repeated.engine == recorded.engine
        assert repeated.score == pytest.approx(recorded.score, rel=1e-4)

    def run(request_id: str) -> Any:
        command = ["--store", str(plant.folder / "store"), "replay", request_id, "--json"]
        environment = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
        return CliRunner().invoke(main, command, prog_name="sprue", env=environment, catch_exceptions=False)

    recorded = found[0]
    done = run(recorded.request_id)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["equal"] and json.loads(done.output)["decision"]["score"] == recorded.score

    # A row that says something else than the detector is found out; it is the last with this identifier.
    altered = replace(recorded, score=recorded.score * 1.01, at=datetime.now(UTC))
    plant.decisions.write_part(altered.at.date(), "altered", rows_of([altered]))
    done = run(recorded.request_id)
    assert done.exit_code == 1 and "the result differs from the recorded one" in done.output
    assert '"equal": false' in done.output and '"same_id": 2' in done.output

    # So are a version with other files, one that is gone, and an image that was not kept.
    others = [
        (replace(altered, request_id="files", files=("flow.safetensors:ab",)), "has other files now than those"),
        (replace(altered, request_id="version", version=999), "has no version '999'"),
        (replace(altered, request_id="kept", kept=""), "the images of kept were not kept"),
    ]
    plant.decisions.write_part(altered.at.date(), "others", rows_of([each for each, _ in others]))
    for each, words in others:
        done = run(each.request_id)
        assert done.exit_code == 1 and words in done.output


def test_champions_are_checked_again(plant: Any) -> None:
    def run() -> Any:
        command = ["--store", str(plant.folder / "store"), "recheck", "gräs 2", "--json"]
        environment = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
        done = CliRunner().invoke(main, command, prog_name="sprue", env=environment, catch_exceptions=False)
        (found,) = json.loads(done.stdout)
        return done, found

    answers = (plant.post("gräs 2", plant.image("gräs 2", seed)) for seed in range(100, 150))
    recorded = next(each for each in map(plant.decision, answers) if each.kept)
    done, found = run()
    assert done.exit_code == 0, done.output
    assert found["samples"] >= 1 and found["chance"] > 0.001
    assert found["replayed"] >= 1 and found["findings"] == []

    # More alarms than good samples can have, and a score that the detector does not give.
    now = datetime.now(UTC)
    alarm = replace(recorded, request_id="alarm", kept="", at=now, is_anomalous=True)
    alarms = [alarm] * (40 + 10 * found["samples"])
    other = replace(recorded, request_id="other", score=recorded.score * 1.01, at=now)
    plant.decisions.write_part(now.date(), "recheck", rows_of([*alarms, other]))
    done, found = run()
    assert done.exit_code == 1 and "1 of 1 champions need a look: textures.gräs 2" in done.output
    many, one = found["findings"]
    assert "of the samples are alarms; among good ones alone, the chance of as many is" in many
    assert one.startswith("other of ") and f"and had {other.score!r}" in one
    (plant.decisions.folder / "rows" / f"date={now.date()}" / "recheck.parquet").unlink()


def test_a_store_that_takes_no_decisions_is_named(plant: Any) -> None:
    rows = plant.folder / "store" / FOLDER / "rows"
    plant.decision(plant.post("brick", plant.image("brick")))
    aside = rows.rename(rows.with_name("aside"))
    try:
        rows.write_text("a file where a folder has to be")
        answer = plant.post("brick", plant.image("brick"))
        assert answer.status_code == 200
        assert plant.wait(lambda health: "decisions_error" in health)["status"] == "degraded"
    finally:
        rows.unlink()
        aside.rename(rows)
    plant.wait(lambda health: health["status"] == "ready")
    assert plant.decision(answer).score == answer.json()["score"]


def test_a_request_that_is_refused_is_no_decision(plant: Any) -> None:
    answer = plant.client.post("/v1/classes/brick/score", content=b"text", headers={"X-Request-Id": "refused"})
    assert answer.status_code == 415
    plant.decision(plant.post("brick", plant.image("brick")))  # later ones are there
    with pytest.raises(SprueError, match="has no decision 'refused'"):
        plant.decisions.find("refused")


def values(query: Any, expression: str, by: str = "") -> dict[str, float]:
    """A query's values, by a label; by all labels without one."""
    found = query(expression)
    return {each["metric"].get(by) or str(each["metric"]): float(each["value"][1]) for each in found}


COUNTS = {
    "answers": 'ray_sprue_requests_total{route="score", status="200"}',
    "decisions": "ray_sprue_decisions_total",
    "alarms": 'ray_sprue_decisions_total{decision="anomalous"}',
    "scores": "ray_sprue_relative_score_count",
    "above": 'ray_sprue_relative_score_count - ignoring(le) ray_sprue_relative_score_bucket{le="1.0"}',
    "p-values": "ray_sprue_p_value_count",
    "hits": 'ray_sprue_model_cache_total{outcome="hit"}',
    "unknown": 'ray_sprue_refusals_total{code="unknown_class"}',
}


def test_prometheus_has_what_every_panel_of_the_board_shows(plant: Any, prometheus: Any, panels: Any) -> None:
    alarm, fine = plant.defective("brick"), plant.image("gräs 2")
    left = {query: title for title, queries in panels("serving.json", "30s").items() for query in queries}
    assert len(left) > 15
    deadline = time.monotonic() + 240
    while left and time.monotonic() < deadline:
        plant.post("brick", alarm, params={"heatmap": "true"})
        plant.post("gräs 2", fine)
        plant.post("bolt", fine)  # an unknown class
        time.sleep(0.5)
        for query in list(left):
            # Models without a request have no quantiles.
            if any(map(math.isfinite, values(prometheus, query).values())):
                del left[query]
    assert not left

    # What is shown is what has happened.
    def settled() -> dict[str, dict[str, float]]:
        """The counts by series, once scrapes that all succeeded have found the same."""
        counts, last, scraped = {}, None, 0.0
        while counts != last or not scraped:
            time.sleep(6)
            last, counts = counts, {name: values(prometheus, query) for name, query in COUNTS.items()}
            scraped = min(values(prometheus, "min_over_time(up[10s])").values(), default=0.0)
        return counts

    before = settled()
    for image, name in [(alarm, "brick")] * 3 + [(fine, "gräs 2")] * 7 + [(fine, "bolt")]:
        plant.post(name, image)
    after = settled()
    # A series of a worker that has ended may be gone.
    grown = {name: sum(after[name][each] - before[name].get(each, 0.0) for each in after[name]) for name in COUNTS}
    assert grown == {
        "answers": 10,
        "decisions": 10,
        "alarms": 3,
        "scores": 10,
        "above": 3,
        "p-values": 10,
        "hits": 10,
        "unknown": 1,
    }
    assert values(prometheus, "max by (model) (ray_sprue_alpha)", "model")["textures.brick"] == 0.05
    served = {
        label(each["model"]["name"]): each["model"]["version"]
        for each in plant.client.get("/v1/classes").json()["classes"]
    }
    assert values(prometheus, "max by (model) (ray_sprue_champion_version)", "model").items() >= served.items()

    # A swap is seen.
    plant.release("textures.brick", plant.detectors["brick"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        swaps = values(prometheus, "sum by (model) (changes(ray_sprue_champion_version[1m]))", "model")
        if swaps.get("textures.brick"):
            break
        time.sleep(0.5)
    assert swaps["textures.brick"] == 1
    mlflow.MlflowClient().set_registered_model_alias("textures.brick", registry.CHAMPION, str(served["textures.brick"]))
    plant.wait(lambda _: plant.post("brick", alarm).json()["model"]["version"] == served["textures.brick"])


def test_the_last_decisions_are_written_when_the_service_stops(plant: Any) -> None:
    answer = plant.post("brick", plant.image("brick"))
    assert answer.status_code == 200, answer.text
    stop_serving()
    assert plant.decisions.find(answer.headers["x-request-id"])[0].score == answer.json()["score"]
