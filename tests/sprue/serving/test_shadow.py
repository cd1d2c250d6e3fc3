"""What challengers score behind the answers reaches the store, also when the replica ends."""

import asyncio
import io
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from sprue.release.decision_store import image_digests
from sprue.release.shadowing import FOLDER
from sprue.serving import responses
from sprue.serving.agreement import Entry
from sprue.serving.decision_log import DecisionLogSettings, decision_of
from sprue.serving.model_cache import ServedModel, SharedEngine, score_together
from sprue.serving.parsing import decode_inputs
from sprue.serving.shadow import Shadow, ShadowSettings
from sprue.tracking.registry import RegisteredDetector

LOAD_S = 0.5


@pytest.fixture
def image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    return file.getvalue()


def test_a_replica_that_ends_lets_challengers_finish(
    tmp_path: Path, image: bytes, tiny_detector: Any, tiny_engine: Any
) -> None:
    """Also one that is still being loaded."""
    engine = SharedEngine(tiny_engine(), 32)
    champion = ServedModel(RegisteredDetector("textures", "brick", 1, ""), tiny_detector(), engine)
    (predictions,) = score_together([(champion, decode_inputs([image], 10**6, 32))])
    answer = responses.score(champion, predictions)

    def load(found: RegisteredDetector) -> ServedModel:
        time.sleep(LOAD_S)
        return ServedModel(found, tiny_detector(seed=1), engine)

    async def offer_and_end() -> None:
        settings = ShadowSettings(1.0, DecisionLogSettings(str(tmp_path / "decisions")), 2**30, 10**6)
        shadow = Shadow(settings, load, is_busy=lambda: False)  # type: ignore[arg-type]
        challenger = RegisteredDetector("textures", "brick", 2, "")
        shadow.apply({"textures.brick": Entry(1, None, challenger=challenger)})
        for name in "abc":
            decision = decision_of(champion, answer, {"x-request-id": name}, 0.1, 1, image_digests([image]))
            shadow.offer(decision, ("",), [image])
        await shadow.close(30.0)

    asyncio.run(offer_and_end())
    rows = pd.read_parquet(tmp_path / FOLDER / "rows")
    assert sorted(rows["request_id"]) == ["a", "b", "c"]
    assert set(rows["version"]) == {2}
