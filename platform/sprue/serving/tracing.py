"""Traces of requests, from the proxy to the model, for an OpenTelemetry collector.

Ray Serve makes a span of each traced request in its proxy and one in the replica, and takes a client's ``traceparent``.
Below these are the phases of scoring. The environment of the nodes, with OpenTelemetry's own names, says where spans go
and how many requests are traced.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from ray.serve.schema import TracingConfig

from sprue.errors import SprueError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
RATIO = "OTEL_TRACES_SAMPLER_ARG"
DEFAULT_RATIO = 0.01
"""Of the requests whose client does not say whether they are to be traced."""


def tracing_config(environment: Mapping[str, str] = os.environ) -> TracingConfig:
    """What Ray Serve is started with: no tracing unless the environment names a collector.

    Raises:
        SprueError: If the fraction to trace is none.
    """
    ratio = environment.get(RATIO) or str(DEFAULT_RATIO)
    try:
        return TracingConfig(
            enabled=any(environment.get(name) for name in ENDPOINTS),
            exporter_import_path=f"{__name__}:span_processors",
            sampling_ratio=float(ratio),
        )
    except ValueError as error:  # pydantic's, too
        raise SprueError(f"{RATIO}={ratio}: give a fraction of the requests, from 0 to 1") from error


def span_processors() -> list[Any]:
    """Sends spans by OTLP over HTTP, in batches; Ray Serve calls this in its proxies and in each replica."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "sprue")  # of the spans' resource, which Ray makes next
    return [BatchSpanProcessor(OTLPSpanExporter())]


def add_phase(phase: str, seconds: float) -> None:
    """A span that ends now, below the request's, if it is traced."""
    if trace.get_current_span().is_recording():
        ended = time.time_ns()
        span = trace.get_tracer(__name__).start_span(phase, start_time=ended - round(1e9 * seconds))
        span.end(ended)


def describe(**attributes: str | int | float | bool) -> None:
    """Says more of the request in its span, if it is traced; the names get the prefix ``sprue.``."""
    trace.get_current_span().set_attributes({f"sprue.{name}": value for name, value in attributes.items()})
