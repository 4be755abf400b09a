"""OpenTelemetry's SDK: imported here and nowhere else, and what a provider is made of.

Interface rules: to import this raises nothing, whatever the environment says and whether or not the
extra `otel` is installed: the SDK reads its variables as it is imported, and raises for an odd one.
`provider` raises `NoTraces`, with one sentence. What the SDK itself has to say (that a collector
does not answer, with every batch) becomes one warning in the life of a process; a program that has
given the logger `opentelemetry` handlers of its own keeps them.
Source: OpenTelemetry's environment variables.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from manifold.vm.version import VERSION

log = logging.getLogger("manifold.observe")

OURS = "opentelemetry"
USED = ("urllib3.connectionpool", "urllib3.util.retry")  # the program may use them as well
THREADS = ("OtelBatch", "traces-flush")  # how those begin that send spans: the SDK's and ours
SAID_CHARACTERS_MAX = 300  # of what a log line of the SDK says: three lines of a terminal


class NoTraces(Exception):
    """Why no spans are sent, in one sentence."""


class _Once(logging.Handler):
    """Says the first thing that the SDK warns of; the others would be the same again."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            log.warning("traces: %s (said once)", sentence(record.getMessage()))


class _Ours(logging.Filter):
    """Passes on what somebody else of the program logs by way of a library that the SDK uses."""

    def __init__(self, once: _Once) -> None:
        super().__init__()
        self._once = once

    def filter(self, record: logging.LogRecord) -> bool:
        if not threading.current_thread().name.startswith(THREADS):
            return True
        self._once.handle(record)
        return False


def sentence(text: object) -> str:
    """What the SDK says, in one line."""
    return " ".join(str(text).split())[:SAID_CHARACTERS_MAX]


def _hush() -> None:
    logger = logging.getLogger(OURS)
    if logger.handlers:
        return
    once = _Once()
    logger.addHandler(once)
    logger.propagate = False
    for name in USED:
        logging.getLogger(name).addFilter(_Ours(once))


_hush()
FAULT = ""  # why there is no SDK
try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
except ImportError:
    FAULT = "OpenTelemetry is missing; pip install 'manifold-os[otel]'"
except Exception as error:  # whatever its variables say: no cluster may fail of that
    FAULT = f"OpenTelemetry refuses its settings: {sentence(error)}"


def provider(
    service: str, attributes: Mapping[str, str | int], next_id: Callable[[], int] | None = None
) -> TracerProvider:
    """A provider that sends spans by OTLP over HTTP; `NoTraces` where there is none.

    `next_id` tells the id of the span that is begun now, 0 where any will do.
    """
    if FAULT:
        raise NoTraces(FAULT)
    try:
        said = Resource.create()  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win
        named = str(said.attributes.get("service.name", "unknown_service"))
        own: dict[str, str | int] = {"service.version": VERSION, **attributes}
        if named.startswith("unknown_service"):
            own["service.name"] = service
        made = TracerProvider(
            resource=said.merge(Resource(own)),
            id_generator=_ids(next_id) if next_id is not None else None,
            shutdown_on_exit=False,
        )
        made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except Exception as error:  # as above: no job may fail of its variables
        raise NoTraces(f"OpenTelemetry refuses its settings: {sentence(error)}") from error
    return made


def _ids(next_id: Callable[[], int]) -> RandomIdGenerator:
    class Ids(RandomIdGenerator):
        def generate_span_id(self) -> int:
            return next_id() or super().generate_span_id()

    return Ids()
