"""Commands on what the service has decided, and what people say of it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from sprue.cli.group import FOLDER, as_json, connect, log_access, main, model, show
from sprue.errors import SprueError


@main.command()
@click.argument("request_id", metavar="ID")
@as_json
@click.pass_obj
def replay(store: str, request_id: str, as_json: bool) -> None:
    """Score a kept image again with the version that decided, and compare.

    ID is an answer's X-Request-Id.
    """
    connect(store)
    from sprue.release.decision_store import FOLDER as DECISIONS
    from sprue.release.decision_store import DecisionStore
    from sprue.release.replay import replay as repeat
    from sprue.store import location

    found = repeat(DecisionStore(location(store) / DECISIONS), request_id)
    show(found.as_json(), str(found), as_json)
    if not found.equal:
        raise SprueError(f"{request_id}: the result differs from the recorded one")


@main.command()
@click.argument("name", metavar="[CLASS]", required=False)
@click.option("--days", type=click.IntRange(1), default=1, show_default=True, help="Whose decisions are looked at.")
@click.option(
    "--replays", type=click.IntRange(0), default=3, show_default=True,
    help="Of the newest kept samples of each class that are scored again.",
)  # fmt: skip
@as_json
@click.pass_obj
def recheck(store: str, name: str | None, days: int, replays: int, as_json: bool) -> None:
    """Check the champions again, all or that of a CLASS: their files, their decisions, their alarms.

    Meant for each night; exit status 1 where there is something to look at.
    """
    connect(store)
    from sprue.release.decision_store import FOLDER as DECISIONS
    from sprue.release.decision_store import DecisionStore
    from sprue.release.recheck import recheck as check
    from sprue.store import location
    from sprue.tracking.registry import CHAMPION, champions, find_registered

    chosen = [find_registered(name, CHAMPION)] if name else champions()
    first = datetime.now(UTC).date() - timedelta(days)
    found = []
    for each in check(chosen, DecisionStore(location(store) / DECISIONS), first, replays):
        found.append(each)
        click.echo(each, err=as_json)
    if as_json:
        click.echo(json.dumps([each.as_json() for each in found], indent=2))
    if wrong := [each.model_name for each in found if each.findings]:
        raise SprueError(f"{len(wrong)} of {len(found)} champions need a look: {', '.join(wrong)}")


@main.group()
def reviews() -> None:
    """Use the verdicts that people gave on the inspection page."""


@reviews.command("export")
@model
@click.argument("folder", type=FOLDER)
@click.option(
    "--as", "kind", type=click.Choice(["promotion", "training"]), default="promotion", show_default=True,
    help="good/ and defective/ for `sprue promote --images`, or images for CLASS/train/good.",
)  # fmt: skip
@as_json
@click.pass_obj
def export_reviews(store: str, name: str, folder: Path, kind: Any, as_json: bool) -> None:
    """Write the reviewed images of a CLASS into a FOLDER, which is then put under DVC or given to `sprue promote`."""
    connect(store)
    from sprue.release.decision_store import FOLDER as DECISIONS
    from sprue.release.reviews import ReviewStore, export
    from sprue.store import location
    from sprue.tracking.registry import find_model

    model_name = find_model(name)
    found = export(ReviewStore(location(store) / DECISIONS), model_name, folder, kind)
    log_access(store, "exported", f"reviews as {kind} to {folder.resolve()}", model_name)
    text = f"{folder}: {', '.join(f'{count} {label}' for label, count in found.items())}"
    show({"folder": str(folder), "samples": found}, text, as_json)
