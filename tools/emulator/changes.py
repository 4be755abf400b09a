"""Changing a cluster that runs: nodes are added, leave, are killed, paused and started again.

Interface rules: the methods of `Changes` run on the supervisor's loop; each raises what says why
nothing was done, a `ManifoldError`. Nodes come and go one call after the other.
Invariants: D1 the last node does not leave; D2 nobody who votes leaves before another votes in its
place, unless it is forced; D3 what is paused goes on when it is to end.
Source: design page of node, "Leaving well".
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from manifold.kernel import labels as labelling
from manifold.kernel.config_loader import nearest
from manifold.kernel.errors import NotFound, Refused, Unavailable
from manifold.kernel.limits import NODES_MAX
from manifold.kernel.messages import Drain, SetPace, SettleVoters, VotersSettled
from manifold.kernel.process import throttle
from manifold.tools.emulator import messages as m
from manifold.tools.emulator import room
from manifold.tools.emulator.supervisor import STOP_S, Supervisor, Watched
from manifold.vm.kid import Kid

DRAIN_S = 10.0  # what a node has to hand over takes less, but for calls that take long
COME_S = 30.0  # a node that is forked joins within a second; on a host that is overloaded, in this
SLOW_MIN = 0.01  # as little as a class may have: below, a slice of 5 ms takes half a second
ASK_S = 5.0  # to ask who votes
ANSWER_S = 5.0  # beyond the time that a node has to have others vote, until it says so


class Changes:
    """See the module."""

    def __init__(self, supervisor: Supervisor) -> None:
        assert supervisor.members is not None, "an agent is one node, and stays one"
        self._supervisor = supervisor
        self._members = supervisor.members
        self._one = asyncio.Lock()  # who votes, and who is there, changes for one reason at a time
        self._number = 0

    async def carry_out(self, request: m.Request) -> m.Changed:
        """What another process asks for."""
        aliases: tuple[str, ...] = ()
        match request:
            case m.AddNodes(kind=kind, count=count, labels=labels):
                aliases = tuple(await self.add(kind, count, labels))
            case m.RemoveNodes(aliases=aliases, force=force):
                await self.remove(aliases, force=force, timeout_s=request.timeout_s)
            case m.KillNode(alias=alias, stay_down=stay_down, force=force):
                await self.kill(alias, stay_down=stay_down, force=force)
            case m.StartNode(alias=alias):
                await self.start(alias)
            case m.PauseNode(alias=alias, force=force):
                await self.pause(alias, force=force)
            case m.ResumeNode(alias=alias):
                await self.resume(alias)
            case m.SlowNode(alias=alias, to=to):
                await self.slow(alias, to)
        if not isinstance(request, m.AddNodes | m.RemoveNodes):
            aliases = (request.alias,)
        return m.Changed(aliases, len(self._supervisor.specs))

    # -- coming and going -----------------------------------------------------------------------

    async def add(
        self, kind: str = "", count: int = 1, more_labels: Sequence[str] = ()
    ) -> list[str]:
        """`count` nodes of class `kind`; their aliases, once every node sees every node.

        They have `more_labels` beside those of the class, or in their place.
        """
        more_labels = labelling.read(more_labels)
        async with self._one:
            supervisor = self._supervisor
            if not 1 <= count <= NODES_MAX - len(supervisor.specs):
                raise Refused(
                    f"{count} more nodes are not possible: there are {len(supervisor.specs)}.",
                    f"A cluster has 1 to {NODES_MAX}.",
                )
            room.make(count)
            specs = self._members.more(kind, count, supervisor.seeds, more_labels)
            await supervisor.admit(specs)
            aliases = [spec.alias for spec in specs]
            if not await supervisor.converged(COME_S):
                raise Unavailable(
                    f"{', '.join(aliases)} did not join within {COME_S:g} s; they are tried on.",
                    "`manifold node ls` and `manifold logs` show how far they are.",
                )
            return [alias for alias in aliases if alias not in supervisor.failing]

    async def remove(
        self,
        aliases: Sequence[str],
        *,
        force: bool = False,
        drain_s: float = DRAIN_S,
        timeout_s: float = m.SETTLE_S,
    ) -> None:
        """Let them leave well: others vote, compute and own what they did. They are gone then.

        `force`: also where nobody can vote in their place; `timeout_s`: until that is given up.
        """
        async with self._one:
            leaving = [self._node(alias) for alias in dict.fromkeys(aliases)]
            staying = [n for n in self._supervisor.nodes.values() if n not in leaving]
            if not staying:
                raise Refused(  # D1
                    "The last node cannot be removed: nobody would have what the cluster knows.",
                    "`manifold down` ends the cluster.",
                )
            for node in leaving:
                self._supervisor.signal(node, resume=True)  # D3
            if not force:
                await self._settle(leaving, staying, timeout_s)
            for node in leaving:
                node.leaving = True
            late_s = asyncio.get_running_loop().time() + drain_s + STOP_S
            for node in leaving:
                self._supervisor.tell(node, Drain(drain_s * 1000))
            for node in leaving:
                await self._supervisor.gone(node, late_s)
                await self._supervisor.dismiss(node)

    async def _settle(
        self, leaving: Sequence[Watched], staying: Sequence[Watched], timeout_s: float
    ) -> None:
        """D2."""
        kids = tuple(kid for n in leaving if (kid := n.kid))
        found = await self._ask_voters(staying, kids, timeout_s)
        if not found.ok:
            raise Refused(
                f"Others would have to vote instead, and that was not agreed: {found.why}",
                "Wait until every voter answers (`manifold nexus status`), give it longer by "
                "--timeout, or add --force.",
            )

    async def _ask_voters(
        self,
        of: Sequence[Watched],
        leaving: tuple[Kid, ...] = (),
        timeout_s: float = m.SETTLE_S,
    ) -> VotersSettled:
        asked = next((n for n in of if n.well and not n.paused), None)
        if asked is None:
            return VotersSettled(0, False, why="no other node is up.")
        self._number += 1
        wish = SettleVoters(self._number, leaving, timeout_s * 1000)
        answer = self._supervisor.ask_voters(asked, wish)
        try:
            async with asyncio.timeout(timeout_s + ANSWER_S):
                return await answer
        except TimeoutError:
            return VotersSettled(0, False, why=f"{asked.spec.alias} did not answer.")

    def _node(self, alias: str) -> Watched:
        nodes = self._supervisor.nodes
        if alias not in nodes:
            near = nearest(alias, nodes) or "`manifold node ls` lists them."
            raise NotFound(f"This cluster has no node {alias!r} here.", near)
        return nodes[alias]

    # -- faults ---------------------------------------------------------------------------------

    async def kill(self, alias: str, *, stay_down: bool = False, force: bool = False) -> int:
        """SIGKILL; it is started again, unless it is to stay down. The pid that it had."""
        node = self._node(alias)
        if node.pidfd < 0:
            raise Refused(f"{alias} is down already.", f"`manifold node start {alias}`.")
        if stay_down and not force:
            await self._check_majority(node, "killed for good")
        pid = node.pid
        node.down = stay_down
        self._supervisor.signal(node, kill=True)
        return pid

    async def start(self, alias: str) -> None:
        """Start one again that was to stay down."""
        node = self._node(alias)
        if not node.down:
            raise Refused(f"{alias} is not down.", "`manifold node ls`.")
        await self._supervisor.start_again(node)

    async def pause(self, alias: str, *, force: bool = False) -> None:
        """SIGSTOP the node's process."""
        node = self._node(alias)
        if node.pidfd < 0:
            raise Refused(f"{alias} is down.", f"`manifold node start {alias}`.")
        if not force:
            await self._check_majority(node, "paused")
        self._supervisor.signal(node, pause=True)

    async def resume(self, alias: str) -> None:
        """SIGCONT it."""
        node = self._node(alias)
        if not node.paused:
            raise Refused(f"{alias} is not paused.", "`manifold node ls`.")
        self._supervisor.signal(node, resume=True)

    async def slow(self, alias: str, to: float) -> None:
        """Its workers get `to` of the compute share of its class; 1 undoes it."""
        node = self._node(alias)
        if not SLOW_MIN <= to <= 1:
            raise Refused(
                f"{to:g} is no part of a compute share.",
                f"It is from {SLOW_MIN:g} to 1, all of it.",
            )
        node.slowed = to
        share = node.spec.compute * to
        if not node.spec.cgroup:
            self._supervisor.tell(node, SetPace(share))
            return
        try:
            throttle.set_cores(node.spec.cgroup, node.spec.cores * share)
        except OSError as fault:
            raise Unavailable(
                f"The cgroup of {alias} does not take it: {fault.strerror}.",
                "Start the cluster anew; `manifold up` says how shares are enforced.",
            ) from fault

    async def _check_majority(self, node: Watched, done: str) -> None:
        """Whether most voters would still answer; agents beside this cluster count as well."""
        if not node.well:
            return
        well = [n for n in self._supervisor.nodes.values() if n.well]
        found = await self._ask_voters(well, timeout_s=ASK_S)
        ours = {n.kid: n for n in self._supervisor.nodes.values()}
        if node.kid not in found.voters:
            return
        up = [kid for kid in found.voters if kid not in ours or ours[kid].well]
        left = len([kid for kid in up if kid != node.kid])
        if 2 * left <= len(found.voters):
            raise Refused(
                f"{node.spec.alias} votes: with it {done}, {left} of {len(found.voters)} voters "
                "are left, and nothing can be agreed.",
                "Let others vote (`manifold nexus voters replace`), or add --force.",
            )
