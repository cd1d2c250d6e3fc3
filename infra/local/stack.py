"""The local stack: ``python infra/local/stack.py up``, ``down`` or ``status``; `make` has targets of these names.

A Ray head and two workers, SeaweedFS (S3), Postgres, MLflow, the scoring service and Prometheus, kept running by
supervisord, and a proxy with TLS in front of them. All but the proxy listen on the loopback address alone. What they
keep is in one folder, and the next start goes on with it. It needs no privileges.
"""

import argparse
import os
import subprocess
import sys
import time
import xmlrpc.client
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from certificates import ending_certificates, make_certificates
from credentials import PEOPLE, kept_secrets, make_credentials, write_client_environment
from health import Unhealthy, checks
from services import Service, all_services, make_database, write_configurations
from settings import ROOT, Settings, StackError, require_free_ports, require_programs
from supervisor.xmlrpc import SupervisorTransport

PATIENCE_S = 300
"""How long a service may take to answer; after a crash it first recovers."""
LIVES = 4
"""How often a service may be started until it answers."""


class Supervisor:
    """supervisord of a stack."""

    def __init__(self, settings: Settings) -> None:
        """Starts nothing."""
        self.settings = settings

    @property
    def rpc(self) -> Any:
        """Its interface, on a connection of its own: one that has failed can't be used again."""
        transport = SupervisorTransport(serverurl=f"unix://{self.settings.sockets}/supervisor.sock")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor

    def start(self) -> None:
        """Starts supervisord itself, without the variables that would lead services elsewhere."""
        ours = ("AWS_", "MLFLOW_", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        command = [Path(sys.executable).parent / "supervisord", "-c", self.settings.folder / "conf/supervisord.conf"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise StackError(f"supervisord does not start: {done.stderr.strip() or done.stdout.strip()}")
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_running():
            if time.monotonic() > deadline:
                raise StackError(f"supervisord does not answer; see {self.settings.folder}/log/supervisord.log")
            time.sleep(0.05)

    def is_running(self) -> bool:
        """Whether it answers."""
        try:
            return bool(self.rpc.getPID())
        except OSError:
            return False

    def states(self) -> dict[str, dict[str, Any]]:
        """What it says of each service; nothing if it does not run."""
        return {each["name"]: each for each in self.rpc.getAllProcessInfo()} if self.is_running() else {}

    def stop(self) -> None:
        """Ends it."""
        pid = int(self.rpc.getPID())
        self.rpc.shutdown()
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)


def up(settings: Settings) -> None:
    """Starts what does not run, each service when those before it answer.

    Raises:
        StackError: If a program is missing, a port is taken, or a service does not start.
    """
    require_programs()
    supervisor = Supervisor(settings)
    running = supervisor.is_running()
    if running and Settings.read(settings.folder) != settings:
        raise StackError("it runs with other addresses; stop it first with `make down`")
    settings.make_folders()
    known = kept_secrets(settings.folder)
    services = all_services(settings, known)
    if not running:
        require_free_ports(settings)
        settings.write()
        make_database(settings, known)
    make_credentials(settings, known)
    renewed = make_certificates(settings, datetime.now(UTC))
    write_client_environment(settings, known)
    if running:
        _take_certificates(supervisor, renewed)
    else:
        write_configurations(settings, services, known)
        supervisor.start()
    _start(supervisor, services, known)
    print(f"\n{settings.url}  people log in as {PEOPLE}, with the password `people` of {settings.folder}/secrets.json")
    print(f"this machine's shells:  . {settings.folder}/client.env")


def _take_certificates(supervisor: Supervisor, renewed: set[str]) -> None:
    """Lets services read their certificates: the proxy at once, the object store, if its is new, at its next start."""
    states = supervisor.states()
    for name in sorted(renewed):
        print(f"{name} has a new certificate", flush=True)
    if states["proxy"]["statename"] == "RUNNING":  # always: a call that was interrupted may have renewed it
        supervisor.rpc.signalProcess("proxy", "HUP")
    if "seaweedfs" in renewed and states["seaweedfs"]["statename"] == "RUNNING":
        supervisor.rpc.stopProcess("seaweedfs")


def _start(supervisor: Supervisor, services: list[Service], known: dict[str, str]) -> None:
    check, started = checks(supervisor.settings, known), time.monotonic()
    healthy, begun, lives = set[str](), set[str](), defaultdict[str, set[int]](set)
    while len(healthy) < len(services):
        states = supervisor.states()
        for service in services:
            if service.name in healthy or not healthy.issuperset(service.after):
                continue
            state = states[service.name]["statename"]
            if service.name not in begun and state not in ("STARTING", "RUNNING"):
                supervisor.rpc.startProcess(service.name, False)
                begun.add(service.name)
                continue
            lives[service.name].add(states[service.name]["pid"])
            words = _words(check[service.name]) if state == "RUNNING" else Unhealthy(state.lower())
            if not isinstance(words, Unhealthy):
                healthy.add(service.name)
                print(f"{time.monotonic() - started:4.0f} s  {service.name:14} {words}", flush=True)
            elif state == "FATAL" or len(lives[service.name]) > LIVES or time.monotonic() - started > PATIENCE_S:
                log = supervisor.settings.folder / "log" / f"{service.name}.log"
                raise StackError(f"{service.name}: {words}; the end of {log}:\n{log.read_text()[-2000:]}")
        time.sleep(0.3)


def _words(check: Any) -> str | Unhealthy:
    try:
        return str(check())
    except Unhealthy as error:
        return error


def down(settings: Settings) -> None:
    """Ends all services, the last first: each ends its work before what it needs is gone."""
    supervisor = Supervisor(settings)
    states = supervisor.states()
    if not states:
        print("nothing runs")
        return
    for service in reversed(all_services(settings, kept_secrets(settings.folder))):
        if states[service.name]["statename"] in ("STARTING", "RUNNING", "BACKOFF"):
            print(f"stopping {service.name}", flush=True)
            supervisor.rpc.stopProcess(service.name)
    supervisor.stop()


def status(settings: Settings) -> bool:
    """Prints a table; whether all is well."""
    known = kept_secrets(settings.folder)
    states, check, green = Supervisor(settings).states(), checks(settings, known), True
    print(f"{'service':14} {'state':9} {'up for':>9}  {'address':21}  health")
    for service in all_services(settings, known):
        state = states.get(service.name, {"statename": "STOPPED"})
        runs = state["statename"] == "RUNNING"
        words = _words(check[service.name]) if runs else Unhealthy("")
        green &= not isinstance(words, Unhealthy)
        seconds = f"{state['now'] - state['start']} s" if runs else ""
        health = f"NOT WELL: {words}" if runs and isinstance(words, Unhealthy) else words
        print(f"{service.name:14} {state['statename'].lower():9} {seconds:>9}  {service.address:21}  {health}")
    for line in ending_certificates(settings, datetime.now(UTC)):
        print(line)
    return green


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("up", "down", "status"))
    parser.add_argument("--folder", type=Path, default=ROOT / "store/stack", help="of all files (default: %(default)s)")
    parser.add_argument("--host", help="the address that the proxy listens on (default: as before, or 127.0.0.1)")
    parser.add_argument("--port", type=int, help="the proxy's (default: as before, or 8443)")
    parser.add_argument("--base", type=int, help="the first of the 70 ports behind it (default: as before, or 21000)")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    try:
        if arguments.command == "up":
            given = {name: value for name in ("host", "port", "base") if (value := getattr(arguments, name))}
            before = Settings.read(folder) if (folder / "settings.json").exists() else Settings(folder)
            up(replace(before, **given))
        elif arguments.command == "down":
            down(Settings.read(folder))
        elif not status(Settings.read(folder)):
            sys.exit(1)
    except StackError as error:
        sys.exit(f"stack: {error}")
    except KeyboardInterrupt:
        sys.exit("stack: interrupted; `make down` stops what was started")


if __name__ == "__main__":
    main()
