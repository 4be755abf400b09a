"""Errors across the wire: a `ManifoldError` to a `Failure` and back, by its code."""

from __future__ import annotations

from manifold.kernel import errors
from manifold.kernel.errors import ManifoldError
from manifold.kernel.hyperbus.messages import Failure

_BY_CODE: dict[str, type[ManifoldError]] = {
    kind.code: kind
    for kind in (
        errors.ProtocolError,
        errors.PeerError,
        errors.Unavailable,
        errors.Busy,
        errors.Maybe,
        errors.ProcessDied,
        errors.NoMemory,
        errors.NoCluster,
        errors.Refused,
        errors.NotFound,
        errors.Unsupported,
        errors.ConfigError,
        errors.Trap,
        errors.Exhausted,
        errors.InvalidProgram,
    )
}


def to_failure(error: ManifoldError) -> Failure:
    retry_ms = error.retry_ms if isinstance(error, errors.Busy) else 0
    return Failure(error.code, error.message[:65_536], error.next_step[:4096], retry_ms)


def to_error(failure: Failure) -> ManifoldError:
    """The error again; a code that is not known here becomes the root, with the same code."""
    kind = _BY_CODE.get(failure.code, ManifoldError)
    error = kind(failure.message, failure.next_step)
    error.code = failure.code
    if isinstance(error, errors.Busy):
        error.retry_ms = failure.retry_ms
    return error
