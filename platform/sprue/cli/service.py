"""Commands of the scoring service and its keys."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from sprue.cli.group import EXISTING_FILE, FOLDER, connect, log_access, main

WATCH_S = 10.0
"""Seconds between two looks whether Ray Serve is still there."""

keys_file = click.option(
    "--keys", "file", type=FOLDER, default="keys.json", show_default=True, help="The file; made if it is missing."
)
SCOPE = (
    "What it may do: score images and list classes; see past decisions and review them; see what is wrong with the "
    "service. May be repeated."
)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.option("--keys", type=EXISTING_FILE, help="File of the keys that requests need; see `sprue keys`.")
@click.option("--without-keys", is_flag=True, help="Serve everybody who reaches an address other than the loopback's.")
@click.option("--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Another name of the service.")
@click.option("--tls-cert", type=FOLDER, metavar="FILE", help="Speak TLS under this certificate, with its chain (PEM).")
@click.option("--tls-key", type=FOLDER, metavar="FILE", help="The certificate's private key (PEM).")
@click.option(
    "--rate", metavar="N/s", help="Requests of a key without a rate of its own, or of an address where there are no "
    "keys, such as 20/s or 100/min.  [default: no limit]",
)  # fmt: skip
@click.option("--no-decisions", is_flag=True, help="Keep no decisions in the store.")
@click.option(
    "--keep-days", type=click.IntRange(1, 36_500), default=90, show_default=True, help="Of decisions and images."
)
@click.option(
    "--keep-images", type=click.FloatRange(0), default=20.0, show_default=True, metavar="GB", help="Size of all images."
)
@click.option(
    "--keep-sample", type=click.FloatRange(0, 1), default=0.01, show_default=True, metavar="FRACTION",
    help="Of the images that are neither alarms nor near the threshold.",
)  # fmt: skip
@click.option(
    "--shadow", type=click.FloatRange(0, 1), default=0.0, show_default=True, metavar="FRACTION",
    help="Of the samples, scored by challengers too, behind the answers; `sprue promote` reads it.",
)  # fmt: skip
@click.option(
    "--cache-gb",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Memory of the classes that a replica has loaded, in GiB.",
)
@click.option("--allow-empty", is_flag=True, help="Start without a champion; the first is served when it is there.")
@click.option(
    "--webhook-secret", type=EXISTING_FILE, metavar="FILE", help="Take MLflow's webhooks, signed with the secret in "
    "this file; see `sprue webhook`.",
)  # fmt: skip
@click.option("--pin", "pinned", multiple=True, metavar="CLASS", help="Load this class at the start, and keep it.")
@click.pass_obj
def serve(
    store: str,
    host: str,
    port: int,
    keys: Path | None,
    without_keys: bool,
    allowed_hosts: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    rate: str | None,
    no_decisions: bool,
    keep_days: int,
    keep_images: float,
    keep_sample: float,
    shadow: float,
    cache_gb: float,
    allow_empty: bool,
    webhook_secret: Path | None,
    pinned: tuple[str, ...],
) -> None:
    """Serve the champions over HTTP until interrupted."""
    if keys and without_keys:
        raise click.UsageError("give --keys FILE or --without-keys, not both")
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("give both --tls-cert FILE and --tls-key FILE")
    if shadow and no_decisions:
        raise click.UsageError("--shadow keeps what challengers decide: give it without --no-decisions")
    from sprue.serving.certificates import Certificate
    from sprue.serving.rates import Rate

    # Before what takes seconds to import.
    certificate = Certificate.read(tls_cert, tls_key) if tls_cert and tls_key else None
    limit = Rate.of(rate) if rate else None
    from sprue.release.access_log import FOLDER as ACCESSES
    from sprue.release.decision_store import FOLDER as DECISIONS
    from sprue.serving.champions import CacheSettings
    from sprue.serving.decision_log import DecisionLogSettings
    from sprue.serving.launch import ServeSettings, require_free_port, require_keys, serve_champions, stop_serving
    from sprue.stages.runtime import connect_ray
    from sprue.store import location

    folder = str(location(store) / DECISIONS)
    decisions = None if no_decisions else DecisionLogSettings(folder, keep_days, round(1e9 * keep_images), keep_sample)
    require_keys(host, keys, without_keys)
    if "RAY_ADDRESS" not in os.environ:  # else a service may run there, which outlives the command that started it
        require_free_port(host, port)
    connect(store)
    connect_ray()
    cache = CacheSettings(int(cache_gb * 2**30), pinned)
    settings = ServeSettings(
        host,
        port,
        cache=cache,
        keys=keys,
        without_keys=without_keys,
        allowed_hosts=allowed_hosts,
        decisions=decisions,
        shadow=shadow,
        allow_empty=allow_empty,
        certificate=certificate,
        rate=limit,
        access_log=str(location(store) / ACCESSES),
        webhook_secret=webhook_secret,
    )
    url = serve_champions(settings)
    click.echo(f"scoring at {url}  (its interface: {url}/docs; stop it with Ctrl-C)")
    sys.stdout.flush()
    _watch_until_interrupted()
    stop_serving()


def _watch_until_interrupted() -> None:
    """Raises SprueError if the service is lost with its cluster."""
    from sprue.serving.launch import require_serving

    ended = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: ended.set())
    while not ended.wait(WATCH_S):
        require_serving()


@main.command()
@click.argument("url")
@click.option(
    "--secret", "file", type=EXISTING_FILE, required=True, metavar="FILE", help="The file of `sprue serve "
    "--webhook-secret`.",
)  # fmt: skip
@click.pass_obj
def webhook(store: str, url: str, file: Path) -> None:
    """Let the tracking server tell the service at URL at once when a champion changes."""
    from sprue.tracking.webhook import read_secret, register_webhook

    secret = read_secret(file)
    connect(store)
    click.echo(f"the tracking server tells {register_webhook(url, secret)}")


@main.group()
def keys() -> None:
    """Make and revoke the keys of the service; a service that runs follows the file."""


@keys.command("add")
@click.argument("name")
@click.option(
    "--scope", "scopes", type=click.Choice(["score", "review", "admin"]), multiple=True, required=True, help=SCOPE
)
@click.option("--rate", metavar="N/s", help="Requests it may make, such as 20/s.  [default: that of the service]")
@keys_file
@click.pass_obj
def add_key(store: str, name: str, scopes: tuple[Any, ...], rate: str | None, file: Path) -> None:
    """Make a key and print it, this once; the file keeps its hash."""
    from sprue.serving.keys import add_key as add

    key = add(file, name, scopes, rate)
    what = f"{name} in {file.resolve()}, for {', '.join(scopes)}"
    click.echo(key)  # first: the store may fail, and nobody could read the key again
    log_access(store, "key added", f"{what}, {rate}" if rate else what)


@keys.command("remove")
@click.argument("name")
@keys_file
@click.pass_obj
def remove_key(store: str, name: str, file: Path) -> None:
    """Revoke a key."""
    from sprue.serving.keys import remove_key as remove

    remove(file, name)
    log_access(store, "key removed", f"{name} in {file.resolve()}")
