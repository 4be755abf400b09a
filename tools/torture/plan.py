"""What the nemesis will do to a cluster, and when: a pure function of the seed.

Interface: `plan(seed, seconds, nodes, voters)` gives the steps in order of time; nodes are numbers
from 0, the first `voters` of them vote in the beginning. `str` of a step is its line for people.
Invariants: T1 equal arguments give equal plans, in every process. T2 rounds are dealt from a deck,
so that each kind of fault comes before any comes twice. T3 the last step heals everything, and
nothing but a replacement of voters is begun in the last HEAL_MS before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

What = Literal[
    "kill", "pause", "resume", "cut", "mend", "replace", "heal",
    "workers", "owner", "zygote", "slow", "clock",
]  # fmt: skip
Cut = tuple[int, int]  # messages from the first to the second are lost

SHOWN_MAX = 12  # links in the line of a step
START_MS = 800.0  # of calm, so that there is something to lose
HEAL_MS = 500.0
HOLD_MS = (300.0, 1500.0)  # how long a fault lasts
REST_MS = (150.0, 1000.0)  # and how long it is calm afterwards


@dataclass(frozen=True, slots=True)
class Slow:
    """What a link is like in one direction: each message comes late, or not at all."""

    one: int
    other: int
    latency_ms: float
    jitter_ms: float = 0.0
    loss: float = 0.0

    def __str__(self) -> str:
        return f"n{self.one}->n{self.other} {self.latency_ms:g} ms {self.loss:.0%}"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done; `nodes` of `replace` are all who vote from then on.

    `picks`, each below 1, say which of those that there are then: worker processes, running jobs.
    `jump_ms` and `rate` are what happens to the clocks of `nodes`.
    """

    at_ms: float
    what: What
    nodes: tuple[int, ...] = ()
    cuts: tuple[Cut, ...] = ()
    slow: tuple[Slow, ...] = ()
    picks: tuple[float, ...] = ()
    jump_ms: float = 0.0
    rate: float = 1.0

    def __str__(self) -> str:
        text = f"{self.at_ms / 1000:7.2f} s  {self.what}"
        if self.slow:
            text += " " + _some(", ", [str(each) for each in self.slow])
        if self.what == "workers":
            text += f" {len(self.picks)}"
        if self.what == "clock":
            text += f" +{self.jump_ms:g} ms x{self.rate:g}"
        if self.nodes:
            text += " " + " ".join(f"n{node}" for node in self.nodes)
        if self.cuts:
            text += " " + _some(" ", [f"n{one}->n{other}" for one, other in self.cuts])
        return text


def _some(between: str, links: Sequence[str]) -> str:
    more = len(links) - SHOWN_MAX
    return between.join(links[:SHOWN_MAX]) + (f"{between}and {more} more" if more > 0 else "")


def plan(seed: int, seconds: float, nodes: int, voters: int) -> tuple[Step, ...]:
    """See the module."""
    assert 1 <= voters <= nodes, "voters are nodes"
    dealer = Dealer(Random(f"torture {seed} {nodes} {voters}"), nodes, voters)
    return in_order(dealer.steps(seconds * 1000))


def in_order(steps: Iterable[Step]) -> tuple[Step, ...]:
    """T3: what would come after the end, such as to resume who is resumed by healing, does not."""
    ordered = sorted(steps, key=_order)
    ends = next(number for number, step in enumerate(ordered) if step.what == "heal")
    return tuple(ordered[: ends + 1])


def _order(step: Step) -> float:
    return step.at_ms


