"""Metrics as text: Prometheus 0.0.4 and OpenMetrics 1.0. Pure.

Interface: `negotiate(accept)` picks the format for an `Accept` header, `render` writes it.
Source: prometheus.io "Exposition formats"; the OpenMetrics specification 1.0, "Text format".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from manifold.kernel.observe.messages import Family, Label, Sample

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_WHOLE_MAX = 1 << 53  # beyond it a float is no exact integer any more
_VERSIONS = ("", "0.0.1", "1.0.0")  # of OpenMetrics; the first was never different
_QUALITY = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")  # RFC 9110


def render(families: Iterable[Family], content_type: str = PROMETHEUS) -> str:
    """All families, in their order."""
    openmetrics = content_type == OPENMETRICS
    lines: list[str] = []
    for family in families:
        lines += _family(family, openmetrics)
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _family(family: Family, openmetrics: bool) -> Iterator[str]:
    # Prometheus names a counter by its samples, OpenMetrics by its family.
    name = family.name if openmetrics else family.sample_name(Sample(0.0))
    kind = "gauge" if family.kind == "info" and not openmetrics else family.kind
    yield f"# HELP {name} {_help(family.help, openmetrics)}"
    yield f"# TYPE {name} {kind}"
    if openmetrics and family.unit:
        yield f"# UNIT {name} {family.unit}"
    for sample in family.samples:
        yield f"{family.sample_name(sample)}{_labels(sample)} {number(sample.value)}"


def _labels(sample: Sample) -> str:
    return "{" + ",".join(map(_label, sample.labels)) + "}" if sample.labels else ""


def _label(label: Label) -> str:
    value = label[1].replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{label[0]}="{value}"'


def _help(text: str, openmetrics: bool) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if openmetrics else text


def number(value: float) -> str:
    """As both formats write it: whole numbers without a point."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if value == int(value) and abs(value) < _WHOLE_MAX:
        return str(int(value))
    return repr(float(value))


def negotiate(accept: str) -> str:
    """The content type for an `Accept` header: OpenMetrics only where it is wanted more."""
    wanted = {PROMETHEUS: 0.0, OPENMETRICS: 0.0}
    for each in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in each.split(";"))
        given = dict(part.partition("=")[::2] for part in parameters)
        quality = given.get("q", "1")
        weight = float(quality) if _QUALITY.fullmatch(quality) else 0.0
        if kind == "application/openmetrics-text" and given.get("version", "") in _VERSIONS:
            wanted[OPENMETRICS] = max(wanted[OPENMETRICS], weight)
        elif kind in ("text/plain", "text/*", "*/*"):
            wanted[PROMETHEUS] = max(wanted[PROMETHEUS], weight)
    return OPENMETRICS if wanted[OPENMETRICS] > wanted[PROMETHEUS] else PROMETHEUS
