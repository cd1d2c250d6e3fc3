"""A collector gets the spans of requests: FastAPI's, and below it the phases of scoring."""

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TRACED, NOT_TRACED = "01", "00"
PHASES = ["load", "receive", "decode", "score"]


class Collector(BaseHTTPRequestHandler):
    """Takes spans by OTLP over HTTP, as OpenTelemetry's own collector does."""

    spans: ClassVar[list[tuple[str, Span]]] = []

    def do_POST(self) -> None:
        """Keeps the spans with the name of their service."""
        taken = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in taken.resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans.extend((named["service.name"], span) for span in scope.spans)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module", autouse=True)
def collector() -> Iterator[None]:
    """Runs, and stands in the environment of the cluster that starts next; only traced clients are traced."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def trace_of(trace: str, count: int) -> dict[str, Span]:
    """The spans of a trace by their names, when so many have come."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [(service, span) for service, span in Collector.spans if span.trace_id.hex() == trace]
        if len(found) >= count:
            assert {service for service, _ in found} == {"sprue"}
            return {span.name: span for _, span in found}
        time.sleep(0.1)
    pytest.fail(f"{count} spans were expected, and came: {[span.name for _, span in found]}")


def test_a_request_is_a_span_and_its_phases_are_below(plant: Any) -> None:
    trace, parent, other = secrets.token_hex(16), secrets.token_hex(8), secrets.token_hex(16)
    image = plant.image("brick")
    plant.post("brick", image, headers={"traceparent": f"00-{other}-{parent}-{NOT_TRACED}"}).raise_for_status()
    plant.post("brick", image).raise_for_status()
    traced = {"traceparent": f"00-{trace}-{parent}-{TRACED}"}
    plant.client.get("/livez", headers=traced).raise_for_status()
    answer = plant.post("brick", image, headers=traced)
    spans = trace_of(trace, len(PHASES) + 1)
    request = spans.pop("POST /v1/classes/{name}/score")
    assert request.parent_span_id.hex() == parent
    assert sorted(spans, key=lambda name: spans[name].start_time_unix_nano) == PHASES
    for phase in spans.values():
        assert phase.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= phase.start_time_unix_nano
        assert phase.end_time_unix_nano <= request.end_time_unix_nano
    attributes = {each.key: each.value for each in request.attributes}
    assert attributes["sprue.model"].string_value == "textures.brick"
    assert attributes["sprue.is_anomalous"].bool_value is answer.json()["is_anomalous"]
    assert {span.trace_id.hex() for _, span in Collector.spans} == {trace}


ENDING = """
import os
from opentelemetry import trace
from sprue.serving import tracing

tracing.send_last(5.0)  # nothing is sent
tracing.send_traces()
with trace.get_tracer("test").start_as_current_span("last"):
    pass
tracing.send_last(5.0)
os._exit(0)
"""


def test_a_process_that_ends_sends_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    subprocess.run([sys.executable, "-c", ENDING], check=True, timeout=120)
    assert "last" in [span.name for _, span in Collector.spans]
