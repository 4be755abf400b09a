"""What an owner refuses at once, and why. Pure.

Interface rules: `check` returns where a submission may become a job, and raises `Refused` (it is
wrong) or `Busy` (it may come again) where not.
"""

from __future__ import annotations

from manifold.kernel.config import SchedulerConfig
from manifold.kernel.errors import Busy, Refused
from manifold.kernel.scheduler import blocks, outcome
from manifold.kernel.scheduler.messages import (
    INDICES_EXPLICIT_MAX,
    PARCELS_BYTES_MAX,
    JobSpec,
    SubmitJob,
)
from manifold.vm.kid import kid_of


def check(message: SubmitJob, owned: int, config: SchedulerConfig) -> None:
    """See the module. `owned` jobs are running already."""
    spec = message.spec
    if owned >= config.jobs:
        raise Busy(f"This node owns {owned} jobs already.", "Come again.", retry_ms=1000)
    if spec.hi < spec.lo:
        raise Refused(f"The range {spec.lo}:{spec.hi} ends before it starts.", "Swap its ends.")
    if spec.indices and not spec.isolate:
        raise Refused("Explicit indices are tasks of their own.", "Set isolate.")
    if spec.isolate and blocks.total(spec) > INDICES_EXPLICIT_MAX:
        raise Refused(
            f"A batch holds at most {INDICES_EXPLICIT_MAX} tasks.", "Submit several batches."
        )
    _check_parcels(spec, message)
    if kid_of(message.ir) != spec.program:
        raise Refused("The program does not have the KID it claims.", "Submit it again.")


def _check_parcels(spec: JobSpec, message: SubmitJob) -> None:
    """A call needs its arguments and a session; nothing else takes any."""
    if spec.kind == "python" and (spec.session is None or not message.parcels):
        raise Refused("A Python function needs a session and arguments.", "Use the SDK.")
    if message.parcels and (spec.kind == "entangle" or not spec.isolate):
        raise Refused(
            "Only calls and WASI programs, one for an index, take parcels.", "Use the SDK."
        )
    if message.parcels and len(message.parcels) != blocks.total(spec):
        raise Refused(
            f"There are {len(message.parcels)} parcels for {blocks.total(spec)} indices.",
            "Send one for each.",
        )
    if outcome.parcels_nbytes(message.parcels) > PARCELS_BYTES_MAX:
        raise Refused(
            f"The arguments of one job take more than {PARCELS_BYTES_MAX} bytes.",
            "Submit several jobs.",
        )
