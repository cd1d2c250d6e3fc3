"""Commands of a platform engineer: back up, restore, move, and see what is wrong."""

import logging
from dataclasses import asdict
from pathlib import Path

import click

from sprue.cli.group import FOLDER, as_json, main, show


def _show_progress() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("sprue").setLevel(logging.INFO)


@main.command()
@click.argument("archive")
@click.option("--without-registry", is_flag=True, help="Back up the store alone; the registry's server is not.")
@as_json
@click.pass_obj
def backup(store: str, archive: str, without_registry: bool, as_json: bool) -> None:
    """Back up the store, its registry and the audit log into an ARCHIVE, while jobs and the service run.

    ARCHIVE is a folder or s3 URL. It keeps equal files once, so that a second backup copies what is new. Images under
    DVC have a remote of their own.
    """
    from sprue.operations.archive import Archive
    from sprue.operations.backup import back_up
    from sprue.store import location

    _show_progress()
    summary = back_up(location(store), Archive(location(archive)), not without_registry)
    show(asdict(summary), str(summary), as_json)


@main.command()
@click.argument("archive")
@click.option("--to", "target", required=True, metavar="FOLDER", help="The new store; a folder that is empty or new.")
@click.option("--backup", "name", help="Its name.  [default: the newest]")
@as_json
def restore(archive: str, target: str, name: str | None, as_json: bool) -> None:
    """Restore a backup from an ARCHIVE to a new folder, and check it."""
    from sprue.operations.archive import Archive
    from sprue.operations.restore import restore as put_back
    from sprue.store import location

    _show_progress()
    summary = put_back(Archive(location(archive)), location(target), name)
    show(asdict(summary), str(summary), as_json)


@main.command()
@click.pass_obj
def relocate(store: str) -> None:
    """Tell the registry of a store that was moved or copied where its files are now."""
    from sprue.operations.backup import registry_file
    from sprue.store import location
    from sprue.tracking.locations import adopt

    folder = location(store)
    changed = adopt(registry_file(folder), folder)
    click.echo(f"{folder}: {changed} locations changed" if changed else f"{folder}: nothing was left behind")


@main.command()
@click.option("--keys", type=FOLDER, default="keys.json", show_default=True, help="The service's file of keys.")
@click.option("--nodes", is_flag=True, help="Ask each node of the Ray cluster, too, which takes some seconds more.")
@as_json
@click.pass_context
def doctor(context: click.Context, keys: Path, nodes: bool, as_json: bool) -> None:
    """Say what is installed, reachable, writable, too old or exposed, and what to do about it.

    Exit status 1 says that something fails.
    """
    from sprue.operations.doctor import examine
    from sprue.store import location

    logging.getLogger().setLevel(logging.ERROR)
    findings = examine(location(context.obj), keys)
    if nodes:
        from sprue.operations.nodes import compare_nodes

        findings += compare_nodes()
    show([asdict(each) for each in findings], "\n".join(map(str, findings)), as_json)
    context.exit(any(each.level == "FAIL" for each in findings))
