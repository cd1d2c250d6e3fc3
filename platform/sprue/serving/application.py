"""The service for a configuration file of Ray Serve, as ``serve deploy`` and KubeRay's RayService read them.

Its ``import_path`` is ``sprue.serving.application:application``. The file says where to listen and how many replicas
there are; the tracking server comes from ``MLFLOW_TRACKING_URI`` in the nodes' environment, with its credentials. The
service starts without a champion, too: a cluster may be installed before anything is registered.
"""

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application

from sprue.errors import SprueError
from sprue.release.access_log import FOLDER as ACCESSES
from sprue.release.decision_store import FOLDER
from sprue.serving.admission import AdmissionLimits
from sprue.serving.app import CLOSE_S, ScoringService, ServiceConfig
from sprue.serving.champions import CacheSettings
from sprue.serving.coordinator import CoordinatorSettings
from sprue.serving.decision_log import DecisionLogSettings
from sprue.serving.hosts import AllowedHosts
from sprue.serving.launch import PROXY_GRACE_S, require_keys
from sprue.serving.parsing import ServiceLimits
from sprue.serving.rates import Rate
from sprue.store import location

EVERYWHERE = "0.0.0.0"
"""Where a node of a cluster listens: others reach it, so that keys are needed."""


class ServiceArguments(BaseModel):
    """The ``args`` of the application; the options of ``sprue serve``, where they have the same meaning.

    Attributes:
        store: Folder that all nodes see, or s3 URL, in which decisions and the access log are kept; nowhere if None.
        keep_days: Days after which decisions are deleted.
        keep_images: Gigabytes of images beyond which the oldest are deleted.
        keep_sample: Fraction kept of the images that are neither alarms nor near the threshold.
        shadow: Fraction of the samples that challengers score, too, behind the answers; needs ``store``.
        keys: A file of keys, on every node.
        without_keys: Serve everybody who reaches a node.
        allowed_hosts: Names under which requests may come, besides the nodes' addresses.
        cache_gb: GiB of the classes that a replica has loaded.
        pinned: Classes that are loaded at the start, and stay.
        refresh_s: Seconds between two looks into the registry for new champions.
        rate: Requests of a key without a rate of its own, or of an address where there are no keys, such as ``20/s``.
        webhook_secret: File, on every node, of the secret with which the tracking server signs its webhooks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str | None = None
    keep_days: Annotated[int, Field(ge=1)] = 90
    keep_images: Annotated[float, Field(ge=0)] = 20.0
    keep_sample: Annotated[float, Field(ge=0, le=1)] = 0.01
    shadow: Annotated[float, Field(ge=0, le=1)] = 0.0
    keys: Path | None = None
    without_keys: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cache_gb: Annotated[float, Field(gt=0)] = 2.0
    pinned: tuple[str, ...] = ()
    refresh_s: Annotated[float, Field(gt=0)] = 15.0
    rate: str | None = None
    webhook_secret: Path | None = None


def application(arguments: ServiceArguments) -> Application:
    """Builds the service; Ray Serve calls this on the cluster with the file's ``args``.

    Raises:
        SprueError: If there are neither keys nor ``without_keys``, no tracking server is named, or challengers are to
            score and there is no store.
    """
    require_keys(EVERYWHERE, arguments.keys, arguments.without_keys)
    if arguments.shadow and arguments.store is None:
        raise SprueError("shadow: challengers' decisions need a place; set store")
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking_uri:
        raise SprueError("set MLFLOW_TRACKING_URI to the tracking server in the environment of every node")
    admission = AdmissionLimits()
    config = ServiceConfig(
        coordinator=CoordinatorSettings(tracking_uri, arguments.refresh_s, arguments.shadow > 0),
        limits=ServiceLimits(),
        admission=admission,
        cache=CacheSettings(int(arguments.cache_gb * 2**30), arguments.pinned),
        keys=arguments.keys,
        hosts=AllowedHosts.of(EVERYWHERE, arguments.allowed_hosts),
        decisions=_decisions(arguments),
        shadow=arguments.shadow,
        allow_empty=True,
        rate=Rate.of(arguments.rate) if arguments.rate else None,
        access_log=str(location(arguments.store) / ACCESSES) if arguments.store else None,
        webhook_secret=arguments.webhook_secret,
    )
    # A replica that has answered its requests writes its last decisions.
    stop_s = admission.max_timeout_s + CLOSE_S + PROXY_GRACE_S
    return ScoringService.options(graceful_shutdown_timeout_s=stop_s).bind(config)  # type: ignore[attr-defined]


def _decisions(arguments: ServiceArguments) -> DecisionLogSettings | None:
    if arguments.store is None:
        return None
    folder = str(location(arguments.store) / FOLDER)
    return DecisionLogSettings(folder, arguments.keep_days, round(1e9 * arguments.keep_images), arguments.keep_sample)
