"""The faults: each function does one, waits as long as it lasts, and takes it back."""

import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from pipeline import Pipeline
from plant import Plant

CGROUP = "sprue-faults"
WAIT_S = 120.0
"""How long to wait for the process that is to be killed, such as a worker that fits."""


class NotNowError(Exception):
    """What the fault is to hit is not there."""


@dataclass
class Site:
    """What faults are done to."""

    plant: Plant
    pipeline: Pipeline
    rng: random.Random


Fault = Callable[[Site], str]
"""Does it, and says in words to what."""


def kill_main(service: str) -> Fault:
    """Kills the process that the supervisor has started, and none of its children."""

    def fault(site: Site) -> str:
        process = site.plant.main(service)
        if process is None:
            raise NotNowError(f"{service} does not run")
        process.kill()
        return f"process {process.pid} of {service}"

    return fault


def kill_child(title: str, *services: str) -> Fault:
    """Kills a process with these words in its command line, of one of the services."""

    def fault(site: Site) -> str:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            for service in site.rng.sample(services, len(services)):
                found = site.plant.find(title, service)
                if found:
                    time.sleep(site.rng.uniform(0, 1))
                    process = site.rng.choice(found)
                    try:
                        process.kill()
                    except psutil.NoSuchProcess:
                        continue
                    return f"{title} ({process.pid}) of {service} during {site.pipeline.stage}"
            time.sleep(0.3)
        raise NotNowError(f"no {title}")

    return fault


def kill_driver(site: Site) -> str:
    """Kills the driver of the job that runs, by turns with the shell that Ray has started it in, which leaves it."""
    return kill_child(site.rng.choice(("python pipelines/", "sh -c")), "ray-head")(site)


def full_disk(site: Site) -> str:
    """Fills the disk of the stack: the object store's volumes, the database, logs and metrics are on it."""
    ballast, room = site.plant.folder / "ballast", os.statvfs(site.plant.folder)
    size = room.f_bavail * room.f_frsize
    subprocess.run(["fallocate", "-l", str(size - 8192), ballast], check=False)
    try:
        with suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:  # what is left
                file.write(bytes(4096))
        time.sleep(seconds := site.rng.uniform(15, 30))
    finally:
        ballast.unlink()
    return f"{size / 2**20:.0f} MiB filled for {seconds:.0f} s during {site.pipeline.stage}"


def s3_refuses(part: str) -> Fault:
    """S3 answers 503 to a part of the requests."""

    def fault(site: Site) -> str:
        site.plant.s3.configure(refused=part)
        time.sleep(seconds := site.rng.uniform(15, 30))
        site.plant.s3.configure()
        return f"{part} of the requests for {seconds:.0f} s during {site.pipeline.stage}"

    return fault


def s3_slow(site: Site) -> str:
    """S3 takes a request every quarter of a second, and gives 100 kB/s."""
    site.plant.s3.configure(slow=True)
    time.sleep(seconds := site.rng.uniform(20, 40))
    site.plant.s3.configure()
    return f"for {seconds:.0f} s during {site.pipeline.stage}"


def partition(site: Site) -> str:
    """Drops all packets between one worker node's processes and the object store, in a control group of their own."""
    group, service = Path("/sys/fs/cgroup/unified") / CGROUP, site.rng.choice(("ray-worker-1", "ray-worker-2"))
    group.mkdir(exist_ok=True)
    main = site.plant.main(service)
    if main is None:
        raise NotNowError(f"{service} does not run")
    moved = [main, *main.children(recursive=True)]
    for process in moved:
        try:
            (group / "cgroup.procs").write_text(str(process.pid))
        except OSError:  # it has ended
            continue
    ports = f"{site.plant.base + 71},{site.plant.base + 16}"
    rule = ["-m", "cgroup", "--path", CGROUP, "-p", "tcp", "-m", "multiport", "--dports", ports, "-j", "DROP"]
    subprocess.run(["iptables", "-A", "OUTPUT", *rule], check=True)
    try:
        time.sleep(seconds := site.rng.uniform(15, 40))
    finally:
        subprocess.run(["iptables", "-D", "OUTPUT", *rule], check=True)
        for process in (group / "cgroup.procs").read_text().split():
            try:
                (group.parent / "cgroup.procs").write_text(process)
            except OSError:
                continue
    return f"{service} for {seconds:.0f} s during {site.pipeline.stage}"


def clock_skew(site: Site) -> str:
    """The next job's driver has another clock."""
    hours = site.rng.choice((-26, -1, 1, 26))
    before = site.pipeline.job
    site.pipeline.prefix = f"env FAKETIME_DONT_FAKE_MONOTONIC=1 faketime -f {hours:+d}h"
    deadline = time.monotonic() + WAIT_S
    while site.pipeline.prefix or site.pipeline.job == before:
        if time.monotonic() > deadline:
            raise NotNowError("no job began")
        time.sleep(0.3)
    skewed, stage = site.pipeline.job, site.pipeline.stage
    while site.pipeline.job == skewed and site.pipeline.stage == stage and time.monotonic() < deadline:
        time.sleep(0.3)
    return f"{hours:+d} h for {stage}"


def restart(service: str) -> Fault:
    """Restarts a service in good order."""

    def fault(site: Site) -> str:
        site.plant.supervisorctl("restart", service)
        return f"{service} during {site.pipeline.stage}"

    return fault


WORKERS = ("ray-worker-1", "ray-worker-2")
KINDS: dict[str, Fault] = {
    "kill a Ray Train worker": kill_child("RayTrainWorker", *WORKERS),
    "kill MLflow": kill_main("mlflow"),
    "S3 answers 503": s3_refuses("100%"),
    "kill the job's driver": kill_driver,
    "kill SeaweedFS": kill_main("seaweedfs"),
    "full disk": full_disk,
    "kill a scoring replica": kill_child("ray::ServeReplica", *WORKERS),
    "kill Postgres": kill_main("postgres"),
    "partition of a worker and the store": partition,
    "kill nginx": kill_main("proxy"),
    "clock skew of a job": clock_skew,
    "kill Ray Serve's proxy": kill_child("ray::ProxyActor", "ray-head", *WORKERS),
    "kill a worker node's raylet": kill_child("raylet/raylet", *WORKERS),
    "S3 is slow": s3_slow,
    "kill Ray Serve's controller": kill_child("ray::ServeController", "ray-head", *WORKERS),
    "restart Postgres": restart("postgres"),
    "S3 answers 503 to half": s3_refuses("50%"),
    "kill a process of MLflow": kill_child("mlflow", "mlflow"),
    "kill a process of Postgres": kill_child("postgres: ", "postgres"),
    "kill Prometheus": kill_main("prometheus"),
    "kill Ray's head (GCS)": kill_child("gcs_server", "ray-head"),
    "kill `sprue serve`": kill_main("scoring"),
}
