"""Traces: whether they are wanted, the context that travels, and where spans are sent.

Interface rules: `wanted(environ)` reads OpenTelemetry's own variables and imports nothing; only
otel.py, which `exporter` uses, imports its SDK. Spans are sent by the SDK's batch thread, never by
who ends one, so `exporter` is called after the last fork. What travels in a
`JobSpec` is a W3C `traceparent`; one that does not parse is none.
A span that another process is to be the parent of has an id that both can tell: `span_id`.
Source: W3C Trace Context 1; OpenTelemetry's environment variables.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("manifold.observe")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SDK = "manifold.kernel.otel"  # it imports all that is needed
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
    service: str, attributes: Mapping[str, str | int], next_id: Callable[[], int] | None = None
) -> TracerProvider | None:
    """A provider that sends spans; None, with a warning, where there is none. See otel.py."""
    from manifold.kernel import otel

    try:
        return otel.provider(service, attributes, next_id)
    except otel.NoTraces as fault:
        log.warning("no traces: %s", fault)
        return None


def flush(provider: TracerProvider, *, last: bool = False) -> None:
    """Send what is left, within `FLUSH_S`: a collector that does not answer keeps nobody."""
    send = provider.shutdown if last else provider.force_flush
    sender = threading.Thread(target=send, name="traces-flush", daemon=True)
    sender.start()
    sender.join(FLUSH_S)
