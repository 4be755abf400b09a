"""What the nemesis will do to a cluster that works, and when: a pure function of the seed.

Interface: `plan(seed, seconds, nodes, voters)`, as in plan.py, with whose rounds it shares a deck;
here they hit any node, not voters alone, last longer, and leave more time to work in between.
Added: SIGKILL of workers, of the node that owns a job, of every node, of the zygote; links that
flap, and links that are slow and lose messages; clocks that jump and go at rates of their own.
Invariants: those of plan.py (T1 T2 T3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from manifold.tools.torture.plan import Dealer, Slow, Step, in_order

LATENCY_MS = (2.0, 120.0)  # of a slow link, one way
JUMP_MS_MAX = 4000.0  # of a clock: as far as SWIM waits, and twice as far as the scheduler
RATES = (0.93, 1.07)  # of clocks: what depends on them allows for a tenth
LOSS_MAX = 0.2  # of its messages
FLAPS = (3, 7)  # times that a link goes and comes back
WORKERS_MAX = 4
LOST_BACK_MS = (100.0, 400.0)  # a flapping link is down, or up, for so long


def plan(seed: int, seconds: float, nodes: int, voters: int) -> tuple[Step, ...]:
    """See the module."""
    assert nodes >= 2 and 1 <= voters <= nodes, "voters are nodes"
    dealer = _Dealer(Random(f"torture cluster {seed} {nodes} {voters}"), nodes, voters)
    return in_order(dealer.steps(seconds * 1000))


class _Dealer(Dealer):
    start_ms = 1500.0
    hold_ms = (500.0, 3000.0)
    rest_ms = (500.0, 2500.0)

    def _new_deck(self) -> list[Callable[[float, float], Iterator[Step]]]:
        return [
            self._kill_one, self._kill_some, self._kill_workers, self._kill_owner,
            self._kill_owner_twice, self._kill_everybody, self._kill_zygote,
            self._pause, self._pause_long, self._one_way, self._lonely, self._halves, self._flap,
            self._slow, self._slow_all, self._clocks, self._replace, self._replace_and_kill,
            self._everything,
        ]  # fmt: skip

    def _some(self, least: int, most: int) -> tuple[int, ...]:
        """So many nodes, voters or not."""
        most = max(1, min(most, len(self._nodes)))
        count = self._random.randint(min(least, most), most)
        return tuple(sorted(self._random.sample(self._nodes, count)))

    def _pick(self) -> float:
        """One of those that there will be, as a share below 1 of their number."""
        return self._random.randrange(1000) / 1000

    # -- rounds -----------------------------------------------------------------------------------

    def _kill_everybody(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """As when the power fails."""
        yield Step(at_ms, "kill", self._nodes)

    def _kill_zygote(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        yield Step(at_ms, "zygote")

    def _kill_workers(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        for delay_ms in (0.0, hold_ms / 2):
            count = self._random.randint(1, WORKERS_MAX)
            picks = tuple(self._pick() for _ in range(count))
            yield Step(at_ms + delay_ms, "workers", picks=picks)

    def _kill_owner(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        yield Step(at_ms, "owner", picks=(self._pick(),))

    def _kill_owner_twice(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """And who has taken its jobs over."""
        yield from self._kill_owner(at_ms, hold_ms)
        yield from self._kill_owner(at_ms + self._random.uniform(300.0, 1500.0), hold_ms)

    def _flap(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """The links around one node go and come back."""
        (node,) = self._some(1, 1)
        out = tuple((node, other) for other in self._nodes if other != node)
        back = tuple((other, one) for one, other in out)
        for _ in range(self._random.randint(*FLAPS)):
            yield Step(at_ms, "cut", cuts=out + back)
            at_ms += self._span(LOST_BACK_MS)
            yield Step(at_ms, "mend")
            at_ms += self._span(LOST_BACK_MS)

    def _slow(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """The links around one node."""
        (node,) = self._some(1, 1)
        others = [other for other in self._nodes if other != node]
        pairs = [(node, other) for other in others] + [(other, node) for other in others]
        yield Step(at_ms, "slow", slow=tuple(self._bad(one, other) for one, other in pairs))
        yield Step(at_ms + hold_ms, "mend")

    def _slow_all(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """A few links anywhere, each in its own way."""
        pairs = [(one, other) for one in self._nodes for other in self._nodes if one != other]
        count = self._random.randint(1, max(1, len(pairs) // 2))
        chosen = sorted(self._random.sample(pairs, count))
        yield Step(at_ms, "slow", slow=tuple(self._bad(one, other) for one, other in chosen))
        yield Step(at_ms + hold_ms, "mend")

    def _clocks(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        """Some jump ahead; from then on each goes at its own rate, until it starts again."""
        for node in self._some(1, len(self._nodes)):
            jump_ms = self._span((0.0, JUMP_MS_MAX)) if self._random.random() < 0.5 else 0.0
            rate = round(self._random.uniform(*RATES), 3)
            yield Step(at_ms, "clock", (node,), jump_ms=jump_ms, rate=rate)
            at_ms += self._random.uniform(0.0, hold_ms / 4)

    def _bad(self, one: int, other: int) -> Slow:
        latency_ms = self._span(LATENCY_MS)
        return Slow(
            one, other, latency_ms, round(latency_ms / 4, 1),
            round(self._random.uniform(0.0, LOSS_MAX), 3),
        )  # fmt: skip

    def _everything(self, at_ms: float, hold_ms: float) -> Iterator[Step]:
        rounds = [
            self._kill_some, self._kill_workers, self._kill_owner, self._pause, self._one_way,
            self._slow_all, self._replace,
        ]  # fmt: skip
        self._random.shuffle(rounds)
        for each in rounds:
            yield from each(at_ms + self._random.uniform(0.0, 800.0), hold_ms)
