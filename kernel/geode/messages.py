"""What geode says and what it can be asked: demands, load reports, explained decisions.

Interface rules:
  - every struct here can travel; decoding checks the bounds, building one in this process does
    not, so `Geode.report` looks at every figure again;
  - rates are gas per second of ONE slot (a worker), queues are gas of the whole node;
  - a `Demand` separates what must hold (booleans) from what is wanted (`compute`, `memory`,
    `bandwidth`, 0 to 1 on the scales of `features.py`): only the latter is ever distance.

Source: the design page of geode, sections "Rule", "Admission" and "Explain".
"""

from typing import Annotated, Any

import msgspec

from manifold.vm.kid import Kid, short

MAX_TEXT = 128  # characters of an alias, class, label, architecture or task id
MAX_LABELS = 32  # wishes of one demand: twice as many as a node has labels
MAX_HOLDERS = 64  # nodes named as holding the input, or excluded: a few replicas, a few attempts
MAX_CANDIDATES = 256  # a full view, the most that one decision can have compared
MAX_SLOTS = 4096  # workers of one node: 256 cores with a generous factor of 16
MIN_RATE = 1e-3  # gas/s; slower is nonsense, and a division by it need not stay finite
MAX_GAS = 1e24  # gas in a queue: 10^10 gas/s for three million years; beyond it is nonsense

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Gas = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_GAS)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_SLOTS)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
Kids = Annotated[tuple[Kid, ...], msgspec.Meta(max_length=MAX_HOLDERS)]


class Demand(msgspec.Struct, frozen=True, array_like=True, tag="g.demand"):
    """What a task needs (hard), wants (soft, 0 to 1) and costs (gas, bytes)."""

    work_gas: Gas = 0.0
    program: Kid | None = None
    node: Text = ""  # this alias or KID and no other
    node_class: Text = ""
    needs_gpu: bool = False
    arch: Text = ""
    memory_bytes: Bytes = 0
    cores: Count = 0
    # Wishes: `site=a`, `ssd`, `!ssd` (kernel/labels.py); all of them have to be met.
    labels: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_LABELS)] = ()
    exclude: Kids = ()  # nodes that must not get it: they failed it, or hold its twin
    compute: Share = 0.0
    memory: Share = 0.0
    bandwidth: Share = 0.0
    input_bytes: Bytes = 0
    held_by: Kids = ()  # nodes that have the input already


class LoadReport(msgspec.Struct, frozen=True, array_like=True, tag="g.load"):
    """What a node says of itself; gossiped, and piggy-backed on every result."""

    queued_gas: Gas = 0.0  # waiting and running, what is left of it
    slots: Count = 1
    free_slots: Count = 0
    credits: Count = MAX_SLOTS  # shards it would still admit (design, "Admission")
    free_memory_bytes: Bytes = 1 << 60
    gas_per_s: Gas = 0.0  # measured speed of one slot; 0 is unknown
    t_mono_ms: float = 0.0  # of its own clock, for display; never compared with any other


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="g.refusal"):
    """A node that the hard filter struck out, and the first constraint that it misses."""

    alias: str
    reason: str


class Candidate(msgspec.Struct, frozen=True, array_like=True, tag="g.candidate"):
    """A node that passed the filter, as it was seen when the decision was taken."""

    kid: Kid
    alias: str
    node_class: str
    compute: float  # coordinates, 0 to 1
    memory: float
    bandwidth: float
    latency: float
    distance: float  # shortfall; 0 where a learned rate has replaced geometry
    slots: int
    slot_gas_per_s: float  # predicted for this program, geometry included
    queued_gas: float  # q-hat: last report, shrunk by age, plus own dispatches since
    age_ms: float  # of the report; -1 where the node has never reported
    cost: float  # what was minimised: seconds, or the seed's figure
    finish_ms: float  # predicted, from the decision to the result
    learned: bool  # the rate was observed for this program, not derived from coordinates
    sampled: bool  # it was among those compared

    @property
    def gas_per_s(self) -> float:
        """Of the whole node: what mitosis cuts shards in proportion to."""
        return self.slots * self.slot_gas_per_s

    def to_dict(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)


class Decision(msgspec.Struct, frozen=True, array_like=True, tag="g.decision"):
    """One placement, explained: `manifold why TASK` prints it."""

    task: str
    now_ms: float
    metric: str
    work_gas: float
    refused: tuple[Refusal, ...]
    refused_more: int  # struck out beyond those listed
    candidates: Annotated[tuple[Candidate, ...], msgspec.Meta(max_length=MAX_CANDIDATES)]
    candidates_more: int  # passed the filter but were neither sampled nor listed
    winner: Kid | None
    runner_up: Kid | None
    note: str = ""  # what else decided: "shard 3 of 16", "stolen from compute-02"
    actual_ms: float | None = None
    regret_ms: float | None = None  # how much sooner the runner-up was predicted to finish

    def candidate(self, kid: Kid | None) -> Candidate | None:
        return next((each for each in self.candidates if each.kid == kid), None)

    def to_dict(self) -> dict[str, Any]:
        plain = msgspec.structs.asdict(self)
        plain["refused"] = [msgspec.structs.asdict(each) for each in self.refused]
        plain["candidates"] = [each.to_dict() for each in self.candidates]
        return plain

    def text(self) -> str:
        """Readable lines, the best candidate first."""
        ranked = sorted(self.candidates, key=lambda each: (not each.sampled, each.cost))
        lines = [f"task {self.task}: {self._outcome()}"]
        lines += [f"  note: {self.note}"] if self.note else []
        lines.append(f"  metric {self.metric}, work {self.work_gas:.4g} gas, compared:")
        lines += [self._line(each) for each in ranked]
        if self.candidates_more:
            lines.append(f"  and {self.candidates_more} more that were not sampled")
        lines += [f"  refused {each.alias}: {each.reason}" for each in self.refused]
        if self.refused_more:
            lines.append(f"  and {self.refused_more} more refused")
        if self.actual_ms is not None:
            lines.append(f"  took {self.actual_ms:.1f} ms, regret {self.regret_ms or 0.0:.1f} ms")
        return "\n".join(lines)

    def _outcome(self) -> str:
        winner = self.candidate(self.winner)
        if winner is None:
            return "no node may take it" if self.winner is None else f"on {short(self.winner)}"
        second = self.candidate(self.runner_up)
        rest = f", runner-up {second.alias} at {second.finish_ms:.1f} ms" if second else ""
        return f"on {winner.alias}, predicted {winner.finish_ms:.1f} ms{rest}"

    def _line(self, each: Candidate) -> str:
        mark = "*" if each.kid == self.winner else "+" if each.kid == self.runner_up else " "
        age = "never reported" if each.age_ms < 0 else f"seen {each.age_ms:.0f} ms ago"
        known = "learned" if each.learned else f"shortfall {each.distance:.3f}"
        passed = "" if each.sampled else ", not sampled"
        return (
            f"  {mark} {each.alias:<16} {each.finish_ms:>9.1f} ms"
            f"  queue {round(each.queued_gas):.4g} gas,"
            f" {each.slots} x {each.slot_gas_per_s:.4g} gas/s ({known}), {age}, at (compute"
            f" {each.compute:.2f}, memory {each.memory:.2f}, bandwidth {each.bandwidth:.2f},"
            f" latency {each.latency:.2f}){passed}"
        )


Message = Demand | LoadReport | Decision
