"""The stack's secrets: made once, readable by their owner alone."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import bcrypt
from settings import Settings, StackError

PEOPLE, MACHINES = "admin", "sprue"
"""MLflow's two accounts: the one that people log in with, everywhere, and that of jobs and services."""
NAMES = ("postgres", "s3_key", "s3_secret", "s3_signing", "ray", "people", "machines", "mlflow_session")


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read; it appears whole."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


def kept_secrets(folder: Path) -> dict[str, str]:
    """Passwords and tokens of this folder's services."""
    path = folder / "secrets.json"
    if not path.exists():
        write_private(path, json.dumps({name: secrets.token_hex(24) for name in NAMES}, indent=2))
    return dict(json.loads(path.read_text()))


def make_credentials(settings: Settings, known: dict[str, str]) -> None:
    """Writes what is missing: Ray's token, the first key for the scoring service, and logins.

    Raises:
        StackError: If the file of keys takes none.
    """
    folder = settings.folder
    write_private(folder / "ray.token", known["ray"])
    if not (folder / "first.key").exists():
        _add_first_key(folder)
    for name, accounts in (("people", (PEOPLE,)), ("mlflow", (PEOPLE, MACHINES))):
        file = folder / "conf" / f"{name}.htpasswd"
        if not file.exists():
            write_private(file, "".join(_login(each, known) for each in accounts))


def _add_first_key(folder: Path) -> None:
    """Adds a key to those that there are: stations use them."""
    name = f"first-{secrets.token_hex(4)}" if (folder / "keys.json").exists() else "first"
    scopes = [word for scope in ("score", "review", "admin") for word in ("--scope", scope)]
    command = [Path(sys.executable).parent / "sprue", "keys", "add", name, *scopes, "--keys", "keys.json"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if made.returncode:
        raise StackError(f"there is no key for this machine: {made.stderr.strip()}")
    write_private(folder / "first.key", made.stdout.strip())


def _login(account: str, known: dict[str, str]) -> str:
    """A line for nginx. It hashes with each request; more rounds would add nothing to a random password."""
    password = known["people" if account == PEOPLE else "machines"]
    return f"{account}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds=5)).decode()}\n"


def write_client_environment(settings: Settings, known: dict[str, str]) -> None:
    """Writes ``client.env``, with which this machine's shells reach the stack: ``. store/stack/client.env``."""
    variables = {
        **machine_environment(settings, known),
        "RAY_AUTH_TOKEN": known["ray"],
        "RAY_ADDRESS": settings.address("ray"),
        "RAY_API_SERVER_ADDRESS": f"http://{settings.address('ray_dashboard')}",
        "SPRUE_URL": settings.url,
        "SPRUE_CA": str(settings.folder / "tls" / "ca.pem"),
        "SPRUE_KEY": (settings.folder / "first.key").read_text(),
    }
    write_private(
        settings.folder / "client.env", "".join(f"export {name}='{value}'\n" for name, value in variables.items())
    )


def machine_environment(settings: Settings, known: dict[str, str]) -> dict[str, str]:
    """What jobs and the scoring service need to reach Ray, the object store and MLflow."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(settings.folder / "ray.token"),
        # Else Ray replaces the loopback address by the machine's own, and listens there; the variable's name is of the
        # systems where that is so by default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AWS_ENDPOINT_URL": f"http://{settings.address('s3')}",
        "AWS_ACCESS_KEY_ID": known["s3_key"],
        "AWS_SECRET_ACCESS_KEY": known["s3_secret"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": f"http://{settings.address('mlflow')}",
        "MLFLOW_TRACKING_USERNAME": MACHINES,
        "MLFLOW_TRACKING_PASSWORD": known["machines"],
    }


def give(path: Path, user: str) -> None:
    """Gives a file to the user as which a service of root's runs."""
    if os.geteuid() == 0:
        shutil.chown(path, user, user)
