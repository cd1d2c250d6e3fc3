"""Every stage, and scoring, as a Ray job: from a checkout to a head elsewhere, with the data and the store shared."""

import hashlib
import io
import json
import shlex
import subprocess
import time
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import s3fs
from ray.job_submission import JobSubmissionClient
from ruamel.yaml import YAML

STAGES = ("manifest", "features", "search", "fit", "evaluate", "register")
CLASS_NAME = "brick"
LEARNING_RATES = {"low": 0.0001, "high": 0.01, "log": True}


class Jobs:
    """Submits stages as ``ray job submit`` does, but in this process; keeps what they said."""

    def __init__(self, checkout, head, **environment):
        self.client = JobSubmissionClient(head.dashboard, headers=dict(head.headers))
        runtime_env = YAML(typ="safe").load(checkout.folder / "infra/ray/runtime_env.yaml")
        self.runtime_env = {**runtime_env, "working_dir": str(checkout.folder)}
        self.variables = [f"{key}={value}" for key, value in environment.items()]

    def submit(self, *entrypoint):
        """The job's status and its output."""
        job = self.client.submit_job(
            entrypoint=shlex.join(["env", *self.variables, *entrypoint]), runtime_env=dict(self.runtime_env)
        )
        while not (status := self.client.get_job_status(job)).is_terminal():
            time.sleep(0.2)
        return status, self.client.get_job_logs(job)

    def run(self, stages, data, store, params="params.yaml"):
        """Stages in their order; what each said."""
        said = {}
        for stage in stages:
            status, said[stage] = self.submit(
                "python", f"pipelines/{stage}.py", "--params", params, "--data", str(data), "--store", str(store)
            )
            assert status == "SUCCEEDED", said[stage]
        return said


