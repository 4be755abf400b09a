"""Traces: whether they are wanted, the context that travels, and where spans are sent.

Interface rules: `wanted(environ)` reads OpenTelemetry's own variables and imports nothing; only
`exporter` imports its SDK, which the extra `otel` installs. Spans are sent by the SDK's batch
thread, never by who ends one, so `exporter` is called after the last fork. What travels in a
`JobSpec` is a W3C `traceparent`; one that does not parse is none.
A span that another process is to be the parent of has an id that both can tell: `span_id`.
Source: W3C Trace Context 1; OpenTelemetry's environment variables.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from manifold.vm.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("manifold.observe")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SDK = "opentelemetry.exporter.otlp.proto.http.trace_exporter"  # it imports all that is needed
FLUSH_S = 1.0  # who ends waits so long for its last spans to leave; a supervisor kills after 2 s
_SAMPLED = 1
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class Parent:
    """What a `traceparent` says."""

    trace: int
    span: int

    def child_of(self, *names: str | int) -> Parent:
        """The same trace, with the span that `names` tell as the parent."""
        return Parent(self.trace, span_id(self.trace, *names))


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that spans are to be sent anywhere."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter:
        return exporter == "otlp"
    return any(environ.get(name) for name in ENDPOINTS)


def installed() -> bool:
    """Whether the extra is; nothing of it is imported but its packages' names."""
    try:
        return importlib.util.find_spec(SDK) is not None
    except ModuleNotFoundError:
        return False


def parse(traceparent: str) -> Parent | None:
    """The parent, where there is one and it is sampled."""
    found = _PARENT.fullmatch(traceparent)
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    parent = Parent(int(found[2], 16), int(found[3], 16))
    sampled = int(found[4], 16) & _SAMPLED
    return parent if sampled and parent.trace and parent.span else None


def traceparent(trace: int, span: int) -> str:
    """As it travels, sampled."""
    return f"00-{trace:032x}-{span:016x}-{_SAMPLED:02x}"


def span_id(trace: int, *names: str | int) -> int:
    """The id of the span of `trace` that is told by `names`: the same in every process."""
    text = "\0".join((f"{trace:032x}", *map(str, names)))
    return int.from_bytes(blake3(text.encode()).digest(length=8), "big") or 1


def exporter(
    service: str, attributes: Mapping[str, str | int], ids: Any = None
) -> TracerProvider | None:
    """A provider that sends spans by OTLP over HTTP; None, with a warning, where there is none.

    `ids` generates ids, where the SDK's own will not do.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no traces: OpenTelemetry is missing; pip install 'manifold-os[otel]'")
        return None
    try:
        said = Resource.create()  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win
        named = str(said.attributes.get("service.name", "unknown_service"))
        own: dict[str, str | int] = {"service.version": VERSION, **attributes}
        if named.startswith("unknown_service"):
            own["service.name"] = service
        resource = said.merge(Resource(own))
        provider = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except Exception as error:  # whatever its variables say: no job may fail of that
        log.warning("no traces: OpenTelemetry refuses its settings: %s", error)
        return None
    return provider


def flush(provider: TracerProvider, *, last: bool = False) -> None:
    """Send what is left, within `FLUSH_S`: a collector that does not answer keeps nobody."""
    send = provider.shutdown if last else provider.force_flush
    sender = threading.Thread(target=send, name="traces-flush", daemon=True)
    sender.start()
    sender.join(FLUSH_S)
