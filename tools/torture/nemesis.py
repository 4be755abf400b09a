"""Carries out a plan on a running cluster, and writes down what was true meanwhile.

Interface: `Nemesis.run(steps, begun_ms)` does each step at its time; `heal` lifts everything and
waits until all nodes are up again. `watch` runs beside it. `states` is the story: which nodes were
up, which messages were cut, who may have been voting; `stalled_ms` reads from it and from what
clients saw how long nothing succeeded although a majority lived.
Invariants: M1 what it signals is named by a pidfd. M2 rules of links are kept at both ends, and
told anew to a node that started again: it has forgotten them. M3 it never waits for a node that it
has paused. M4 every process that it ends is in `killed`; with a zygote all its nodes are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError
from manifold.kernel.nexus.messages import Answer, SetVoters
from manifold.tools.emulator.supervisor import BACKOFF_S_MIN, Supervisor, Watched
from manifold.tools.torture.history import Seen
from manifold.tools.torture.links import Links
from manifold.tools.torture.plan import Cut, Slow, Step

LOOK_S = 0.02
LINK_MS = 1000.0  # for a node to take a rule of a link
VOTERS_MS = 8000.0
UP_S = 20.0  # after healing, until every node is there
ZYGOTE = "manifold.kernel.process.zygote"

Voters = frozenset[int]


@dataclass(frozen=True, slots=True)
class State:
    """From `at_ms` on. `voters`: each set that may have been the voters then."""

    at_ms: float
    up: frozenset[int]
    cuts: frozenset[Cut]
    voters: tuple[Voters, ...]

    def majority(self) -> bool:
        """Whether some living node and the voters it can talk with make a majority of each set."""
        return any(self._carries(node) for node in sorted(self.up))

    def _carries(self, node: int) -> bool:
        near = {
            other
            for other in self.up
            if (node, other) not in self.cuts and (other, node) not in self.cuts
        }
        return all(2 * len(near & voters) > len(voters) for voters in self.voters)


class Nemesis:
    """See the module. `say` is given a line for people with each step."""

    def __init__(
        self, supervisor: Supervisor, links: Links, voters: int, say: Callable[[str], None]
    ) -> None:
        self._supervisor, self._links, self._say = supervisor, links, say
        self._aliases = links.aliases
        self._paused: set[int] = set()
        self._cuts: frozenset[Cut] = frozenset()
        self._voters: tuple[Voters, ...] = (frozenset(range(voters)),)
        self._slow: dict[Cut, Slow] = {}
        # By node and peer: the boot that was told, and the rule; None: perhaps it was.
        self._told: dict[tuple[int, int], tuple[int, m.SetLink | None]] = {}
        self._telling = 0
        self._boots: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._zygotes_ms: list[float] = []  # when one was killed
        self.killed: set[int] = set()  # pids
        self.faults: Counter[str] = Counter()
        self.states: list[State] = []

    # -- the story --------------------------------------------------------------------------------

    async def watch(self) -> None:
        """For ever: note what changes."""
        while True:
            self._look()
            await asyncio.sleep(LOOK_S)

    def _look(self) -> None:
        up = frozenset(
            node
            for node in range(len(self._aliases))
            if self._node(node).ready is not None and node not in self._paused
        )
        last = self.states[-1] if self.states else None
        now = State(self._now_ms(), up, self._cuts, self._voters)
        if last is None or (last.up, last.cuts, last.voters) != (up, self._cuts, self._voters):
            self.states.append(now)
        for node in sorted(up):
            ready = self._node(node).ready
            assert ready is not None, "it is up"
            if self._boots.get(node, ready.boot) != ready.boot:
                self._links.forget(node)
            self._boots[node] = ready.boot
            if self._rules_missing(node):
                self._begin(self._tell_rules(node))

    @staticmethod
    def _now_ms() -> float:
        return asyncio.get_running_loop().time() * 1000

    def _node(self, number: int) -> Watched:
        return self._supervisor.nodes[self._aliases[number]]

    # -- steps ------------------------------------------------------------------------------------

    async def run(self, steps: Sequence[Step], begun_ms: float) -> None:
        for step in steps:
            await asyncio.sleep(max(0.0, begun_ms + step.at_ms - self._now_ms()) / 1000)
            if step.what != "heal":
                self._do(step)

    def _do(self, step: Step) -> None:
        self._say(str(step))
        self.faults[step.what] += 1
        match step.what:
            case "kill":
                for node in step.nodes:
                    self._kill(node)
            case "pause":
                for node in step.nodes:
                    self._pause(node)
            case "resume":
                for node in step.nodes:
                    self._resume(node)
            case "cut":
                self._cuts |= frozenset(step.cuts)
            case "slow":
                self._slow |= {(each.one, each.other): each for each in step.slow}
            case "mend":
                self._cuts = frozenset()
                self._slow.clear()
            case "replace":
                self._begin(self._replace(step.nodes))
            case "owner":
                self._begin(self._kill_owner(step.picks[0]))
            case "workers":
                self._kill_workers(step.picks)
            case "zygote":
                self._kill_zygote()
            case "clock":
                for node in step.nodes:
                    self._begin(self._skew(node, step.jump_ms, step.rate))
        self._look()

    def _signal(self, node: int, number: signal.Signals) -> bool:
        """M1. Whether there was a process."""
        watched = self._node(node)
        if watched.pidfd < 0:
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(watched.pidfd, number)
            return True
        return False

    def _kill(self, node: int) -> None:
        watched = self._node(node)
        watched.backoff_s = BACKOFF_S_MIN  # it is not the node that keeps failing
        if self._signal(node, signal.SIGKILL):
            self.killed.add(watched.pid)
            self.faults["killed nodes"] += 1
        self._paused.discard(node)

    def _pause(self, node: int) -> None:
        if self._node(node).ready is not None and self._signal(node, signal.SIGSTOP):
            self._paused.add(node)

    def _resume(self, node: int) -> None:
        if node in self._paused:
            self._signal(node, signal.SIGCONT)
            self._paused.discard(node)

    async def _skew(self, node: int, jump_ms: float, rate: float) -> None:
        """Where it hears us. A process that starts has a clock as it should be."""
        if node in self._paused:
            return
        with contextlib.suppress(ManifoldError):
            await self._links.ask(node, m.SkewClock(jump_ms, rate), LINK_MS)
            self.faults["skewed clocks"] += 1

    async def _kill_owner(self, pick: float) -> None:
        """Of one of the jobs that run, as some node that is up knows them."""
        for node in sorted(self.states[-1].up):
            try:
                answer = await self._links.ask(node, m.AllJobs(), LINK_MS)
            except ManifoldError:
                continue
            owners = [job.owner for job in answer.jobs if job.state == "running"]
            if owners:
                self._kill_kid(owners[int(pick * len(owners))])
            return

    def _kill_kid(self, kid: str) -> None:
        for node in range(len(self._aliases)):
            ready = self._node(node).ready
            if ready is not None and ready.kid == kid:
                self.faults["killed owners"] += 1
                self._kill(node)

    def _kill_workers(self, picks: Sequence[float]) -> None:
        """Of those that there are; a node that is being forked looks like one, and may be hit."""
        for pick in picks:
            nodes = {each.pid for each in self._supervisor.nodes.values()}
            workers = [pid for pid in self._forked() if pid not in nodes]
            if workers and self._signal_pid(workers[int(pick * len(workers))]):
                self.faults["killed workers"] += 1

    def _kill_zygote(self) -> None:
        """Every process of the cluster on this host ends with it."""
        zygote = self._zygote()
        if zygote is None or not self._signal_pid(zygote.pid):
            return
        self._zygotes_ms.append(self._now_ms())
        for node in range(len(self._aliases)):
            watched = self._node(node)
            watched.backoff_s = BACKOFF_S_MIN
            self.killed.add(watched.pid)  # M4
        self._paused.clear()

    def _zygote(self) -> psutil.Process | None:
        """The parent of the nodes."""
        for watched in self._supervisor.nodes.values():
            if watched.pidfd >= 0:
                with contextlib.suppress(psutil.Error):
                    parent = psutil.Process(watched.pid).parent()
                    if parent is not None and ZYGOTE in parent.cmdline():
                        return parent
        return None

    def _forked(self) -> list[int]:
        zygote = self._zygote()
        with contextlib.suppress(psutil.Error):
            return sorted(each.pid for each in zygote.children()) if zygote is not None else []
        return []

    def _signal_pid(self, pid: int) -> bool:
        """M1, M4: SIGKILL to a process that we have just seen."""
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)
            self.killed.add(pid)
            return True
        return False

    def forking(self, at_ms: float, within_ms: float) -> bool:
        """Whether that was just after a zygote was killed."""
        return any(0.0 <= at_ms - killed_ms <= within_ms for killed_ms in self._zygotes_ms)

    def _begin(self, coroutine: object) -> None:
        assert asyncio.iscoroutine(coroutine)
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    # -- links ------------------------------------------------------------------------------------

    def _rule(self, node: int, peer: int) -> m.SetLink:
        """That node's side of the link to its peer."""
        slow = self._slow.get((node, peer), Slow(node, peer, 0.0))
        return m.SetLink(
            self._aliases[peer], slow.loss, slow.latency_ms,
            cut_to=(node, peer) in self._cuts, cut_from=(peer, node) in self._cuts,
        )  # fmt: skip

    def _rules_missing(self, node: int) -> list[tuple[int, m.SetLink]]:
        """M2: rules of that node which its present process was not told. Nothing is taken for
        granted: what was sent to the process before it may have reached this one."""
        ready = self._node(node).ready
        assert ready is not None, "it is up"
        missing = []
        for peer in range(len(self._aliases)):
            rule = self._rule(node, peer)
            boot, told = self._told.get((node, peer), (0, None))
            if peer != node and rule != (told if boot == ready.boot else None):
                missing.append((peer, rule))
        return missing

    async def _tell_rules(self, node: int) -> None:
        ready = self._node(node).ready
        if ready is None or node in self._paused:
            return
        rules = self._rules_missing(node)
        for peer, rule in rules:
            self._told[node, peer] = (ready.boot, rule)
        peers = (peer for peer in range(len(self._aliases)) if peer != node)
        whole = all(self._rule(node, peer) == m.SetLink(self._aliases[peer]) for peer in peers)
        orders: list[m.SetLink | m.ClearLinks] = [rule for _, rule in rules]
        orders = [m.ClearLinks()] if whole else orders
        asked = [self._links.ask(node, order, LINK_MS) for order in orders]
        self._telling += 1
        answers = await asyncio.gather(*asked, return_exceptions=True)
        self._telling -= 1
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in failed:
            if not isinstance(error, ManifoldError):  # else it was killed, or paused, or is slow
                raise error
        for peer, _ in rules if failed else ():
            self._told[node, peer] = (ready.boot, None)

    # -- voters -----------------------------------------------------------------------------------

    async def _replace(self, nodes: Sequence[int]) -> None:
        """Ask one node, and another where that fails; who goes on with it is their business."""
        wanted = frozenset(nodes)
        kids = [ready.kid for n in nodes if (ready := self._node(n).ready) is not None]
        self._voters = (*(each for each in self._voters if each != wanted), wanted)
        self._look()
        outcome = "one of them is down"
        if len(kids) == len(nodes):
            outcome = await self._set_voters(tuple(sorted(kids)))
        if outcome == "ok":
            self._voters = (wanted,)
        self.faults[f"replace: {outcome}"] += 1
        self._look()

    async def _set_voters(self, kids: tuple[str, ...]) -> str:
        for node in sorted(self.states[-1].up):
            try:
                answer = await self._links.ask(
                    node, SetVoters(kids, VOTERS_MS), VOTERS_MS + LINK_MS
                )
            except ManifoldError:
                continue
            assert isinstance(answer, Answer), f"voters are answered by {answer!r}"
            if answer.status == "ok":
                return "ok"
        return "not known"

    # -- the end ----------------------------------------------------------------------------------

    async def heal(self) -> float:
        """Lift everything; the time when every node was up and had been told."""
        self._told.clear()
        for node in sorted(self._paused):
            self._resume(node)
        self._cuts = frozenset()
        self._slow.clear()
        async with asyncio.timeout(UP_S):
            while not self._well():
                self._look()
                await asyncio.sleep(LOOK_S)
        self._look()
        return self._now_ms()

    def _well(self) -> bool:
        nodes = range(len(self._aliases))
        told = all(self._node(n).ready is not None and not self._rules_missing(n) for n in nodes)
        return told and not self._telling

    async def close(self) -> None:
        for node in sorted(self._paused):
            self._resume(node)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def stalled_ms(
    states: Sequence[State], seen: Sequence[Seen], until_ms: float
) -> tuple[float, float]:
    """The longest time without progress while a majority lived, and when that was."""
    done = sorted(each.ended_ms for each in seen if each.final)
    worst, when_ms = 0.0, 0.0
    for begin_ms, end_ms in _good(states, until_ms):
        last_ms = begin_ms
        for at_ms in [*(each for each in done if begin_ms < each < end_ms), end_ms]:
            if at_ms - last_ms > worst:
                worst, when_ms = at_ms - last_ms, last_ms
            last_ms = at_ms
    return worst, when_ms


def _good(states: Sequence[State], until_ms: float) -> list[tuple[float, float]]:
    """The spans in which a majority lived without a break."""
    spans: list[tuple[float, float]] = []
    since_ms: float | None = None
    for state in states:
        if state.majority():
            since_ms = state.at_ms if since_ms is None else since_ms
        elif since_ms is not None:
            spans.append((since_ms, state.at_ms))
            since_ms = None
    if since_ms is not None:
        spans.append((since_ms, max(since_ms, until_ms)))
    return spans
