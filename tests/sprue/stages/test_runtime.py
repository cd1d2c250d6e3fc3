"""Which dataset a stage works on, and that an interrupted stage ends, whatever its libraries do."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ray

from sprue.errors import SprueError
from sprue.features.spec_file import write_spec
from sprue.inference.priority import BACKGROUND
from sprue.inference.spec import FeatureSpec
from sprue.stages.runtime import INTERRUPTED, RAY_STARTS, init_ray, read_context

ROOT = Path(__file__).parents[3]
PYTHONPATH = {"PYTHONPATH": f"{ROOT}/platform:{ROOT}/models"}
RECIPE = Path(__file__).parents[3] / "models/recipes/patchflow-cpu.yaml"

SWALLOWS = """
    import sys, time, types
    import sprue.stages.runtime
    from sprue.stages.runtime import run_stage

    sprue.stages.runtime.GRACE_S = 0.5

    def main(context):
        print("runs", flush=True)
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                {reaction}

    sys.modules["sprue.stages.fit"] = types.SimpleNamespace(main=main)
    run_stage("fit", [])
"""


def interrupted(folder, reaction):
    """What a stage says that is interrupted, and its exit status."""
    recipe = textwrap.indent(RECIPE.read_text(), "    ")
    (folder / "params.yaml").write_text(f"datasets:\n  bricks:\n{recipe}")
    script = textwrap.dedent(SWALLOWS).format(reaction=reaction)
    stage = subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert stage.stdout.readline() == "runs\n"
    stage.send_signal(signal.SIGINT)
    _, said = stage.communicate(timeout=30)
    return said, stage.returncode


def test_an_interrupted_stage_says_so_and_ends(tmp_path):
    for reaction in ("raise", "pass"):
        said, status = interrupted(tmp_path, reaction)
        assert said == "sprue fit: interrupted; the same command resumes from what is stored\n"
        assert status == INTERRUPTED


def write_params(folder, *names):
    recipe = textwrap.indent(RECIPE.read_text(), "    ")
    path = folder / "params.yaml"
    path.write_text("datasets:\n" + "".join(f"  {name}:\n{recipe}" for name in names))
    return path


def test_the_only_dataset_needs_no_name(tmp_path):
    context = read_context(write_params(tmp_path, "bricks"), None, None, None)
    assert context.dataset == "bricks"
    assert context.data.path.endswith("data/bricks") and context.folder.path.endswith("store/bricks")


def test_one_of_several_datasets_is_named(tmp_path):
    path = write_params(tmp_path, "bricks", "bolts")
    assert read_context(path, "bolts", None, None).dataset == "bolts"
    with pytest.raises(SprueError, match="has several datasets, name one with --dataset: bricks, bolts"):
        read_context(path, None, None, None)
    with pytest.raises(SprueError, match="has no dataset 'nuts': bricks, bolts"):
        read_context(path, "nuts", None, None)


def test_features_of_other_settings_are_refused(tmp_path):
    context = read_context(write_params(tmp_path, "bricks"), None, None, str(tmp_path))
    with pytest.raises(SprueError, match="run the features stage first"):
        context.feature_spec()
    features = context.settings.features
    resolved = {"weights_digest": "0" * 64, "mean": [0.5] * 3, "std": [0.5] * 3}
    context.features.mkdir(parents=True)
    spec = FeatureSpec.model_validate(features.model_dump() | resolved, strict=False)
    write_spec(context.features, spec)
    assert context.feature_spec() == spec
    other = spec.model_copy(update={"input_size": 256})
    write_spec(context.features, other)
    with pytest.raises(SprueError, match="made with other settings of `features`; run the features stage again"):
        context.feature_spec()


LISTENING = """
import os, psutil, ray
from sprue.inference.priority import in_background
from sprue.stages.runtime import connect_ray
connect_ray()
niceness = lambda: os.getpriority(os.PRIO_PROCESS, 0)
nice = ray.get([ray.remote(each).remote() for each in (niceness, in_background(niceness))])
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
found = [each for process in processes for each in process.net_connections("tcp") if each.status == "LISTEN"]
ray.shutdown()
try:
    ray.put(0)
except ray.exceptions.RaySystemError:  # no other Ray has been started for it
    print(*nice, len(found), *{each.laddr.ip.removeprefix("::ffff:") for each in found})
"""


def test_a_local_ray_listens_on_the_loopback_alone_and_no_other_follows_it(environment):
    """What runs in the background lets its other workers go first, which share the cores with all processes."""
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], env=environment | PYTHONPATH, capture_output=True, text=True
    )
    first, background, count, *addresses = done.stdout.split()
    assert (int(first), int(background)) == (os.getpriority(os.PRIO_PROCESS, 0), BACKGROUND), done.stderr
    assert int(count) > 5
    assert addresses == ["127.0.0.1"]


@pytest.mark.parametrize("failures", [RAY_STARTS - 1, RAY_STARTS])
def test_a_ray_that_is_too_slow_is_started_again(failures, monkeypatch):
    """What Ray raises then can't be brought about at will."""
    left = [Exception("The current node timed out during startup. This could happen because")] * failures

    def init(**settings):
        assert settings == {"num_cpus": 1}
        if left:
            raise left.pop()

    monkeypatch.setattr(ray, "init", init)
    if failures < RAY_STARTS:
        init_ray(num_cpus=1)
    else:
        with pytest.raises(SprueError, match="Ray has not started in 3 attempts of 30 s: this machine is busy"):
            init_ray(num_cpus=1)
    left = [ValueError("num_cpus")]
    with pytest.raises(ValueError, match="num_cpus"):
        init_ray(num_cpus=1)
