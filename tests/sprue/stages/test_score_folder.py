"""What scoring a folder asks of a Ray job, and how it ends where samples could not be scored."""

import pytest

from sprue.errors import SprueError
from sprue.scoring.run import Summary
from sprue.stages.runtime import IN_RAY_JOB
from sprue.stages.score_folder import require_all, score_on_ray


def test_a_ray_job_needs_places_that_all_nodes_see(tmp_path, monkeypatch):
    monkeypatch.setenv(IN_RAY_JOB, "{}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SprueError) as caught:
        score_on_ray("brick", "champion", "s3://plant/images", "scores", heatmaps=False)
    assert "an s3 URL, for scores and name the registry with MLFLOW_TRACKING_URI" in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(SprueError, match=r"nothing is not a folder"):
        score_on_ray("brick", "champion", str(tmp_path / "nothing"), str(tmp_path / "scores"), heatmaps=False)


def summary(errors):
    return Summary("plant.brick", 3, "ab", "/images", "/scores/version-3/scores", 50, 0, 1, errors, [], 9.0)


def test_what_could_not_be_scored_is_a_table():
    require_all(summary({}))
    with pytest.raises(SprueError) as caught:
        require_all(summary({"a/1.png": "is damaged", "2.png": "can't be read\nat all"}))
    assert str(caught.value).splitlines() == [
        "2 of 50 samples can't be scored, the others are",
        "sample   reason",
        "a/1.png  is damaged",
        "2.png    can't be read; at all",
    ]
    with pytest.raises(SprueError) as caught:
        require_all(summary({f"{number}.png": "is damaged" for number in range(25)}))
    assert len(str(caught.value).splitlines()) == 23
    assert "and 5 more, in the column error of /scores/version-3/scores" in str(caught.value)
