"""The pipeline of a few quick classes, run on the stack as Ray jobs in a loop, each round with another seed."""

import re
import shlex
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import requests
from PIL import Image, ImageDraw
from plant import ROOT, Plant
from ray.job_submission import JobSubmissionClient
from ruamel.yaml import YAML
from skimage import data

DATASET, CLASSES, EPOCHS = "faults", ("brick", "gravel"), 12
STAGES = ("search", "fit", "evaluate", "register")
SETTINGS = {
    "manifest": {"calibration": 0.2, "validation": 0.1},
    "features": {"blocks": [2, 3], "scales": [1.0], "input_size": 128},
    "flow": {"adapted": 32, "bottleneck": 16, "steps": 2},
    "fit": {"epochs": EPOCHS, "batch_size": 4},
    "search": {"trials": 0},
    "calibration": {"alpha": 0.2},
}
EPOCH = re.compile(r"^(\S+) +epoch +(\d+) ")
GONE_S = 40.0
"""After which a job that the cluster does not know is submitted again: its head has died, and its jobs with it."""


def write_images(folder: Path) -> None:
    """Crops of photographs; those of a folder ``spot`` with a white spot."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        photograph = getattr(data, name)()
        for place, count in {"train/good": 30, "test/good": 4, "test/spot": 4}.items():
            (folder / name / place).mkdir(parents=True)
            for number in range(count):
                top, left = rng.integers(0, photograph.shape[0] - 96, 2)
                image = Image.fromarray(photograph[top : top + 96, left : left + 96])
                if place.endswith("spot"):
                    ImageDraw.Draw(image).ellipse((30, 30, 50, 50), fill=255)
                image.save(folder / name / place / f"{number:03}.png")


@dataclass
class Round:
    """One pass through the stages.

    Attributes:
        number: From 0; the seed of its fits.
        epochs: How often each epoch of each class was reported, over all attempts.
        failed: Jobs that ended without success, and were submitted again: their stage, and the end of their log.
    """

    number: int
    epochs: Counter[tuple[str, int]] = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def repeated(self) -> int:
        """Epochs that had been reported, so that their checkpoint was stored, and yet were done again."""
        return sum(count - 1 for count in self.epochs.values())


class Pipeline(threading.Thread):
    """Runs round after round until it is stopped; a job that fails is submitted again, as a user does."""

    def __init__(self, plant: Plant, folder: Path, first: int) -> None:
        super().__init__(daemon=True, name="pipeline")
        self.plant, self.folder, self.stage, self.job = plant, folder, "", ""
        self.round, self.done, self.stopped = Round(first), list[Round](), threading.Event()
        self.failed: list[tuple[str, str]] = []
        self.prefix = ""  # of the next job's command, for the clock

    def run(self) -> None:
        """The loop."""
        for stage in ("manifest", "features"):
            self._until_done(stage)
        while not self.stopped.is_set():
            for stage in STAGES:
                self._until_done(stage)
                if self.stopped.is_set():
                    return
            self._promote()
            self.done.append(self.round)
            self.round = Round(self.round.number + 1)

    def _until_done(self, stage: str) -> None:
        """Submits a stage until it succeeds."""
        self.stage = stage
        while not self.stopped.is_set():
            status, log = self._attempt(stage)
            if stage == "fit":
                found = (EPOCH.match(line) for line in log.splitlines())
                self.round.epochs.update((each[1], int(each[2])) for each in found if each)
            if status == "SUCCEEDED":
                return
            words = " | ".join(log.strip().splitlines()[-3:])[-600:]
            self.round.failed.append((stage, f"{status}: {words}"))
            self.failed.append((stage, f"{status}: {words}"))
            time.sleep(3)

    def _attempt(self, stage: str) -> tuple[str, str]:
        """Runs a stage as a job: how it ended, and its log."""
        settings = YAML(typ="safe").load(ROOT / "models/recipes/patchflow-cpu.yaml")
        for section, values in SETTINGS.items():
            settings.setdefault(section, {}).update(values)
        settings["fit"]["seed"] = self.round.number
        params = self.folder / f"params-{self.round.number}.yaml"
        YAML().dump({"datasets": {DATASET: settings}}, params)
        command = [
            *shlex.split(self.prefix), "python", f"pipelines/{stage}.py", "--params", str(params), "--data",
            str(self.folder / "data"), "--store", "s3://sprue/store",
        ]  # fmt: skip
        self.prefix = ""
        runtime_env = YAML(typ="safe").load(ROOT / "infra/ray/runtime_env.yaml") | {"working_dir": str(ROOT)}
        runtime_env["excludes"] += ["/docs", "/tests", "/dist"]
        try:
            jobs = self._client()
            self.job = jobs.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
        except (OSError, RuntimeError, requests.RequestException) as error:
            return "REFUSED", str(error)
        seen, status = time.monotonic(), "PENDING"
        while not self.stopped.is_set():
            try:
                found = jobs.get_job_status(self.job)
                seen, status = time.monotonic(), str(found.value)
                if found.is_terminal():
                    break
            except (OSError, RuntimeError, requests.RequestException) as error:
                status = f"GONE ({error})"
                if time.monotonic() - seen > GONE_S:
                    break
            time.sleep(0.5)
        return status, self._log()

    def _client(self) -> JobSubmissionClient:
        token = {"Authorization": f"Bearer {self.plant.secret('ray')}"}
        return JobSubmissionClient(f"{self.plant.url}/ray", headers=token, verify=self.plant.client["SPRUE_CA"])

    def _log(self) -> str:
        """The job's, from the file: a head that has died is not asked."""
        found = [*(self.plant.sockets / "ray").glob(f"session_2*/logs/job-driver-{self.job}.log")]
        return found[0].read_text() if found else ""

    def _promote(self) -> None:
        """Makes the newest version of a class champion, of each by turns, as a person does who is sure."""
        model = f"{DATASET}.{CLASSES[self.round.number % len(CLASSES)]}"
        command = ["sprue", "--store", "s3://sprue/store", "promote", model, "--version", "challenger"]
        for _ in range(20):
            done = self.plant.shell(*command, "--force", f"round {self.round.number}")
            # Without a challenger, the newest is champion already.
            if done.returncode == 0 or "has no version" in done.stderr or self.stopped.is_set():
                return
            self.failed.append(("promote", done.stderr.strip()[-300:]))
            time.sleep(3)
