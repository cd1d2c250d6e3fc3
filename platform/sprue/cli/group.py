"""The group of all commands: what they share, and how their failures are shown."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from sprue.errors import SprueError

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
model = click.argument("name", metavar="CLASS")


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
            # An error of MLflow has imported MLflow. To import it for others, as click's own, would take seconds.
            exceptions = sys.modules.get("mlflow.exceptions")
            if exceptions is None or not isinstance(error, exceptions.MlflowException):
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


def connect(store: str) -> None:
    """Connects to the registry; nothing but warnings is logged from here on."""
    from sprue.store import location
    from sprue.tracking import server

    logging.getLogger().setLevel(logging.WARNING)
    server.connect(location(store))


def log_access(store: str, kind: Any, detail: str, model: str = "") -> None:
    """Appends to the access log what this command has done."""
    from sprue.release.access_log import FOLDER as ACCESSES
    from sprue.release.access_log import AccessLog
    from sprue.store import location
    from sprue.tracking.user import whoami

    AccessLog(location(store) / ACCESSES).append(kind, whoami(), "command", detail, model)


def show(value: Any, text: str, as_json: bool) -> None:
    """Prints a result: for people, or as JSON."""
    click.echo(json.dumps(value, indent=2) if as_json else text)
