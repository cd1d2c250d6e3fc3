"""A configuration file for Ray Serve starts the service; what is wrong in it is said."""

import io
import time
from typing import Any

import mlflow
import pytest
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from sprue.errors import SprueError
from sprue.release.decision_store import FOLDER, DecisionStore
from sprue.serving.application import ServiceArguments, application
from sprue.serving.keys import add_key
from sprue.store import location


def wait_until_running(name: str) -> None:
    for _ in range(600):
        found = serve.status().applications.get(name)
        if found and found.status == ApplicationStatus.RUNNING:
            return
        if found and found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            break
        time.sleep(0.1)
    pytest.fail(f"{name} does not run: {found}")


def test_a_service_that_everybody_reaches_needs_keys_or_says_that_it_has_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(SprueError, match=r"everybody who reaches 0\.0\.0\.0 could score"):
        application(ServiceArguments())
    with pytest.raises(SprueError, match="the keys can't be read"):
        application(ServiceArguments(keys=tmp_path / "keys.json"))
    add_key(tmp_path / "keys.json", "line", ["score"])
    assert application(ServiceArguments(keys=tmp_path / "keys.json"))
    assert application(ServiceArguments(without_keys=True))


def test_a_service_without_a_tracking_server_says_where_to_name_it(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SprueError, match="set MLFLOW_TRACKING_URI"):
        application(ServiceArguments(without_keys=True))


@pytest.mark.parametrize("wrong", [{"keep_days": 0}, {"keep_sample": 2}, {"cache_gb": 0}, {"hosts": ["a"]}])
def test_a_wrong_argument_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ServiceArguments(**wrong)


def test_a_deployed_file_scores_and_keeps_decisions(plant) -> None:
    store = plant.folder / "deployed"
    file = {
        "applications": [
            {
                "name": "deployed",
                "route_prefix": "/deployed",
                "import_path": "sprue.serving.application:application",
                "runtime_env": {"env_vars": {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}},
                "args": {"keys": str(plant.keys), "allowed_hosts": ["scoring.plant"], "store": str(store)},
                "deployments": [{"name": "scoring", "num_replicas": 1}],
            }
        ]
    }
    # The client of the controller, as the dashboard's route for `serve deploy` uses it.
    serve.context._get_global_client().deploy_apps(ServeDeploySchema.model_validate(file))
    try:
        wait_until_running("deployed")
        buffer = io.BytesIO()
        plant.image("brick").save(buffer, "PNG")
        headers = {"Content-Type": "image/png", "Host": "scoring.plant"}
        answer = plant.client.post("/deployed/v1/classes/brick/score", content=buffer.getvalue(), headers=headers)
        assert answer.status_code == 200, answer.text
        foreign = plant.client.get("/deployed/v1/classes", headers={"Host": "evil.example"})
        assert foreign.status_code == 421
        assert plant.client.get("/deployed/v1/classes", headers={"Authorization": "Bearer no"}).status_code == 401
    finally:
        serve.delete("deployed")
    # A replica that ends writes its last decisions first.
    (decision,) = DecisionStore(location(str(store / FOLDER))).find(answer.headers["x-request-id"])
    assert decision.class_name == "brick"
