"""Commands on registered versions: which is champion, how that came, and what made it."""

from collections.abc import Iterable
from dataclasses import asdict
from heapq import merge
from pathlib import Path

import click

from sprue.cli.group import EXISTING_FILE, EXISTING_FOLDER, as_json, connect, main, model, show
from sprue.errors import SprueError


@main.command()
@model
@click.option("--version", default="challenger", show_default=True, help="Its number or alias.")
@click.option(
    "--images", type=EXISTING_FOLDER, help="Folder with good/ and a folder for each defect, unseen by both versions."
)
@click.option("--margin", default=0.01, show_default=True, help="How much lower its AUROC may be.")
@click.option("--latency", default=1000.0, show_default=True, metavar="MS", help="Milliseconds a sample.")
@click.option("--force", metavar="REASON", help="Promote without a test, and record why.")
@as_json
@click.pass_obj
def promote(
    store: str,
    name: str,
    version: str,
    images: Path | None,
    margin: float,
    latency: float,
    force: str | None,
    as_json: bool,
) -> None:
    """Make a version champion if it passes the test on labelled images."""
    if (images is None) == (force is None):
        raise click.UsageError("give labelled images with --images FOLDER, or promote without a test: --force REASON")
    connect(store)
    from sprue.release import promotion
    from sprue.store import location

    if images is not None:
        rules = promotion.Rules(margin, latency_s=latency / 1000)
        decision = promotion.decide(name, version, images, rules, location(store))
    else:
        assert force is not None
        decision = promotion.force(name, version, force)
    show(decision.as_json(), str(decision), as_json)
    if decision.objections:
        raise SprueError(f"version {decision.version} is not promoted: {'; '.join(decision.objections)}")


@main.command()
@model
@click.option("--reason", required=True, help="Goes into the audit log.")
@as_json
@click.pass_obj
def rollback(store: str, name: str, reason: str, as_json: bool) -> None:
    """Make the previous champion champion again."""
    connect(store)
    from sprue.release.aliases import roll_back
    from sprue.tracking.registry import find_model

    found = find_model(name)
    version = roll_back(found, reason)
    show({"model": found, "champion": version}, f"{found}: version {version} is champion again", as_json)


@main.command()
@click.argument("name", metavar="[CLASS]", required=False)
@as_json
@click.pass_obj
def audit(store: str, name: str | None, as_json: bool) -> None:
    """Print the audit log: who changed which champion, when and why; and who changed keys, reviewed, or looked."""
    connect(store)
    from sprue.release import audit_log
    from sprue.release.access_log import FOLDER as ACCESSES
    from sprue.release.access_log import Access, AccessLog
    from sprue.release.aliases import reconcile_changed
    from sprue.store import location
    from sprue.tracking.registry import find_model

    found = find_model(name) if name else None
    reconcile_changed(found)
    champions: Iterable[audit_log.Entry | Access] = audit_log.entries(found)
    accesses: Iterable[audit_log.Entry | Access] = AccessLog(location(store) / ACCESSES).entries(found)
    entries = list(merge(champions, accesses, key=lambda entry: entry.at))
    text = "\n".join(map(str, entries)) or "no champion has changed yet"
    show([entry.as_json() for entry in entries], text, as_json)


@main.command()
@click.argument("name", metavar="[CLASS]", required=False)
@click.option("--version", default="champion", show_default=True, help="Its number or alias.")
@click.option("--list", "list_images", is_flag=True, help="List the images, as CSV.")
@click.option("--image", type=EXISTING_FILE, help="Say which versions were made with this image.")
@as_json
@click.pass_obj
def lineage(store: str, name: str | None, version: str, list_images: bool, image: Path | None, as_json: bool) -> None:
    """Print what made a version: images, settings, code and machine."""
    if (name is None) == (image is None):
        raise click.UsageError("give a class, or a file with --image")
    connect(store)
    from sprue.tracking import lineage as records
    from sprue.tracking.registry import find_registered

    if image is not None:
        found, without_record = records.uses(image)
        text = "\n".join(map(str, found)) or f"no version was made with {image}"
        if without_record:
            text += f"\nwithout a record of their images: {', '.join(without_record)}"
        uses = [asdict(use) for use in found]
        show({"uses": uses, "without_record": without_record}, text, as_json)
        return
    assert name is not None
    registered = find_registered(name, version)
    if list_images:
        click.echo(records.Lineage.read(registered).images.to_csv(index=False), nl=False)
        return
    facts = records.describe(registered)
    show(facts, "\n".join(f"{heading:<10} {words}" for heading, words in facts.items()), as_json)


@main.command()
@model
@click.option("--version", default="champion", show_default=True, help="Its number or alias.")
@as_json
@click.pass_obj
def reproduce(store: str, name: str, version: str, as_json: bool) -> None:
    """Fit a version once more from its record, and compare the weights."""
    connect(store)
    from sprue.release.reproduce import reproduce as repeat
    from sprue.store import location
    from sprue.tracking.registry import find_registered

    registered = find_registered(name, version)
    found = repeat(registered, location(store), lambda epoch: click.echo(str(epoch), err=as_json))
    show(asdict(found), f"{registered}: the weights are equal, bit for bit" if found.equal else "", as_json)
    if not found.equal:
        raise SprueError(
            f"{registered}: the weights differ by up to {found.largest:.3g}; compare the commit, the packages and the "
            "machine that `sprue lineage` prints with those here"
        )
