"""The ring of decisions: what was compared, what won, and what became of it.

A decision is kept as it was computed, one flat array of doubles and a reference to the nodes;
the readable `Decision` is built only when somebody asks. 16 candidates of 7 doubles are 900 bytes,
so a full ring of 10 000 decisions is about 13 MB, and keeping one costs a microsecond.

Interface rules: a task placed again replaces its earlier decision; `ended` once per task.
Invariants: G6 the ring holds at most `size` decisions.
Source: the design page of geode, "Explain".
"""

from __future__ import annotations

from array import array
from math import isfinite

from manifold.kernel.geode.messages import Candidate, Decision, Refusal
from manifold.kernel.geode.view import Node
from manifold.vm.kid import Kid

FIELDS = 7  # doubles per candidate, in the order of `Record.figures`
REFUSED_MAX = 16  # refusals kept by name, the rest is counted


class Record:
    """One decision, compact. `figures`: queue, age, cost, finish ms, rate, distance, flags."""

    __slots__ = (
        "actual_ms",
        "figures",
        "finish_ms",
        "metric",
        "more",
        "nodes",
        "note",
        "now_ms",
        "refused",
        "refused_more",
        "runner_up",
        "task",
        "winner",
        "work_gas",
    )

    def __init__(
        self,
        task: str,
        now_ms: float,
        metric: str,
        work_gas: float,
        nodes: tuple[Node, ...],
        figures: list[float],
        refused: tuple[tuple[str, str], ...],
    ) -> None:
        assert len(figures) == FIELDS * len(nodes)
        self.task = task
        self.now_ms = now_ms
        self.metric = metric
        self.work_gas = work_gas
        self.nodes = nodes
        self.figures = array("d", figures)
        self.refused = refused[:REFUSED_MAX]
        self.refused_more = max(0, len(refused) - REFUSED_MAX)
        self.more = 0
        self.winner: Kid | None = None
        self.runner_up: Kid | None = None
        self.finish_ms = 0.0  # predicted, of the winner
        self.note = ""
        self.actual_ms: float | None = None

    def decision(self) -> Decision:
        candidates = tuple(candidate(node, self._of(i)) for i, node in enumerate(self.nodes))
        return Decision(
            task=self.task,
            now_ms=self.now_ms,
            metric=self.metric,
            work_gas=self.work_gas,
            refused=tuple(Refusal(alias, reason) for alias, reason in self.refused),
            refused_more=self.refused_more,
            candidates=candidates,
            candidates_more=self.more,
            winner=self.winner,
            runner_up=self.runner_up,
            note=self.note,
            actual_ms=self.actual_ms,
            regret_ms=self._regret_ms(),
        )

    def _of(self, index: int) -> list[float]:
        return list(self.figures[FIELDS * index : FIELDS * (index + 1)])

    def _regret_ms(self) -> float | None:
        """How much later it ended than the runner-up was predicted to; 0 if it ended sooner."""
        if self.actual_ms is None:
            return None
        for index, node in enumerate(self.nodes):
            if node.kid == self.runner_up:
                return max(0.0, self.actual_ms - self.figures[FIELDS * index + 3])
        return 0.0


def candidate(node: Node, figures: list[float]) -> Candidate:
    queued_gas, age_ms, cost, finish_ms, rate, distance, flags = figures
    return Candidate(
        kid=node.kid,
        alias=node.alias,
        node_class=node.node_class,
        compute=node.features.compute,
        memory=node.features.memory,
        bandwidth=node.features.bandwidth,
        latency=node.features.latency,
        distance=distance,
        slots=node.slots,
        slot_gas_per_s=rate,
        queued_gas=queued_gas,
        age_ms=age_ms,
        cost=cost,
        finish_ms=finish_ms,
        learned=bool(int(flags) & 1),
        sampled=bool(int(flags) & 2),
    )


class Ring:
    def __init__(self, size: int) -> None:
        self._size = size
        self._records: dict[str, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def keep(self, record: Record) -> None:
        self._records.pop(record.task, None)
        self._records[record.task] = record
        if len(self._records) > self._size:
            del self._records[next(iter(self._records))]
        assert len(self._records) <= self._size, "G6"

    def why(self, task: str) -> Decision | None:
        record = self._records.get(task)
        return None if record is None else record.decision()

    def ended(self, task: str, actual_ms: float) -> None:
        record = self._records.get(task)
        if record is not None and isfinite(actual_ms) and actual_ms >= 0:
            record.actual_ms = actual_ms

    def latest(self, count: int) -> tuple[str, ...]:
        """Tasks of the last decisions, newest first."""
        return tuple(task for task, _ in zip(reversed(self._records), range(count), strict=False))
