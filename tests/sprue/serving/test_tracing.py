"""A collector gets a request's spans: Ray Serve's, and below them the phases of scoring."""

import secrets
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from sprue.errors import SprueError
from sprue.serving.tracing import tracing_config

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
    """Runs, and stands in the environment of the cluster that starts next; no request is traced by chance."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
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


def test_a_request_is_a_trace_from_the_proxy_to_the_phases(plant: Any) -> None:
    trace, parent, other = secrets.token_hex(16), secrets.token_hex(8), secrets.token_hex(16)
    image = plant.image("brick")
    plant.post("brick", image, headers={"traceparent": f"00-{other}-{parent}-{NOT_TRACED}"}).raise_for_status()
    plant.post("brick", image).raise_for_status()
    headers = {"traceparent": f"00-{trace}-{parent}-{TRACED}"}
    answer = plant.post("brick", image, headers=headers)
    spans = trace_of(trace, len(PHASES) + 2)
    phases = [span for name, span in spans.items() if name in PHASES]
    assert [span.name for span in sorted(phases, key=lambda span: span.start_time_unix_nano)] == PHASES
    (replica,) = {span.parent_span_id for span in phases}
    by_id = {span.span_id: span for span in spans.values()}
    proxy = by_id[by_id[replica].parent_span_id]
    assert proxy.parent_span_id.hex() == parent
    for before, after in ((proxy, by_id[replica]), *((by_id[replica], phase) for phase in phases)):
        assert before.start_time_unix_nano <= after.start_time_unix_nano
        assert after.end_time_unix_nano <= before.end_time_unix_nano
    attributes = {each.key: each.value for each in by_id[replica].attributes}
    assert attributes["sprue.model"].string_value == "textures.brick"
    assert attributes["sprue.is_anomalous"].bool_value is answer.json()["is_anomalous"]
    assert {span.trace_id.hex() for _, span in Collector.spans} == {trace}


def test_the_environment_says_where_and_how_many() -> None:
    assert not tracing_config({}).enabled
    config = tracing_config({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"})
    assert (config.enabled, config.sampling_ratio) == (True, 0.01)
    assert tracing_config({"OTEL_TRACES_SAMPLER_ARG": "0.5"}).sampling_ratio == 0.5
    for wrong in ("much", "2"):
        with pytest.raises(SprueError, match=f"OTEL_TRACES_SAMPLER_ARG={wrong}: give a fraction"):
            tracing_config({"OTEL_TRACES_SAMPLER_ARG": wrong})