class Dealer:
    """Deals rounds of faults to voters and their links; others deal more (cluster_plan.py)."""

    start_ms = START_MS
    hold_ms = HOLD_MS
    rest_ms = REST_MS

    def __init__(self, random: Random, nodes: int, voters: int) -> None:
        self._random = random
        self._nodes = tuple(range(nodes))
        self._voters = tuple(range(voters))  # as it is intended
        self._most = voters
        self._deck: list[Callable[[float, float], Iterator[Step]]] = []

    def steps(self, duration_ms: float) -> Iterator[Step]:
        at_ms = self.start_ms
        while at_ms < duration_ms - HEAL_MS:
            hold_ms = min(self._span(self.hold_ms), duration_ms - at_ms)
            yield from self._round()(at_ms, hold_ms)
            at_ms += hold_ms + self._span(self.rest_ms)
        yield Step(duration_ms, "heal")

    def _span(self, range_ms: tuple[float, float]) -> float:
        return round(self._random.uniform(*range_ms), 1)

    def _round(self) -> Callable[[float, float], Iterator[Step]]:
        """T2."""
        if not self._deck:
            self._deck = self._new_deck()
            self._random.shuffle(self._deck)
        return self._deck.pop()

    def _new_deck(self) -> list[Callable[[float, float], Iterator[Step]]]:
        if len(self._nodes) == 1:
            return [self._kill_one, self._kill_all, self._pause]
        return [
            self._kill_one, self._kill_some, self._kill_all, self._pause, self._pause_long,
            self._one_way, self._lonely, self._halves, self._replace, self._replace_and_kill,
            self._everything,
        ]  # fmt: skip

    def _some(self, least: int, most: int) -> tuple[int, ...]:
        """So many voters."""
        most = max(1, min(most, len(self._voters)))
        count = self._random.randint(min(least, most), most)
        return tuple(sorted(self._random.sample(self._voters, count)))

    # -- rounds -----------------------------------------------------------------------------------

    def _kill_one(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        yield Step(at_ms, "kill", self._some(1, 1))

    def _kill_some(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        yield Step(at_ms, "kill", self._some(2, len(self._voters) - 1))

    def _kill_all(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        yield Step(at_ms, "kill", self._voters)

    def _pause(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        nodes = self._some(1, 2)
        yield Step(at_ms, "pause", nodes)
        yield Step(at_ms + hold_ms, "resume", nodes)

    def _pause_long(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """Long enough to be taken for dead, and more than a minority now and then."""
        nodes = self._some(1, len(self._voters))
        yield Step(at_ms, "pause", nodes)
        yield Step(at_ms + 2 * hold_ms, "resume", nodes)

    def _one_way(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        pairs = [(one, other) for one in self._nodes for other in self._nodes if one != other]
        count = self._random.randint(1, max(1, len(pairs) // 3))
        yield Step(at_ms, "cut", cuts=tuple(sorted(self._random.sample(pairs, count))))
        yield Step(at_ms + hold_ms, "mend")

    def _lonely(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """A voter that nobody hears and that hears nobody, or only one of the two."""
        (node,) = self._some(1, 1)
        out = tuple((node, other) for other in self._nodes if other != node)
        back = tuple((other, one) for one, other in out)
        yield Step(at_ms, "cut", cuts=self._random.choice((out, back, out + back)))
        yield Step(at_ms + hold_ms, "mend")

    def _halves(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        left = self._random.sample(self._nodes, self._random.randint(1, len(self._nodes) // 2 or 1))
        right = [node for node in self._nodes if node not in left]
        there = [(one, other) for one in sorted(left) for other in right]
        yield Step(at_ms, "cut", cuts=(*there, *((other, one) for one, other in there)))
        yield Step(at_ms + hold_ms, "mend")

    def _replace(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """One or two voters go, others come; where there are no others, fewer are left for once."""
        spare = [node for node in self._nodes if node not in self._voters]
        count = min(self._random.randint(1, 2), len(self._voters) - 1)
        keep = self._random.sample(self._voters, len(self._voters) - count)
        new = self._random.sample(spare, min(len(spare), self._most - len(keep)))
        self._voters = tuple(sorted([*keep, *new]))
        yield Step(at_ms, "replace", self._voters)

    def _replace_and_kill(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """In the middle of a change: of the old ones, or of the new ones."""
        before = self._voters
        yield from self._replace(at_ms, hold_ms)
        some = before if self._random.random() < 0.5 else self._voters
        count = self._random.randint(1, len(some))
        delay_ms = self._random.uniform(0.0, 120.0)
        yield Step(at_ms + delay_ms, "kill", tuple(sorted(self._random.sample(some, count))))

    def _everything(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        rounds = [self._kill_some, self._pause, self._one_way, self._halves, self._replace]
        self._random.shuffle(rounds)
        for each in rounds:
            yield from each(at_ms + self._random.uniform(0.0, 400.0), hold_ms)
