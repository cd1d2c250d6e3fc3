"""MLflow's webhooks: the tracking server tells a service at once that a champion has changed, and signs it."""

import base64
import hashlib
import hmac
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.entities.webhook import Webhook, WebhookEvent, WebhookEventStr
from mlflow.exceptions import MlflowException
from mlflow.webhooks.constants import (
    WEBHOOK_DELIVERY_ID_HEADER,
    WEBHOOK_SIGNATURE_HEADER,
    WEBHOOK_SIGNATURE_VERSION,
    WEBHOOK_TIMESTAMP_HEADER,
)

from sprue.errors import SprueError

ROUTE = "/v1/registry-events"
"""Where the service takes them."""

NAME = "sprue"
EVENTS: list[WebhookEventStr | WebhookEvent] = ["model_version_alias.created", "model_version_alias.deleted"]
"""What changes champions; MLflow tells nothing of a deleted model, which polling finds."""

TOLERANCE_S = 300.0
"""How old a message may be, and how far the server's clock may be ahead."""

SHORTEST = 16
"""Characters of a secret."""

HINTS = (
    "the server needs MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https for a URL without TLS, "
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true for a plant's own addresses, and MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"
)


def read_secret(path: Path) -> str:
    """The secret that a server signs with, from a file that is its owner's alone.

    Raises:
        SprueError: If it can't be read, others may read it, or it is too short.
    """
    try:
        secret, mode = path.read_text(encoding="utf-8").strip(), stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        raise SprueError(f"the webhook's secret can't be read: {error}") from error
    if mode & 0o077:
        raise SprueError(f"others may read the webhook's secret {path}: chmod 600 {path}")
    if len(secret) < SHORTEST:
        raise SprueError(f"the webhook's secret {path} has fewer than {SHORTEST} characters: `openssl rand -hex 32`")
    return secret


def verify(secret: str, headers: Mapping[str, str], body: bytes, now: float | None = None) -> None:
    """Checks that a server which knows the secret has sent a message, not long ago (`now` is the Unix time).

    Raises:
        SprueError: If not; with the reason.
    """
    identifier, sent = headers.get(WEBHOOK_DELIVERY_ID_HEADER, ""), headers.get(WEBHOOK_TIMESTAMP_HEADER, "")
    digest = hmac.new(secret.encode(), f"{identifier}.{sent}.".encode() + body, hashlib.sha256).digest()
    expected = f"{WEBHOOK_SIGNATURE_VERSION},{base64.b64encode(digest).decode()}"
    if not hmac.compare_digest(expected.encode(), headers.get(WEBHOOK_SIGNATURE_HEADER, "").encode()):
        raise SprueError("the message is not signed with this service's secret")
    if not sent.isdecimal() or abs((time.time() if now is None else now) - int(sent)) > TOLERANCE_S:
        raise SprueError("the message is too old, or the clocks of tracking server and service differ")


def register_webhook(url: str, secret: str) -> str:
    """Makes MLflow's current tracking server tell a service of changes, and lets it try; returns the webhook's URL.

    A webhook that the server has for this URL is replaced.

    Args:
        url: The service's, as the tracking server reaches it.
        secret: The service's.

    Raises:
        SprueError: If the server refuses the URL, or does not reach the service with it.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SprueError(f"{url} is no URL of a service, such as https://scoring.plant:8443")
    client, target = mlflow.MlflowClient(), url.rstrip("/").removesuffix(ROUTE) + ROUTE
    try:
        for old in _webhooks(client):
            if old.url == target:
                client.delete_webhook(old.webhook_id)
        made = client.create_webhook(NAME, target, EVENTS, "Tells sprue that champions have changed", secret)
        result = client.test_webhook(made.webhook_id)
    except MlflowException as error:
        raise SprueError(f"the tracking server takes no webhook for {target}: {error}; {HINTS}") from error
    if not result.success:
        reason = result.error_message or f"status {result.response_status}: {result.response_body}"
        raise SprueError(f"the tracking server does not reach {target}: {reason}; {HINTS}")
    return target


def _webhooks(client: mlflow.MlflowClient) -> list[Webhook]:
    found: list[Webhook] = []
    token: str | None = None
    while True:
        page = client.list_webhooks(page_token=token)
        found += page
        token = page.token
        if not token:
            return found
