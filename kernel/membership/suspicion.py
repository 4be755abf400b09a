"""How long a suspect has to refute: Lifeguard's timer, which confirmations shorten.

Source: Dadgar, Phillips, Currey, "Lifeguard: Local Health Awareness for More Accurate Failure
Detection" (2018), section 4.2, LHA-Suspicion:
`timeout(c) = max(min, max - (max - min) * log(c + 1) / log(k + 1))`.

Invariants: U1 min <= timeout(c) <= max, and it never grows with c; U2 an accuser counts once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from manifold.kernel.config import MembershipConfig


def least_ms(config: MembershipConfig, nodes: int) -> float:
    """The timeout of a suspicion with all its confirmations, in a cluster of `nodes`."""
    return config.suspicion_factor * max(1.0, math.log10(max(1, nodes))) * config.probe_ms


def wanted(config: MembershipConfig, nodes: int) -> int:
    """k: the confirmations to wait for; none where too few nodes exist that could confirm.

    Neither the first accuser nor the suspect can confirm, hence two fewer (memberlist).
    """
    return config.confirmations if nodes - 2 >= config.confirmations else 0


def timeout_ms(config: MembershipConfig, nodes: int, confirmations: int) -> float:
    """The whole time from the first accusation to the verdict."""
    least = least_ms(config, nodes)
    k = wanted(config, nodes)
    if k == 0:
        return least
    most = least * config.suspicion_max_factor
    part = math.log(min(confirmations, k) + 1) / math.log(k + 1)
    result = max(least, most - (most - least) * part)
    assert least <= result <= most, "U1"
    return result


@dataclass(slots=True)
class Suspicion:
    """A running timer. `accusers` in the order of their accusations, at most k + 1."""

    started_ms: float
    deadline_ms: float
    accusers: list[str] = field(default_factory=list)

    def confirm(self, by: str, config: MembershipConfig, nodes: int) -> bool:
        """Count `by`; True if that was news, to be told on (Lifeguard tells the first k on)."""
        if not by or by in self.accusers or len(self.accusers) > wanted(config, nodes):
            return False
        self.accusers.append(by)
        confirmations = len(self.accusers) - 1
        due_ms = self.started_ms + timeout_ms(config, nodes, confirmations)
        self.deadline_ms = min(self.deadline_ms, due_ms)  # U1, U2
        return True

    def renew(self, now_ms: float, config: MembershipConfig, nodes: int) -> None:
        """A sign of life, though no refutation yet: the time begins again, accusers count on."""
        confirmations = len(self.accusers) - 1
        self.started_ms = now_ms
        self.deadline_ms = now_ms + timeout_ms(config, nodes, confirmations)
