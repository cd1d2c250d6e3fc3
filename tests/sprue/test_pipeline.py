"""A stage that is interrupted ends, whatever its libraries do."""

import signal
import subprocess
import sys
import textwrap

from sprue.pipeline import INTERRUPTED

SWALLOWS = """
    import sys, time
    import sprue.pipeline
    from sprue.pipeline import run_stage

    sprue.pipeline.GRACE = 0.5

    def main(context):
        print("runs", flush=True)
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                {reaction}

    run_stage("fit", main)
"""


def interrupted(folder, reaction):
    """What a stage says that is interrupted, and its exit status."""
    (folder / "params.yaml").write_text("dataset: bricks\n")
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
        assert said == "sprue fit: interrupted; the same command goes on from what is stored\n"
        assert status == INTERRUPTED
