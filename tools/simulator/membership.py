"""Membership in the simulator: how a node boots, and what is judged from outside.

The checkers read what goes over the wire, what is durable, what `Notify` tells, and which
processes really run; they ask a machine for its view only to see whether the views agree.
  C1 no false death: with no faults nobody who runs is held for suspect or dead;
  C2 no resurrection: in one process's eyes a belief only grows, so dead(i) yields to j > i alone;
  C3 nobody but the subject raises its incarnation: no belief is ahead of what its process claimed;
  C4 incarnations grow over the crashes of a node, and none leaves before it is durable;
  C5 after healing all views agree with what really runs, within O(log N) periods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from manifold.kernel.config import MembershipConfig
from manifold.kernel.effects import Send
from manifold.kernel.membership.messages import (
    Leave,
    Me,
    Member,
    MemberChanged,
    Message,
    State,
    Update,
    saved_incarnation,
)
from manifold.kernel.membership.probing import SCORE_MAX
from manifold.kernel.membership.protocol import RECONNECT_PROBES, Membership
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.protocols import Checker, Factory, Protocols, Roster
from manifold.tools.simulator.world import Node, World
from manifold.vm.kid import Kid, short

SEEDS = 3  # every node is told of these first ones; restarts find the cluster by any that is up
WARM_ABOVE = 128  # larger clusters start from what an earlier life knew: N^2 introductions are slow
CRASH_AT_MS = 5000.0
CUT_AT_MS = 12_000.0
CUT_MS = 6000.0
COLD_STARTERS = 4  # and so many of their nodes know only the seeds

View = Callable[[object], Membership]


def node_of(index: int, kid: Kid, boot: int) -> Me:
    """Four classes in turn, as in the default cluster."""
    name = ("sensor", "board", "server", "accelerator")[index % 4]
    return Me(kid, boot, f"{name}-{index:04}", name, (f"sim://{index}",), cores=1 + index % 4)


def known_before(roster: Roster) -> tuple[Update, ...]:
    """The snapshot of a first boot's converged cluster."""
    return tuple(
        Update(kid, 1, 1, State.ALIVE, "", node_of(index, kid, 1).meta)
        for index, kid in enumerate(roster.kids)
    )


def membership_only(
    roster: Roster,
    config: MembershipConfig | None = None,
    machine: type[Membership] = Membership,
) -> Protocols:
    """Membership and nothing else on each node. A mutant of `machine` must be caught."""
    settings = config or MembershipConfig()
    place = {kid: index for index, kid in enumerate(roster.kids)}
    warm = known_before(roster) if len(roster.kids) > WARM_ABOVE else ()

    def boot(
        kid: Kid, number: int, durable: dict[str, bytes], random: Random, now_ms: float
    ) -> Membership:
        index = place[kid]
        known = warm if number == 1 and index < len(roster.kids) - COLD_STARTERS else ()
        return machine(
            node_of(index, kid, number),
            settings,
            random,
            incarnation=saved_incarnation(durable.get("incarnation")),
            seeds=roster.addresses[:SEEDS],
            known=known,
        )

    return Protocols(
        boot=boot,
        messages=Message,
        workload=_workload,
        checkers=checkers(settings, len(roster.kids)),
        duration_ms=60_000.0 if len(roster.kids) <= WARM_ABOVE else 30_000.0,
    )


