"""Errors of the kernel, beneath `ManifoldError`; `vm/errors.py` holds the root, Trap, Exhausted."""

from __future__ import annotations

from manifold.vm.errors import Exhausted, InvalidProgram, ManifoldError, Trap

__all__ = [
    "Busy",
    "ConfigError",
    "Exhausted",
    "InvalidProgram",
    "ManifoldError",
    "Maybe",
    "NoCluster",
    "NoMemory",
    "NotFound",
    "PeerError",
    "ProcessDied",
    "ProtocolError",
    "Refused",
    "Trap",
    "Unavailable",
    "Unsupported",
]


class ProtocolError(ManifoldError):
    """We used an interface wrongly (a bug of the caller's)."""

    code = "protocol"


class PeerError(ManifoldError):
    """The other side broke the protocol: what it sent does not decode or does not belong."""

    code = "peer"


class Unavailable(ManifoldError):
    """Nobody can answer at present: no quorum, no route, a full queue. Nothing was done."""

    code = "unavailable"


class Busy(Unavailable):
    """Admission refused the work; `retry_ms` says when to come again."""

    code = "busy"

    def __init__(self, message: str, next_step: str = "", *, retry_ms: int = 0) -> None:
        super().__init__(message, next_step)
        self.retry_ms = retry_ms


class Maybe(ManifoldError):
    """The fate of a request is unknown: it may or may not have been carried out."""

    code = "maybe"
    exit_code = 5


class ProcessDied(ManifoldError):
    """The process that ran a call ended under it; other calls are not affected."""

    code = "process_died"


class NoMemory(ProcessDied):
    """A task was ended because its node's tasks held more memory than its class has."""

    code = "no_memory"


class NoCluster(ManifoldError):
    """There is no running cluster of that name here."""

    code = "no_cluster"
    exit_code = 3


class Refused(ManifoldError):
    """The cluster understood and will not do it."""

    code = "refused"
    exit_code = 4


class NotFound(Refused):
    """No node, job or program answers to that name."""

    code = "not_found"


class Unsupported(ManifoldError):
    """This machine cannot do that."""

    code = "unsupported"
    exit_code = 2


class ConfigError(ManifoldError):
    """A configuration is refused; the message starts with `file:line:column:`."""

    code = "config"
    exit_code = 2
