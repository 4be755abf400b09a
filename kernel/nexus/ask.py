"""How other subsystems of a node use Nexus: by an effect, answered by a call.

Interface: a subsystem returns `Notify(Ask(token, request))`; the node's core passes the request to
Nexus and calls the subsystem's `answered(token, answer, now_ms)` with each answer: once for an
operation, again and again for a watch. Tokens are the subsystem's own. Nothing of it is durable:
after a restart of the process nobody is answered.
"""

from __future__ import annotations

from dataclasses import dataclass

from manifold.kernel.nexus.messages import Request


@dataclass(frozen=True, slots=True)
class Ask:
    """See the module."""

    token: int
    request: Request
