"""The client's side of traces: a span for each job it submits, the parent of all that follows.

Interface rules: `begin` gives the span and the `traceparent` for the `JobSpec`, or None where
nobody wants traces: then it costs a look at two names. A program that has set up OpenTelemetry for
itself gets its spans where its own go, beneath the span it is in; else the environment decides
(traces.py), and `flush` sends what is left before the client leaves.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from manifold.kernel import traces

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from manifold.kernel.scheduler.messages import JobSpec

log = logging.getLogger("manifold.observe")

_lock = threading.Lock()
_ours: TracerProvider | None = None
_missing = False  # the extra, or its settings are wrong: said once
_refused = False  # so are those of the program's own


class Submission:
    """The span of one job, from its submission until its outcome is told."""

    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = traces.traceparent(context.trace_id, context.span_id)

    def end(self, state: str, why: str = "") -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("manifold.state", state)
        if state == "failed":
            self._span.set_status(Status(StatusCode.ERROR, why))
        self._span.end()


def begin(job: str, spec: JobSpec, cluster: str) -> Submission | None:
    """The span of a job that is about to be submitted; None where it is not traced."""
    provider = _provider()
    if provider is None:
        return None
    from opentelemetry.trace import SpanKind

    attributes = {
        "manifold.job": job, "manifold.cluster": cluster, "manifold.program": spec.program,
        "manifold.name": spec.name, "manifold.kind": spec.kind,
        "manifold.indices": len(spec.indices) or spec.hi - spec.lo,
    }  # fmt: skip
    tracer = provider.get_tracer("manifold")
    span = tracer.start_span("submit", kind=SpanKind.CLIENT, attributes=attributes)
    context = span.get_span_context()
    return Submission(span) if context.is_valid and context.trace_flags.sampled else None


def _provider() -> Any:
    """The program's own provider, ours, or None."""
    global _ours, _missing
    own = _of_program()
    if own is not None:
        return own
    if _ours is not None:
        return _ours
    if _missing or not traces.wanted(os.environ):
        return None
    with _lock:
        if _ours is None:
            _ours = traces.exporter("manifold-client", {"process.pid": os.getpid()})
            _missing = _ours is None
    return _ours


def _of_program() -> Any:
    """The provider that the program has set up for itself."""
    global _refused
    api = sys.modules.get("opentelemetry.trace")
    if api is None or _refused:
        return None
    try:
        own = api.get_tracer_provider()
    except Exception as error:  # it sets up what OTEL_PYTHON_TRACER_PROVIDER names
        _refused = True
        log.warning("OpenTelemetry refuses its settings: %s", error)
        return None
    return own if hasattr(own, "add_span_processor") else None  # of the SDK, no placeholder


def flush() -> None:
    """Send what was ended."""
    if _ours is not None:
        traces.flush(_ours)
