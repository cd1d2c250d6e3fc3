"""Traces of requests for an OpenTelemetry collector: FastAPI's spans, with the phases of scoring below.

OpenTelemetry's own environment variables, on the nodes that run replicas, say where spans go and what is traced.
"""

import os

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from starlette.types import Scope

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def _is_none_of_the_interface(scope: Scope) -> bool:
    """Whether a request is for the page or a check, which are not traced."""
    return not scope["path"].startswith("/v1/")


TELEMETRY: TelemetryConfig = {
    "exclude": _is_none_of_the_interface,
    "operation_spans": False,  # the phases say more
    "metrics": False,  # Ray exports ours
    "logs": False,
}
"""What FastAPI sends by itself."""


def send_traces() -> None:
    """Sends this process's spans by OTLP over HTTP, in batches, if the environment names a collector."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "sprue")
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def send_last(timeout_s: float) -> None:
    """Sends the spans that wait for their batch, before the process ends."""
    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush:  # traces are sent
        flush(round(1000 * timeout_s))


def add_phase(phase: str, started_s: float, ended_s: float) -> None:
    """A span between two times since the epoch, below the request's, if it is traced."""
    if trace.get_current_span().is_recording():
        span = trace.get_tracer(__name__).start_span(phase, start_time=round(1e9 * started_s))
        span.end(round(1e9 * ended_s))


def describe(**attributes: str | int | float | bool) -> None:
    """Says more of the request in its span, if it is traced; the names get the prefix ``sprue.``."""
    trace.get_current_span().set_attributes({f"sprue.{name}": value for name, value in attributes.items()})