def _workload(world: World) -> None:
    """A few nodes die for good at one time, and a few are cut off for a while."""
    few = max(1, len(world.nodes) // 200)
    victims = world.random.sample(world.nodes, min(2 * few, len(world.nodes)))
    for node in victims[:few]:
        world.at(CRASH_AT_MS, _kill, world, node)
    if not world.faults.quiet:
        world.at(CUT_AT_MS, world.partition, victims[few:], CUT_MS)


def _kill(world: World, node: Node) -> None:
    if node.up:
        world.crash(node)


def factory(config: MembershipConfig, machine: type[Membership] = Membership) -> Factory:
    """`membership_only` with another configuration, or a mutant."""
    return lambda roster: membership_only(roster, config, machine)


def checkers(config: MembershipConfig, nodes: int, view: View | None = None) -> list[Checker]:
    """All of them; `view` finds the membership machine in a composite one."""
    return [Beliefs(), Incarnations(), Detection(), Agreement(config, nodes, view or _itself)]


def _itself(machine: object) -> Membership:
    assert isinstance(machine, Membership), "give a view for a composite machine"
    return machine


class Beliefs:
    """C1, C2, C3, from the changes each process tells of."""

    name = "no false death without faults, no resurrection, only the subject raises itself"
    settle_ms = 0.0

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._last: dict[tuple[int, int, Kid], tuple[int, int, int]] = {}

    def watch(self, world: World, faults: Faults) -> None:
        self._world = world
        world.on_notify.setdefault(MemberChanged, []).append(self._changed)

    def settled(self, world: World, well: Sequence[Node]) -> str:
        return ""

    def summary(self) -> str:
        return self.name

    def _changed(self, viewer: Node, event: MemberChanged) -> None:
        member = event.member
        key = (viewer.index, viewer.boot, member.kid)
        belief = (member.boot, member.incarnation, int(member.state))
        last = self._last.get(key, (-1, -1, -1))
        if belief < last:
            self._fail(f"C2 {self._at(viewer)} believed {last} of {self._name(member)}", belief)
        self._last[key] = max(belief, last)
        subject = self._world.node(member.kid)
        if member.boot > max(1, subject.boot):  # the first may be of a snapshot
            self._fail(f"C3 {self._at(viewer)} believes in boot {member.boot}", subject.boot)
        accused = member.state in (State.SUSPECT, State.DEAD)
        runs = subject.up and subject.boot == member.boot
        if accused and runs and not self._world.disturbed:
            self._fail(f"C1 {self._at(viewer)} holds {self._name(member)} for", member.state.name)

    def _fail(self, what: str, value: object) -> None:
        self.failures.append(f"{what}: {value}")

    def _at(self, node: Node) -> str:
        return f"t={self._world.now_ms:.0f} node {node.index}"

    def _name(self, member: Member) -> str:
        return f"{member.meta.alias} ({short(member.kid)})"


class Incarnations:
    """C3, C4, from what goes over the wire and what is durable."""

    name = (
        "incarnations grow over crashes, none leaves before it is durable, nobody else raises one"
    )
    settle_ms = 0.0

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._claimed: dict[Kid, int] = {}  # the highest ever claimed by the node itself
        self._by_process: dict[tuple[Kid, int], int] = {}

    def watch(self, world: World, faults: Faults) -> None:
        self._world = world
        self._before: dict[Kid, int] = {}  # what former processes had claimed
        world.on_send.append(self._sent)
        world.on_boot.append(self._booted)

    def settled(self, world: World, well: Sequence[Node]) -> str:
        return ""

    def summary(self) -> str:
        return self.name

    def _booted(self, node: Node) -> None:
        self._before[node.kid] = self._claimed.get(node.kid, 0)

    def _sent(self, node: Node, send: Send) -> None:
        message = send.message
        if isinstance(message, Leave):
            self._claim(node, message.incarnation)
        for update in getattr(message, "updates", ()):
            if update.kid == node.kid and update.boot == node.boot:
                self._claim(node, update.incarnation)
            else:
                claimed = self._by_process.get((update.kid, update.boot), 0)
                if update.incarnation > claimed and not self._warm(update):
                    self._fail(f"C3 {self._at(node)} raises {short(update.kid)}", claimed, update)

    def _claim(self, node: Node, incarnation: int) -> None:
        key = (node.kid, node.boot)
        last = self._by_process.get(key, 0)
        if incarnation == last:
            return
        if incarnation < last:
            self._fail(f"C4 {self._at(node)} goes back", last, incarnation)
        if incarnation <= self._before[node.kid]:
            self._fail(f"C4 {self._at(node)} repeats", self._before[node.kid], incarnation)
        durable = saved_incarnation(node.disk.read("incarnation"))
        if incarnation > durable:
            self._fail(f"C4 {self._at(node)} claims before it is durable", durable, incarnation)
        self._by_process[key] = max(last, incarnation)
        self._claimed[node.kid] = max(incarnation, self._claimed.get(node.kid, 0))

    def _warm(self, update: Update) -> bool:
        """A snapshot's node that has not spoken yet."""
        return (update.boot, update.incarnation) == (1, 1)

    def _fail(self, what: str, known: object, value: object) -> None:
        self.failures.append(f"{what}: {known} -> {value}")

    def _at(self, node: Node) -> str:
        return f"t={self._world.now_ms:.0f} node {node.index}"


class Detection:
    """How long it took until the first other node held a process that ended for dead."""

    name = "processes that ended are found out"
    settle_ms = 0.0

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.took_ms: dict[tuple[Kid, int], float] = {}
        self._ended_ms: dict[tuple[Kid, int], float] = {}

    def watch(self, world: World, faults: Faults) -> None:
        self._world = world
        world.on_crash.append(self._crashed)
        world.on_notify.setdefault(MemberChanged, []).append(self._changed)

    def settled(self, world: World, well: Sequence[Node]) -> str:
        return ""

    def summary(self) -> str:
        took_ms = sorted(self.took_ms.values())
        if not took_ms:
            return f"{self.name} (none was)"
        middle_s = took_ms[len(took_ms) // 2] / 1000
        return (
            f"{self.name}: {len(took_ms)} of {len(self._ended_ms)} while they were down, "
            f"median {middle_s:.1f} s, longest {took_ms[-1] / 1000:.1f} s"
        )

    def _crashed(self, node: Node) -> None:
        self._ended_ms[(node.kid, node.boot)] = self._world.now_ms

    def _changed(self, viewer: Node, event: MemberChanged) -> None:
        process = (event.member.kid, event.member.boot)
        if event.member.state != State.DEAD or process in self.took_ms:
            return
        ended_ms = self._ended_ms.get(process)
        if ended_ms is not None:
            self.took_ms[process] = self._world.now_ms - ended_ms


class Agreement:
    """C5: each of the well holds exactly the well for alive, in their present boot."""

    name = "after healing every view is what really runs"

    def __init__(self, config: MembershipConfig, nodes: int, view: View) -> None:
        self.failures: list[str] = []
        self.settle_ms = settle_ms(config, nodes)
        self._view = view
        self._doubtful = 0  # the place in `well` of the one that differed last: looked at first

    def watch(self, world: World, faults: Faults) -> None:
        """Nothing to watch: it looks at the end."""

    def summary(self) -> str:
        return self.name

    def settled(self, world: World, well: Sequence[Node]) -> str:
        truth = {node.kid: node.boot for node in well if node.up}
        for step in range(len(well)):
            place = (self._doubtful + step) % len(well)
            node = well[place]
            if not node.up:
                return f"node {node.index} is down"
            seen = self._view(node.machine).members()
            alive = {member.kid: member.boot for member in seen if member.state == State.ALIVE}
            undecided = [short(member.kid) for member in seen if member.state == State.SUSPECT]
            if alive == truth and not undecided:
                continue
            self._doubtful = place
            missing = [short(kid) for kid in truth if alive.get(kid) != truth[kid]]
            extra = [short(kid) for kid in alive if kid not in truth]
            return (
                f"node {node.index} lacks {missing[:5]}, has {extra[:5]} too many and suspects "
                f"{undecided[:5]}"
            )
        return ""


def settle_ms(config: MembershipConfig, nodes: int) -> float:
    """The bound on convergence after healing.

    Two sides meet by a call to one of the dead (one each `RECONNECT_PROBES` probes over the
    cluster) or by a seed (`joining.SLOW_MS`, which is less than four of these); whoever really is
    gone needs one probe at the worst health score and the longest suspicion; the news of it all
    needs O(log N) rounds, and a lost piece of it a full exchange or two.
    """
    longest_ms = config.suspicion_factor * max(1.0, math.log10(nodes)) * config.probe_ms
    longest_ms *= config.suspicion_max_factor
    probe_ms = config.probe_ms * (SCORE_MAX + 1) * 2
    spread_ms = config.gossip_ms * 10 * math.ceil(math.log2(nodes + 1))
    meet_ms = 4 * RECONNECT_PROBES * config.probe_ms
    exchange_ms = 2 * config.push_pull_ms * max(1, math.ceil(math.log2(nodes + 1)) - 4)
    return longest_ms + probe_ms + spread_ms + meet_ms + exchange_ms