@pytest.fixture
def one_class(checkout, tmp_path):
    """A folder with one class's images alone, outside of the checkout."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / CLASS_NAME).symlink_to(checkout.folder / "data/tiny" / CLASS_NAME)
    return tmp_path / "images"


def check_store(read, commit):
    """The fit is of the plan; the evaluation is complete."""
    plan, fit = json.loads(read(f"plan/{CLASS_NAME}.json")), json.loads(read(f"fits/{CLASS_NAME}/fit.json"))
    assert [fit["spec"]] == plan["fits"]
    assert fit["commit"] == commit
    assert fit["spec"]["manifest"] == hashlib.sha256(read("manifest.parquet")).hexdigest()
    assert json.loads(read(f"metrics/{CLASS_NAME}.json"))["sample_auroc"] > 0.5
    assert read(f"evaluation/{CLASS_NAME}/heatmaps.png").startswith(b"\x89PNG")


def champion(tracking_uri):
    """The registered version that is served."""
    return mlflow.MlflowClient(tracking_uri, tracking_uri).get_model_version_by_alias(f"tiny.{CLASS_NAME}", "champion")


def check_search(said, version, tracking_uri, artifacts):
    """The champion is the search's best trial, with its curves, below the search's run."""
    assert "trial  3 of 3" in said["search"]
    assert "the best of 3 trials, by synthetic defects" in said["search"]
    assert "is kept as the search fitted it" in said["fit"]
    assert "0 of 1 classes are to be fitted" in said["fit"]
    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    run = client.get_run(version.run_id)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == f"search-{CLASS_NAME}"
    assert any(path.endswith(f"{parent.info.run_id}/artifacts/search/trials.png") for path in artifacts)
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 3
    for child in children:
        epochs = [each.step for each in client.get_metric_history(child.info.run_id, "objective")]
        assert epochs in ([1], [1, 2])
        assert child.info.status == ("FINISHED" if epochs == [1, 2] else "KILLED")
    assert float(run.data.metrics["objective"]) == parent.data.metrics["objective"]


def check_scoring(jobs, bucket, remote):
    """The champion scores a folder of the bucket; a file that is no image fails the job, and loses no score."""
    remote.pipe_file(f"{bucket}/images/{CLASS_NAME}/test/cut.png", b"\x89PNG")
    command = ["python", "pipelines/score.py", f"s3://{bucket}/images/{CLASS_NAME}/test", "--class", CLASS_NAME]
    status, said = jobs.submit(*command, "--output", f"s3://{bucket}/scores")
    assert status == "FAILED"
    assert "tiny.brick version 1: 9 samples (0 stored before), 8 scored, " in said
    assert "sprue score: 1 of 9 samples can't be scored, the others are\n" in said
    assert "\ncut.png  cut.png is not an image" in said
    assert "Traceback" not in said
    parts = [path for path in remote.find(f"{bucket}/scores/version-1/scores") if path.endswith(".parquet")]
    tables = [pd.read_parquet(io.BytesIO(remote.cat_file(path)), engine="pyarrow") for path in parts]
    table = pd.concat(tables).set_index("sample")
    assert table["score"].notna().sum() == 8
    assert table["is_anomalous"][[f"spot/{number:03}.png" for number in range(4)]].sum() >= 3


def test_stages_run_as_jobs_on_a_shared_folder(checkout, ray_head, one_class, tmp_path):
    store = tmp_path / "store"
    said = Jobs(checkout, ray_head).run(("manifest", "features"), one_class, store)
    assert "38 extracted, 0 were stored already" in said["features"]
    assert (store / "tiny/manifest.parquet").is_file()
    assert (store / "tiny/features/spec.json").is_file()


def test_stages_run_as_jobs_on_an_object_store(checkout, ray_head, object_store, bucket, parameters, tmp_path):
    parameters(
        checkout.folder / "searched.yaml", {"search": {"trials": 3, "space": {"fit.learning_rate": LEARNING_RATES}}}
    )
    commit = checkout.git("rev-parse", "HEAD")
    remote = s3fs.S3FileSystem(
        endpoint_url=object_store["AWS_ENDPOINT_URL"],
        key=object_store["AWS_ACCESS_KEY_ID"],
        secret=object_store["AWS_SECRET_ACCESS_KEY"],
        use_listings_cache=False,
    )
    remote.put(str(checkout.folder / "data/tiny" / CLASS_NAME), f"{bucket}/images/", recursive=True)
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    jobs = Jobs(checkout, ray_head, SPRUE_COMMIT=commit, MLFLOW_TRACKING_URI=tracking_uri)
    said = jobs.run(STAGES, f"s3://{bucket}/images", f"s3://{bucket}/store", "searched.yaml")
    assert "38 extracted, 0 were stored already" in said["features"]
    check_store(lambda name: remote.cat_file(f"{bucket}/store/tiny/{name}"), commit)
    version = champion(tracking_uri)
    assert version.tags["sprue.commit"] == commit
    check_search(said, version, tracking_uri, remote.find(f"{bucket}/store/mlflow/artifacts"))
    check_scoring(jobs, bucket, remote)


def test_a_job_that_fails_says_why(checkout, ray_head, tmp_path):
    status, said = Jobs(checkout, ray_head).submit(
        "python", "pipelines/features.py", "--data", str(tmp_path), "--store", str(tmp_path / "store")
    )
    assert status == "FAILED"
    assert f"sprue features: there is no manifest at {tmp_path}/store/tiny/manifest.parquet; run the manifest" in said
    assert "Traceback" not in said


def test_a_job_without_a_store_is_refused(checkout, ray_head, tmp_path):
    """Submitted as a user does."""
    done = checkout.run(
        "ray", "job", "submit", "--address", ray_head.dashboard, "--submission-id", "without-store",
        "--working-dir", ".", "--runtime-env", "infra/ray/runtime_env.yaml",
        "--", "python", "pipelines/manifest.py", "--data", str(tmp_path), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert ray_head.get("api/jobs/without-store").json()["status"] == "FAILED"
    assert "sprue manifest: a Ray job runs in a copy of the checkout" in done.stdout + done.stderr


def test_a_job_runs_the_code_that_was_sent(checkout, ray_head):
    """On the driver's machine as in the workers, although the head runs elsewhere with an installed sprue."""
    program = (
        "import ray; ray.init(); where = lambda: __import__('sprue').__file__ + ' ' + __import__('platform').__file__;"
        "print('driver', where()); print('worker', ray.get(ray.remote(where).remote()))"
    )
    status, said = Jobs(checkout, ray_head).submit("python", "-c", program)
    assert status == "SUCCEEDED", said
    for line in ("driver ", "worker "):
        found = next(each for each in said.splitlines() if each.startswith(line)).split()
        assert "runtime_resources/working_dir_files" in found[1]
        assert Path(found[2]).parent == Path(subprocess.__file__).parent


def test_the_doctor_looks_at_the_cluster_and_at_each_node(checkout, ray_head):
    def doctor(*arguments, **environment):
        named = {"RAY_ADDRESS": ray_head.address, "RAY_API_SERVER_ADDRESS": ray_head.dashboard} | environment
        done = checkout.run("python", "-m", "sprue.cli", "doctor", "--json", *arguments, check=False, **named)
        return [each for each in json.loads(done.stdout) if each["subject"] in ("Ray", "nodes")]

    found = doctor("--nodes")
    assert [each["level"] for each in found] == ["OK"] * 3
    assert "asks for a token, and takes this one" in found[1]["words"]
    assert found[2]["words"] == "1 of 1 nodes have the versions that are here"
    _, refused = doctor(RAY_AUTH_TOKEN="0" * 64)
    assert refused["level"] == "FAIL" and "does not take this token: set RAY_AUTH_TOKEN" in refused["words"]
