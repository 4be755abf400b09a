"""What a node does for a job, as OpenTelemetry spans: job, place, run, reduce.

Interface rules: used from the loop's thread; nothing here waits. The pure core says what happens,
by events that carry the `traceparent` of the job's submission; time is taken here. A job without
one costs a comparison. Nothing that goes wrong here may fail a job: bounds drop spans.
The owner's `job` is a child of the client's span, `place` (one decision) and `reduce` are children
of it; the runner's `run` is a child of the place that sent it there, whose id both sides derive
from owner and attempt.
Bounds: OPEN_MAX spans that are not ended; a thread of the SDK sends at most 2 048 that wait.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from manifold.kernel import traces
from manifold.kernel.scheduler.messages import Counted, JobEvent, Placed
from manifold.kernel.traces import Parent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from manifold.kernel.node import Node
    from manifold.kernel.process.messages import Fault
    from manifold.kernel.scheduler.messages import StartRun

OPEN_MAX = 4096  # jobs and runs under way; 2 KiB each
OVER = frozenset({"done", "failed", "cancelled", "moved"})
BEGUN = frozenset({"submitted", "taken over"})


class Spans:
    """See the module. The SDK is set up by the first job that is traced."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._provider: TracerProvider | None = None
        self._tracer: Any = None
        self._next_id = 0  # of the span that is begun now; 0: any
        self._missing = False  # the extra, or its settings are wrong: said once
        self._jobs: OrderedDict[str, tuple[Any, Parent]] = OrderedDict()
        self._reduces: OrderedDict[str, Any] = OrderedDict()
        self._runs: OrderedDict[int, Any] = OrderedDict()

    def close(self) -> None:
        """Send what is left; what is under way is ended by nobody."""
        if self._provider is not None:
            traces.flush(self._provider, last=True)

    # -- the owner ----------------------------------------------------------------------------

    def job_event(self, event: JobEvent) -> None:
        """Something happened to a job of ours."""
        if event.what in BEGUN:
            self._job_begins(event)
            return
        span, _ = self._jobs.get(event.job, (None, None))
        if span is None:
            return
        if event.what not in OVER:
            span.add_event(event.what, {"detail": event.detail})
            return
        del self._jobs[event.job]
        reduce = self._reduces.pop(event.job, None)
        if reduce is not None:
            reduce.end()
        span.set_attribute("manifold.state", event.what)
        if event.what == "failed":
            self._failed(span, event.detail)
        span.end()

    def _job_begins(self, event: JobEvent) -> None:
        parent = traces.parse(event.trace)
        if parent is None:
            return
        me = self._node.identity.kid
        within = parent.child_of("job", event.job, me)
        attributes = {"manifold.job": event.job, "manifold.how": f"{event.what}: {event.detail}"}
        span = self._begin("job", parent, attributes, within.span)
        if span is not None:
            self._keep(self._jobs, event.job, (span, within))

    def placed(self, event: Placed) -> None:
        """A decision: which node has a shard, and why."""
        _, within = self._jobs.get(event.job, (None, None))
        if within is None:
            return
        attributes: dict[str, str | int | float] = {
            "manifold.job": event.job, "manifold.shard": event.shard, "manifold.try": event.tries,
            "manifold.to": event.alias, "manifold.why": event.note, "manifold.first": event.first,
            "manifold.last": event.last, "manifold.gas": event.work_gas,
        }  # fmt: skip
        number = traces.span_id(within.trace, self._node.identity.kid, event.attempt)
        span = self._begin("place", within, attributes, number, event.at_ms)
        if span is not None:
            span.end()

    def counted(self, event: Counted) -> None:
        """Every block is there: what follows is the reduction and, for some, their record."""
        _, within = self._jobs.get(event.job, (None, None))
        if within is not None and event.job not in self._reduces:
            attributes = {"manifold.job": event.job, "manifold.blocks": event.blocks}
            span = self._begin("reduce", within, attributes, 0, event.at_ms)
            self._keep(self._reduces, event.job, span)

    # -- the runner ---------------------------------------------------------------------------

    def run_begins(self, start: StartRun) -> None:
        """A slot was given a stretch of a shard."""
        parent = traces.parse(start.spec.trace)
        attempt = self._node.core.scheduler.runner.running_at(start.worker, start.run)
        if parent is None or attempt is None:
            return
        attributes = {
            "manifold.job": attempt.job, "manifold.shard": attempt.shard,
            "manifold.try": attempt.tries, "manifold.slot": start.worker,
            "manifold.kind": start.spec.kind, "manifold.first": start.first,
            "manifold.last": start.last,
        }  # fmt: skip
        within = parent.child_of(attempt.owner, attempt.attempt)
        span = self._begin("run", within, attributes)
        self._keep(self._runs, start.run, span)

    def run_aborted(self, run: int) -> None:
        if (span := self._runs.get(run)) is not None:
            span.add_event("aborted")

    def run_ends(self, run: int, fault: Fault | None = None, lost: str = "") -> None:
        """It came to its end, to a fault of its program, or its process died."""
        span = self._runs.pop(run, None)
        if span is None:
            return
        if fault is not None or lost:
            self._failed(span, lost or (fault.message if fault is not None else ""))
        span.end()

    # -- spans --------------------------------------------------------------------------------

    def _keep(self, open_spans: OrderedDict[Any, Any], key: Any, span: Any) -> None:
        if span is None:
            return
        open_spans[key] = span
        if len(open_spans) > OPEN_MAX:
            open_spans.popitem(last=False)  # never ended, so never sent

    @staticmethod
    def _failed(span: Any, why: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, why))

    def _begin(
        self, name: str, parent: Parent, attributes: Any, number: int = 0, at_ms: float = -1.0
    ) -> Any:
        """A span that began at `at_ms` of the loop's clock, or now; None without the extra."""
        if self._tracer is None and not self._set_up():
            return None
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            TraceFlags,
            set_span_in_context,
        )

        flags = TraceFlags(TraceFlags.SAMPLED)
        remote = NonRecordingSpan(SpanContext(parent.trace, parent.span, True, flags))
        late_ms = max(0.0, self._node.now_ms() - at_ms) if at_ms >= 0 else 0.0
        self._next_id = number
        return self._tracer.start_span(
            name, set_span_in_context(remote), attributes=attributes,
            start_time=time.time_ns() - int(late_ms * 1e6),
        )  # fmt: skip

    def _set_up(self) -> bool:
        if self._missing:
            return False
        spec = self._node.spec
        attributes: dict[str, str | int] = {
            "service.instance.id": self._node.identity.kid, "manifold.node": spec.alias,
            "manifold.class": spec.node_class, "manifold.cluster": spec.config.cluster,
            "manifold.boot": self._node.boot,
        }  # fmt: skip
        self._provider = traces.exporter("manifold-node", attributes, self._take_id)
        if self._provider is None:
            self._missing = True
            return False
        self._tracer = self._provider.get_tracer("manifold")
        return True

    def _take_id(self) -> int:
        """The id that others can tell of the span that is begun now, 0 where it has none."""
        number, self._next_id = self._next_id, 0
        return number
