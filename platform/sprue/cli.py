"""The command ``sprue``. Commands import what they need when they run, so that help and mistakes appear at once."""

import json
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sprue.errors import SprueError

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
model = click.argument("name", metavar="CLASS")
keys_file = click.option(
    "--keys", "file", type=FOLDER, default="keys.json", show_default=True, help="The file; made if it is missing."
)
SCOPES = click.Choice(["score", "review", "admin"])
SCOPE = (
    "What it may do: score images and list classes; see past decisions and review them; see what is wrong with the "
    "service. May be repeated."
)


class Failure(click.ClickException):
    """A user's mistake or a missing service: one message, exit status 1."""

    def __init__(self, context: click.Context, message: str) -> None:
        """Remembers the command that failed."""
        super().__init__(message)
        self.command = f"{context.info_name} {context.invoked_subcommand or ''}".rstrip()

    def show(self, file: Any = None) -> None:
        """Prints the command and the message."""
        click.echo(f"{self.command}: {self.message}", file=file or sys.stderr)


class Commands(click.Group):
    """Commands whose failures are one message: exit status 1 for the user's mistakes, 2 for wrong usage."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except (SprueError, OSError) as error:
            raise Failure(ctx, str(error)) from error
        except KeyboardInterrupt as error:
            raise Failure(ctx, "interrupted") from error
        except Exception as error:
            # Imported only now, for it takes seconds.
            from mlflow.exceptions import MlflowException

            if not isinstance(error, MlflowException):
                raise
            raise Failure(ctx, f"the registry answers: {error}") from error

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Finds a command; suggests one for a misspelled name."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            ctx.fail(f"there is no command {cmd_name!r}; there are: {', '.join(self.list_commands(ctx))}")
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sprue")
@click.option(
    "--store", default="store", show_default=True, help="Folder or s3 URL of all results. MLFLOW_TRACKING_URI names "
    "the registry if it is a server.",
)  # fmt: skip
@click.pass_context
def main(context: click.Context, store: str) -> None:
    """Trains, registers and serves detectors of defects, one for each product class.

    CLASS is a class's name; where several datasets have a class of that name, it is DATASET.CLASS.
    """
    if store != "store" and context.invoked_subcommand in ("run", "demo", "search", "stage", "figures"):
        raise click.UsageError(f"{context.invoked_subcommand} does not take --store before its name")
    context.obj = store
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def _connect(store: str) -> None:
    """Connects to the registry; nothing but warnings is logged from here on."""
    from sprue.store import location
    from sprue.tracking.server import connect

    logging.getLogger().setLevel(logging.WARNING)
    connect(location(store))


def _print(value: Any, text: str, as_json: bool) -> None:
    click.echo(json.dumps(value, indent=2) if as_json else text)


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--name", help="The dataset's name.  [default: the folder's]")
@click.option(
    "--recipe", help="A file, or a name in models/recipes.  [default: the dataset's; fusion-cpu if it is new]"
)
@click.option("--layout", type=click.Choice(["mvtec", "mvtec-views"]), help="Of its folders.")
@click.option("--trials", type=click.IntRange(0), help="Settings that a search tries for each class.")
def run(folder: Path, name: str | None, recipe: str | None, layout: str | None, trials: int | None) -> None:
    """Run the pipeline on a FOLDER of images: from images to registered detectors.

    FOLDER holds a folder for each class: CLASS/train/good with images of good parts and, to measure with,
    CLASS/test/good, CLASS/test/DEFECT and CLASS/ground_truth/DEFECT.
    """
    from sprue.stages import dvc

    dvc.run(name or folder.resolve().name, folder, recipe, layout, trials)


@main.command()
@click.option("--views", is_flag=True, help="Samples of three views, with Multi-Flow.")
def demo(views: bool) -> None:
    """Run the pipeline on an embedded dataset and score images over HTTP; leaves nothing running."""
    from sprue.stages.demo import run_demo, run_views_demo

    logging.getLogger().setLevel(logging.WARNING)
    (run_views_demo if views else run_demo)()


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
@click.argument("name", metavar="NAME")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def stage(name: str, arguments: tuple[str, ...]) -> None:
    """Run one stage: manifest, features, search, fit, evaluate or register.

    `sprue stage NAME --help` lists its arguments.
    """
    from sprue.stages.runtime import STAGES, run_stage

    if name not in STAGES:
        raise click.UsageError(f"there is no stage {name!r}; there are: {', '.join(STAGES)}")
    run_stage(name, arguments)


@main.command()
@click.argument("dataset")
@click.option("--trials", type=click.IntRange(1), required=True, help="Settings that are tried for each class.")
def search(dataset: str, trials: int) -> None:
    """Search the settings of each class of a DATASET, and write its plan."""
    from sprue.params import PARAMS, read_dataset, set_dataset
    from sprue.stages.dvc import run_pipeline

    read_dataset(PARAMS, dataset)
    set_dataset(dataset, trials=trials)
    run_pipeline(dataset, last_stage="search")


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.option("--keys", type=EXISTING_FILE, help="File of the keys that requests need; see `sprue keys`.")
@click.option("--without-keys", is_flag=True, help="Serve everybody who reaches an address other than the loopback's.")
@click.option("--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Another name of the service.")
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
    "--cache-gb",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Memory of the classes that a replica has loaded, in GiB.",
)
@click.option("--pin", "pinned", multiple=True, metavar="CLASS", help="Load this class at the start, and keep it.")
@click.pass_obj
def serve(
    store: str,
    host: str,
    port: int,
    keys: Path | None,
    without_keys: bool,
    allowed_hosts: tuple[str, ...],
    no_decisions: bool,
    keep_days: int,
    keep_images: float,
    keep_sample: float,
    cache_gb: float,
    pinned: tuple[str, ...],
) -> None:
    """Serve the champions over HTTP until interrupted."""
    if keys and without_keys:
        raise click.UsageError("give --keys FILE or --without-keys, not both")
    from sprue.release.decision_store import FOLDER as DECISIONS
    from sprue.serving.champions import CacheSettings
    from sprue.serving.decision_log import DecisionLogSettings
    from sprue.serving.launch import require_free_port, require_keys, serve_champions, stop_serving
    from sprue.stages.runtime import connect_ray
    from sprue.store import location

    folder = str(location(store) / DECISIONS)
    decisions = None if no_decisions else DecisionLogSettings(folder, keep_days, round(1e9 * keep_images), keep_sample)
    require_keys(host, keys, without_keys)
    require_free_port(host, port)
    _connect(store)
    connect_ray()
    cache = CacheSettings(int(cache_gb * 2**30), pinned)
    url = serve_champions(
        host,
        port,
        cache=cache,
        keys=keys,
        without_keys=without_keys,
        allowed_hosts=allowed_hosts,
        decisions=decisions,
    )
    click.echo(f"scoring at {url}  (its interface: {url}/docs; stop it with Ctrl-C)")
    sys.stdout.flush()
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    stop_serving()


@main.group()
def keys() -> None:
    """Make and revoke the keys of the service; a service that runs follows the file."""


@keys.command("add")
@click.argument("name")
@click.option(
    "--scope", "scopes", type=click.Choice(["score", "review", "admin"]), multiple=True, required=True, help=SCOPE
)
@keys_file
def add_key(name: str, scopes: tuple[Any, ...], file: Path) -> None:
    """Make a key and print it, this once; the file keeps its hash."""
    from sprue.serving.keys import add_key as add

    click.echo(add(file, name, scopes))


@keys.command("remove")
@click.argument("name")
@keys_file
def remove_key(name: str, file: Path) -> None:
    """Revoke a key."""
    from sprue.serving.keys import remove_key as remove

    remove(file, name)


@main.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--class", "name", metavar="CLASS", required=True, help="The class whose detector scores.")
@click.option("--version", default="champion", show_default=True, help="Its number or alias.")
@click.option(
    "--output", metavar="FOLDER", help="Folder or s3 URL for the scores of all images of one folder, as Parquet."
)
@click.option("--heatmaps", is_flag=True, help="Also write heat maps to the output.")
@as_json
@click.pass_obj
def score(
    store: str, images: tuple[str, ...], name: str, version: str, output: str | None, heatmaps: bool, as_json: bool
) -> None:
    """Score IMAGES with a registered detector.

    Without --output, IMAGES are files, which are scored in this process. Where samples have several views, give a
    folder with an image of each view for each sample.

    With --output, IMAGES is a folder or s3 URL, and all images below it are scored on Ray: on this machine, or on the
    cluster that RAY_ADDRESS names. An interrupted run resumes. Exit status 1 says that some could not be read.
    """
    if output is None and heatmaps:
        raise click.UsageError("--heatmaps needs --output FOLDER")
    if output is None and any("://" in image for image in images):
        raise click.UsageError("images of an s3 URL are scored with --output FOLDER")
    if output is not None and len(images) > 1:
        raise click.UsageError("with --output give one folder or s3 URL of images")
    _connect(store)
    if output is None:
        import pandas as pd

        from sprue.stages.score import score_files
        from sprue.tracking.registry import find_registered

        rows = score_files(find_registered(name, version), [Path(image) for image in images])
        _print(rows, pd.DataFrame(rows).to_string(index=False), as_json)
        return
    from sprue.stages.runtime import ended_by_interrupt
    from sprue.stages.score_folder import require_all, score_on_ray

    logging.getLogger("sprue").setLevel(logging.INFO)
    with ended_by_interrupt("score"):
        summary = score_on_ray(name, version, images[0], output, heatmaps)
    _print(asdict(summary), str(summary), as_json)
    require_all(summary)


@main.command()
@model
@click.option("--version", default="challenger", show_default=True, help="Its number or alias.")
@click.option("--images", type=FOLDER, help="Folder with good/ and a folder for each defect, unseen by both versions.")
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
    _connect(store)
    from sprue.release import promotion

    if images is not None:
        decision = promotion.decide(name, version, images, promotion.Rules(margin, latency_s=latency / 1000))
    else:
        assert force is not None
        decision = promotion.force(name, version, force)
    _print(decision.as_json(), str(decision), as_json)
    if decision.objections:
        raise SprueError(f"version {decision.version} is not promoted: {'; '.join(decision.objections)}")


@main.command()
@model
@click.option("--reason", required=True, help="Goes into the audit log.")
@as_json
@click.pass_obj
def rollback(store: str, name: str, reason: str, as_json: bool) -> None:
    """Make the previous champion champion again."""
    _connect(store)
    from sprue.release.aliases import roll_back
    from sprue.tracking.registry import find_model

    found = find_model(name)
    version = roll_back(found, reason)
    _print({"model": found, "champion": version}, f"{found}: version {version} is champion again", as_json)


@main.command()
@click.argument("name", metavar="[CLASS]", required=False)
@as_json
@click.pass_obj
def audit(store: str, name: str | None, as_json: bool) -> None:
    """Print the audit log: who changed which champion, when and why."""
    _connect(store)
    from sprue.release import audit_log
    from sprue.release.aliases import reconcile
    from sprue.tracking.lock import alias_lock
    from sprue.tracking.registry import find_model, model_names

    found = find_model(name) if name else None
    for each in [found] if found else model_names():
        with alias_lock(each):
            reconcile(each)
    entries = audit_log.entries(found)
    text = "\n".join(map(str, entries)) or "no champion has changed yet"
    _print([entry.as_json() for entry in entries], text, as_json)


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
    _connect(store)
    from sprue.tracking import lineage as records
    from sprue.tracking.registry import find_registered

    if image is not None:
        found, without_record = records.uses(image)
        text = "\n".join(map(str, found)) or f"no version was made with {image}"
        if without_record:
            text += f"\nwithout a record of their images: {', '.join(without_record)}"
        uses = [asdict(use) for use in found]
        _print({"uses": uses, "without_record": without_record}, text, as_json)
        return
    assert name is not None
    registered = find_registered(name, version)
    if list_images:
        click.echo(records.Lineage.read(registered).images.to_csv(index=False), nl=False)
        return
    facts = records.describe(registered)
    _print(facts, "\n".join(f"{heading:<10} {words}" for heading, words in facts.items()), as_json)


@main.command()
@model
@click.option("--version", default="champion", show_default=True, help="Its number or alias.")
@as_json
@click.pass_obj
def reproduce(store: str, name: str, version: str, as_json: bool) -> None:
    """Fit a version once more from its record, and compare the weights."""
    _connect(store)
    from sprue.release.reproduce import reproduce as repeat
    from sprue.store import location
    from sprue.tracking.registry import find_registered

    registered = find_registered(name, version)
    found = repeat(registered, location(store), lambda epoch: click.echo(str(epoch), err=as_json))
    _print(asdict(found), f"{registered}: the weights are equal, bit for bit" if found.equal else "", as_json)
    if not found.equal:
        raise SprueError(
            f"{registered}: the weights differ by up to {found.largest:.3g}; compare the commit, the packages and the "
            "machine that `sprue lineage` prints with those here"
        )


@main.command()
@click.argument("request_id", metavar="ID")
@as_json
@click.pass_obj
def replay(store: str, request_id: str, as_json: bool) -> None:
    """Score a kept image again with the version that decided, and compare.

    ID is an answer's X-Request-Id.
    """
    _connect(store)
    from sprue.release.decision_store import FOLDER as DECISIONS
    from sprue.release.decision_store import DecisionStore
    from sprue.release.replay import replay as repeat
    from sprue.store import location

    found = repeat(DecisionStore(location(store) / DECISIONS), request_id)
    _print(found.as_json(), str(found), as_json)
    if not found.equal:
        raise SprueError(f"{request_id}: the result differs from the recorded one")


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
    _connect(store)
    from sprue.release.decision_store import FOLDER as DECISIONS
    from sprue.release.reviews import ReviewStore, export
    from sprue.store import location
    from sprue.tracking.registry import find_model

    found = export(ReviewStore(location(store) / DECISIONS), find_model(name), folder, kind)
    text = f"{folder}: {', '.join(f'{count} {label}' for label, count in found.items())}"
    _print({"folder": str(folder), "samples": found}, text, as_json)


@main.command()
@click.argument("file", type=EXISTING_FILE)
def figures(file: Path) -> None:
    """Print all metrics of scores and maps in an .npz FILE, as JSON.

    It holds scores_N and labels_N (0 or 1), and may hold maps_NHW and masks_NHW (anomalous where not 0). Metrics that
    do not exist are null.
    """
    from sprue.evaluation.metrics_file import as_json, metrics_of_file

    click.echo(as_json(metrics_of_file(file)))


if __name__ == "__main__":
    main()
