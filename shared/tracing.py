"""Traces through API, queue, worker and captioner (OpenTelemetry, W3C trace context), by setting.

Without `CAPTUNE_OTLP_ENDPOINT` every span is OpenTelemetry's no-op, and its SDK is not even imported. FastAPI makes
those of requests, as children of the caller's (`traceparent`); those of jobs are made here. A job's first event keeps
the trace and the request it was submitted in, so that its attempts, days later and in another process, belong to the
same trace."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry.trace import Span, SpanKind, get_tracer, get_tracer_provider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.logging import field

REQUEST_ID = "x-request-id"

_tracer = get_tracer("captune")  # hands on to the provider that `configure` sets
_w3c = TraceContextTextMapPropagator()


def configure(endpoint: str | None, service: str) -> None:
    """Send spans to an OTLP/HTTP collector (`http://collector:4318`). Called by `main`s and `create_app`, before the
    database's engine is made. Ends the process where the setting is there and the packages are not."""
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import set_tracer_provider
    except ImportError as error:
        sys.exit(f"CAPTUNE_OTLP_ENDPOINT is set, but {error.name} is not installed: pip install 'captune[otel]'")
    provider = TracerProvider(resource=Resource.create({"service.name": f"captune-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    set_tracer_provider(provider)
    PsycopgInstrumentor().instrument()


def flush() -> None:
    """Send what is not sent yet: an API process ends by a signal, which runs no exit handlers."""
    if send := getattr(get_tracer_provider(), "force_flush", None):  # the SDK's has it
        send()


@contextmanager
def job_span(kind: str, origin: Mapping[str, str], attributes: Mapping[str, Any]) -> Iterator[Span]:
    """Of one attempt at a job, in the trace of the request that submitted it. `origin`: what `origin()` gave then."""
    with _tracer.start_as_current_span(kind, _w3c.extract(origin), SpanKind.CONSUMER, dict(attributes)) as span:
        yield span


def origin() -> dict[str, str]:
    """What a job keeps of the request it was submitted in: `request_id` and `traceparent`, those there are."""
    found: dict[str, str] = {}
    _w3c.inject(found)
    if request_id := field("request_id"):
        found["request_id"] = str(request_id)
    return found


def outgoing() -> dict[str, str]:
    """Headers for a request to another service of ours, which then logs and traces under the same ids."""
    found = origin()
    if request_id := found.pop("request_id", None):
        found[REQUEST_ID] = request_id
    return found
