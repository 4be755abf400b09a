"""From the configuration to the rules of the links between its nodes. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from manifold.kernel.config import Config, NodeClass
from manifold.kernel.hyperbus.rules import LinkRule


def of_config(config: Config, *, cables: bool = False) -> tuple[LinkRule, ...]:
    """The rules of a configuration: those of its classes, where they are wanted, go first.

    `cables`: nodes hang on real ones that keep the rates of the classes.
    """
    rows = tuple(
        LinkRule(
            *row.sides, row.one_way, row.latency_ms, row.jitter_ms, row.rate, row.loss,
            row.reorder, row.cut,
        )
        for row in config.links.rules
    )  # fmt: skip
    return (*(_of_classes(config.classes, cables) if config.links.classes == "on" else ()), *rows)


def _of_classes(classes: tuple[NodeClass, ...], cables: bool) -> Iterator[LinkRule]:
    """Each node hangs on a switch by the link of its class: both are crossed."""
    for at, one in enumerate(classes):
        for other in classes[at:]:
            rate_bps = 0.0 if cables else min(one.bandwidth, other.bandwidth)
            latency_ms = one.latency + other.latency
            yield LinkRule(one.name, other.name, latency_ms=latency_ms, rate_bps=rate_bps)
