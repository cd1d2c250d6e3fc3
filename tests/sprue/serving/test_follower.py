"""The service follows the champions of the registry, on a real Ray Serve."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest

from sprue.tracking import registry


def without_flow(folder: Path) -> None:
    (folder / "flow.safetensors").unlink()


def with_higher_scores(folder: Path) -> None:
    """As if good parts scored higher, so that defects pass."""
    file = folder / "detector.json"
    saved = json.loads(file.read_text())
    saved["calibration"]["scores"] = [score + 10 for score in saved["calibration"]["scores"]]
    file.write_text(json.dumps(saved))


def test_a_champion_whose_files_were_changed_is_refused(plant: Any) -> None:
    image = plant.defective("brick")
    before = plant.post("brick", image).json()
    assert before["is_anomalous"]

    def require_the_old_one() -> None:
        answer = plant.post("brick", image).json()
        assert answer["is_anomalous"] and answer["model"] == before["model"]

    version = plant.release("textures.brick", plant.detectors["brick"], damage=with_higher_scores)
    reason = plant.wait(lambda health: health["status"] == "degraded")["failures"]["textures.brick"]
    assert f"the files of textures.brick version {version} are not those that were registered: detector.json" in reason
    require_the_old_one()

    # Nor is one that was registered without digests.
    source = plant.folder / "models" / "by-hand"
    plant.detectors["brick"].save(source / "artifacts" / "detector")
    client = mlflow.MlflowClient()
    by_hand = client.create_model_version("textures.brick", str(source), run_id=None).version
    client.set_registered_model_alias("textures.brick", registry.CHAMPION, by_hand)
    plant.wait(lambda health: "has no digests" in health["failures"].get("textures.brick", ""))
    require_the_old_one()

    client.set_registered_model_alias("textures.brick", registry.CHAMPION, str(before["model"]["version"]))
    plant.wait(lambda health: health["status"] == "ready")


def test_champions_are_followed(plant: Any) -> None:
    brick = plant.detectors["brick"]
    image = plant.image("brick")

    # A champion that can't be loaded is reported, and the previous one is kept.
    damaged = plant.release("textures.brick", brick, damage=without_flow)
    health = plant.wait(lambda each: each["status"] == "degraded")
    assert f"brick version {damaged}" in health["failures"]["textures.brick"]
    assert plant.post("brick", image).json()["model"]["version"] == 1

    # One that can be loaded replaces it without a refused request.
    version = plant.release("textures.brick", plant.detectors["gräs 2"])
    seen = []
    while version not in seen:
        seen.append(plant.post("brick", image).raise_for_status().json()["model"]["version"])
        assert len(seen) < 1000
    assert plant.wait(lambda each: each["status"] == "ready")["failures"] == {}
    expected = plant.detectors["gräs 2"].predict([image], plant.engine).score_B[0]
    assert plant.post("brick", image).json()["score"] == pytest.approx(float(expected), rel=1e-4)

    # A class of which nothing can be loaded is unavailable, not unknown.
    plant.release("parts.bolt", brick, damage=without_flow)
    plant.wait(lambda each: "parts.bolt" in each["failures"])
    answer = plant.post("bolt", image)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "class_unavailable")

    # A new class needs no restart.
    plant.release("parts.bolt", brick)
    assert plant.wait(lambda each: each["classes"] == 3)["engines"] == 1
    answer = plant.post("bolt", image)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["version"] == 2

    # A registry that has lost its champions, all at once, is reported, and the old ones are kept.
    file = mlflow.get_registry_uri().removeprefix("sqlite:///")
    with closing(sqlite3.connect(file, timeout=60)) as database, database:
        database.execute("DELETE FROM registered_model_aliases WHERE alias = ?", [registry.CHAMPION])
    plant.wait(lambda each: "no champion" in each.get("registry_error", ""))
    answer = plant.post("brick", image)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["version"] == version
