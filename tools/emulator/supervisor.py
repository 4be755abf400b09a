"""The supervisor: starts the zygote and the nodes of one host, watches them, takes them down.

Interface rules: `Supervisor.start`, then `run` until `stop` is called or every node was told to go.
It opens no nng socket itself. It alone holds the write end of the liveness pipe: when it ends, in
whatever way, every process of the cluster ends too and the zygote clears what is left of it.
Invariants: U1 one supervisor per cluster (a lock, which the zygote and its children share); U2 a
node that dies is started again, with a back-off that grows while it keeps dying; one that never
comes up is reported, and nobody waits for it; U3 what it signals is named by a pidfd, never by a
number.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from manifold.kernel import traces
from manifold.kernel.errors import ManifoldError, Refused, Unavailable
from manifold.kernel.messages import (
    Agreed,
    Alive,
    FirstVoters,
    FromSupervisor,
    ProcessEnded,
    Ready,
    SetPace,
    SettleVoters,
    Stop,
    ToSupervisor,
    VotersSettled,
)
from manifold.kernel.nexus import seating
from manifold.kernel.nodespec import NodeSpec
from manifold.kernel.process.channel import Channel, Closed
from manifold.kernel.process.remains import Remains, clear
from manifold.kernel.process.zygote import read_forked, request_fork
from manifold.tools.emulator.members import Members
from manifold.tools.emulator.network import Network
from manifold.tools.emulator.orders import read as read_orders
from manifold.tools.emulator.record import Lock
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.tools.emulator.changes import Changes
    from manifold.tools.emulator.control import Control

log = logging.getLogger("manifold.supervisor")

THREE_UP_TO = 8  # nodes; above that five vote
PRELOAD = (
    "manifold.kernel.main",
    "manifold.kernel.process.worker",
    "manifold.kernel.process.tasks",
)
NODE_ENTRY = "manifold.kernel.main:boot"
BACKOFF_S_MIN = 0.1
BACKOFF_S_MAX = 10.0
STEADY_S = 5.0  # a node that lived so long starts again without delay
STOP_S = 2.0  # nodes have this long to leave; then they are killed
ZYGOTE_S = 10.0
FAILURES_MAX = 3  # deaths in a row before it ever was ready: 0.7 s of back-off, then it is reported


@dataclass(slots=True)
class Watched:
    """One node and the process it has at present."""

    spec: NodeSpec
    pid: int = 0
    pidfd: int = -1
    channel: Channel[ToSupervisor] | None = None
    ready: Ready | None = None
    alive: int = 0
    started_s: float = 0.0
    backoff_s: float = BACKOFF_S_MIN
    restarts: int = 0
    failures: int = 0  # deaths in a row before it was ready
    down: bool = False  # it is not started again until somebody says so
    paused: bool = False
    leaving: bool = False
    slowed: float = 1.0  # to this part of its compute share

    @property
    def serves(self) -> bool:
        return self.ready is not None and self.pidfd >= 0

    @property
    def failing(self) -> bool:
        return self.failures >= FAILURES_MAX

    @property
    def awaited(self) -> bool:
        """Whether the others wait for it to be there."""
        return not (self.failing or self.down or self.leaving)

    @property
    def well(self) -> bool:
        """Whether it answers, as far as can be seen from here."""
        return self.ready is not None and self.channel is not None and not self.paused

    @property
    def kid(self) -> Kid | None:
        return self.ready.kid if self.ready is not None else None


@dataclass(slots=True)
class Supervisor:
    """Of `specs` in `runtime_dir`. `whole_dir`: the directory is ours alone and goes with us."""

    specs: list[NodeSpec]
    runtime_dir: Path
    lock: Lock
    whole_dir: bool = True
    on_event: Callable[[str], None] = log.info
    members: Members | None = None  # who may be added; None: an agent stays alone
    changes: Changes | None = None  # set with `members`
    control: Control | None = None  # through which other processes reach `changes`
    nodes: dict[str, Watched] = field(default_factory=dict)
    stopping: bool = False
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _gone: asyncio.Event = field(default_factory=asyncio.Event)  # a node ended while stopping
    _changed: asyncio.Event = field(default_factory=asyncio.Event)  # ended, ready, converged
    _converged: asyncio.Event = field(default_factory=asyncio.Event)
    _told_voters: bool = False
    _first_voters: tuple[Kid, ...] = ()
    _agreed: bool = True  # once they were told: whether somebody has answered
    _settling: dict[int, asyncio.Future[VotersSettled]] = field(default_factory=dict)
    _liveness_write: int = -1
    _zygote: subprocess.Popen[bytes] | None = None
    _zygote_fd: int = -1

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Everything up; returns once every node was forked (not yet converged)."""
        self._zygote_path.unlink(missing_ok=True)
        self._start_zygote()
        for spec in self.specs:
            self.nodes[spec.alias] = Watched(spec)
            await self._fork(self.nodes[spec.alias])

    @property
    def _zygote_path(self) -> Path:
        return Path(self.specs[0].zygote)

    def _start_zygote(self) -> None:
        liveness_read, self._liveness_write = os.pipe()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self._zygote_path))
        listener.listen(64)
        remains = msgspec.json.encode(self._remains()).decode()
        # Nodes that send traces share what that needs, and no loop waits for its import.
        extra = (traces.SDK,) if traces.wanted(os.environ) else ()
        arguments = [str(listener.fileno()), str(liveness_read), remains, *PRELOAD, *extra]
        self._zygote = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "manifold.kernel.process.zygote",
                str(self.runtime_dir),
                *arguments,
            ],
            pass_fds=(listener.fileno(), liveness_read, self.lock.fd),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; we tell the nodes to leave
        )
        listener.close()
        os.close(liveness_read)
        self._zygote_fd = os.pidfd_open(self._zygote.pid)
        asyncio.get_running_loop().add_reader(self._zygote_fd, self._zygote_died)

    def _remains(self) -> Remains:
        names = (self._zygote_path.name, *(spec.alias for spec in self.specs))
        cgroups = tuple(group for spec in self.specs for group in spec.cgroups)
        above = self.members.above if self.members is not None else ()
        return Remains(str(self.runtime_dir), self.whole_dir, names, cgroups, above)

    @property
    def seeds(self) -> tuple[str, ...]:
        """Where one that comes, or comes back, finds the others."""
        agents = self.specs[0].seeds if self.members is None else self.members.agents
        return tuple(dict.fromkeys((*(spec.reached_at for spec in self.specs), *agents)))

    @property
    def failing(self) -> list[str]:
        """Nodes that end before they are ready, again and again."""
        return [node.spec.alias for node in self.nodes.values() if node.failing]

    async def converged(self, timeout_s: float) -> bool:
        """Wait until every node (but those that never come up) sees every node alive; False at
        once where none comes up."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._converged.is_set():
                    if len(self.failing) == len(self.specs):
                        return False
                    await self._change()
        except TimeoutError:
            return False
        return True

    async def agreed(self, timeout_s: float) -> bool:
        """Wait until the voters that were chosen when all had converged are agreed."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._agreed:
                    await self._change()
        except TimeoutError:
            return False
        return True

    async def ended(self, alias: str, pid: int) -> None:
        """Wait until the end of that process of the node was seen, and told to the others."""
        node = self.nodes[alias]
        while node.pid == pid and node.pidfd >= 0:
            await self._change()

    async def ready(self, timeout_s: float) -> bool:
        """Wait until every node (but those that never come up) serves."""
        try:
            async with asyncio.timeout(timeout_s):
                while any(not n.serves and not n.failing for n in self.nodes.values()):
                    await self._change()
        except TimeoutError:
            return False
        return True

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def run(self) -> None:
        """Until `stop`."""
        await self._ended.wait()

    async def stop(self) -> None:
        """Every node leaves, or is killed; nothing of the cluster is left."""
        if self.stopping:
            return
        self.stopping = True
        if self.control is not None:
            self.control.close()
        for node in self.nodes.values():
            self.signal(node, resume=True)
            self.tell(node, Stop())
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + STOP_S
        while any(n.pidfd >= 0 for n in self.nodes.values()) and loop.time() < deadline_s:
            self._gone.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline_s):
                    await self._gone.wait()
        for node in self.nodes.values():
            self._kill(node)
        self._forget_zygote()
        await asyncio.to_thread(self._finish)
        self._ended.set()

    def _finish(self) -> None:
        if self._liveness_write >= 0:
            os.close(self._liveness_write)
        if self._zygote is not None:
            try:
                self._zygote.wait(ZYGOTE_S)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
        clear(self._remains())
        if self.network is not None:
            self.network.close()
        self.lock.release()

    # -- nodes --------------------------------------------------------------------------------

    async def _fork(self, node: Watched) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        orders = read_orders(self.runtime_dir)
        # Those that it was told of at first may have left since.
        told = msgspec.structs.replace(node.spec, orders=orders, seeds=self.seeds)
        try:
            with theirs:
                pid = await asyncio.to_thread(self._ask_zygote, told, theirs.fileno())
        except ManifoldError as error:
            ours.close()
            self.on_event(f"{node.spec.alias} could not be started: {error}")
            self._again(node)
            return
        if self.stopping:  # the closed pipe ends it, and the zygote waits for it
            ours.close()
            return
        loop = asyncio.get_running_loop()
        node.pid, node.ready, node.alive = pid, None, 0
        node.started_s = loop.time()
        node.channel = Channel(ours, ToSupervisor)
        loop.add_reader(ours, self._readable, node, node.channel)
        try:
            node.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._died(node)
            return
        loop.add_reader(node.pidfd, self._died, node)

    @property
    def network(self) -> Network | None:
        return self.members.network if self.members is not None else None

    def _ask_zygote(self, spec: NodeSpec, fd: int) -> int:
        if self._zygote is None or self._zygote.poll() is not None:
            raise Unavailable("The zygote ended.", "It is being restarted.")
        fds = [fd] if self.network is None else [fd, self.network.attach(spec.alias)]
        payload = msgspec.msgpack.encode(spec)
        connection = request_fork(str(self._zygote_path), NODE_ENTRY, payload, fds)
        connection.settimeout(ZYGOTE_S)
        try:
            return read_forked(connection)
        except TimeoutError as error:
            raise Unavailable("The zygote did not answer in time.") from error

    def _readable(self, node: Watched, channel: Channel[ToSupervisor]) -> None:
        try:
            messages = channel.take()
        except Closed:
            self._hang_up(node, channel)
            return
        for message in messages:
            match message:
                case Ready():
                    node.ready = message
                    node.failures = 0
                    self._changed.set()
                    if node.slowed < 1.0 and not node.spec.cgroup:  # it is a new process
                        self.tell(node, SetPace(node.spec.compute * node.slowed))
                    if node.restarts:
                        self.on_event(f"{node.spec.alias} is back, boot {message.boot}")
                    if (orders := read_orders(self.runtime_dir)).number:
                        channel.post(orders)
                case Alive(count=count):
                    node.alive = count
                case Agreed():
                    self._agreed = True
                    self._changed.set()
                case VotersSettled(number=number):
                    asked = self._settling.pop(number, None)
                    if asked is not None and not asked.done():
                        asked.set_result(message)
        self._look_converged()

    def _look_converged(self) -> None:
        well = [node for node in self.nodes.values() if node.awaited]
        everybody = len(well) + len(self.specs) - len(self.nodes)  # those to come are awaited
        if well and all(node.alive >= everybody for node in well):
            self._converged.set()
            self._changed.set()
            self._tell_voters()
        else:
            self._converged.clear()

    def _tell_voters(self) -> None:
        """Once all are there: who votes, unless they know better from an earlier time."""
        count = voters_of(self.specs[0].config.nexus.voters, len(self.specs))
        ready = [(r.kid, r.labels) for n in self.nodes.values() if (r := n.ready) is not None]
        channel = next((n.channel for n in self.nodes.values() if n.channel is not None), None)
        if self._told_voters or len(ready) < len(self.specs) or channel is None:
            return
        self._told_voters = True
        self._agreed = not count
        there = [kid for kid, _ in ready]
        if any(kid not in there for kid in self._first_voters) or not self._first_voters:
            self._first_voters = tuple(seating.choose(count, ready))
        if count:  # the same ones again, whoever came since: two sets might become two clusters
            channel.post(FirstVoters(self._first_voters))

    def _hang_up(self, node: Watched, channel: Channel[ToSupervisor]) -> None:
        asyncio.get_running_loop().remove_reader(channel.socket)
        channel.socket.close()
        if node.channel is channel:
            node.channel = None

    def _died(self, node: Watched) -> None:
        """U2, and the news to everybody else: faster than any failure detector."""
        loop = asyncio.get_running_loop()
        if node.pidfd >= 0:
            loop.remove_reader(node.pidfd)
            os.close(node.pidfd)
            node.pidfd = -1
        if node.channel is not None:
            self._readable(node, node.channel)  # what it said before it ended
        if node.channel is not None:
            self._hang_up(node, node.channel)
        node.alive, node.paused = 0, False
        self._told_voters = False  # perhaps it was the one that was told, and had not done it
        self._gone.set()
        self._changed.set()
        if node.ready is not None:
            news = ProcessEnded(node.ready.kid, node.ready.boot)
            for other in self.nodes.values():
                if other is not node and other.channel is not None:
                    other.channel.post(news)
        if not self.stopping:
            self._ended_alone(node)
        self._look_converged()

    def _ended_alone(self, node: Watched) -> None:
        """Not because everything ends."""
        alias = node.spec.alias
        if node.leaving:
            self.on_event(f"{alias} has left")
            return
        if node.down:
            self.on_event(f"{alias} (pid {node.pid}) ended, and stays down")
            return
        if node.ready is None:
            self._failed(node)
        if node.failures < FAILURES_MAX:
            self.on_event(f"{alias} (pid {node.pid}) ended; starting it again")
        self._again(node)

    def _failed(self, node: Watched) -> None:
        """U2: it ended before it was ready."""
        node.failures += 1
        self._changed.set()
        if node.failures == FAILURES_MAX:
            folder = node.spec.state_dir
            self.on_event(
                f"{node.spec.alias} does not come up: {last_line(Path(folder, 'console.log'))} "
                f"(see node.log and console.log in {folder}); trying on, every {BACKOFF_S_MAX:g} s"
            )

    def _again(self, node: Watched) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() - node.started_s > STEADY_S:
            node.backoff_s = BACKOFF_S_MIN
        node.restarts += 1
        loop.call_later(node.backoff_s, self._restart, node)
        node.backoff_s = min(node.backoff_s * 2, BACKOFF_S_MAX)

    def _zygote_died(self) -> None:
        """Without it no worker can be forked: its nodes end with it, and all start again."""
        self._forget_zygote()
        if self.stopping:
            return
        assert self._zygote is not None
        self._zygote.wait()
        self.on_event("the zygote ended; starting another, and every node again")
        os.close(self._liveness_write)  # the nodes see the old pipe close, and end
        self._zygote_path.unlink(missing_ok=True)
        self._start_zygote()

    def _forget_zygote(self) -> None:
        if self._zygote_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._zygote_fd)
            os.close(self._zygote_fd)
            self._zygote_fd = -1

    def _restart(self, node: Watched) -> None:
        if self.stopping or node.down or node.leaving or node.pidfd >= 0:
            return
        task = asyncio.get_running_loop().create_task(self._fork(node))
        task.add_done_callback(lambda done: done.result() if not done.cancelled() else None)

    # -- what `changes.py` is made of ---------------------------------------------------------

    async def admit(self, specs: Sequence[NodeSpec]) -> None:
        """Further nodes; returns once they were forked."""
        self.specs += specs
        self._converged.clear()
        for spec in specs:
            self.nodes[spec.alias] = Watched(spec)
        for spec in specs:
            await self._fork(self.nodes[spec.alias])
        self.lock.count(len(self.specs))

    async def gone(self, node: Watched, late_s: float) -> None:
        """Wait until a node that was told to go has ended; it is killed where it is late."""
        while node.pidfd >= 0:
            self._gone.clear()
            try:
                async with asyncio.timeout_at(late_s):
                    await self._gone.wait()
            except TimeoutError:
                self.on_event(f"{node.spec.alias} does not leave: it is killed")
                self.signal(node, kill=True)
                late_s += STOP_S

    async def dismiss(self, node: Watched) -> None:
        """Forget a node that has ended, and take away what it had here, but for its state."""
        assert node.pidfd < 0, "its process has ended"
        self.specs.remove(node.spec)
        del self.nodes[node.spec.alias]
        clear(Remains(str(self.runtime_dir), False, (node.spec.alias,), node.spec.cgroups))
        if self.network is not None:
            await asyncio.to_thread(self.network.detach, node.spec.alias)
        self.lock.count(len(self.specs))
        self._look_converged()

    async def start_again(self, node: Watched) -> None:
        """One that was to stay down."""
        node.down, node.backoff_s, node.failures = False, BACKOFF_S_MIN, 0
        self._converged.clear()
        if node.pidfd < 0:
            await self._fork(node)

    def tell(self, node: Watched, message: FromSupervisor) -> None:
        """Nothing, where its process has ended."""
        if node.channel is not None:
            node.channel.post(message)

    def ask_voters(self, node: Watched, wish: SettleVoters) -> asyncio.Future[VotersSettled]:
        """One question to one node; whoever waits says for how long."""
        answer: asyncio.Future[VotersSettled] = asyncio.get_running_loop().create_future()
        self._settling[wish.number] = answer
        answer.add_done_callback(lambda _: self._settling.pop(wish.number, None))
        self.tell(node, wish)
        return answer

    def signal(
        self, node: Watched, *, kill: bool = False, pause: bool = False, resume: bool = False
    ) -> None:
        """U3. To resume what is not paused does nothing."""
        if node.pidfd < 0 or (resume and not node.paused):
            return
        number = signal.SIGKILL if kill else signal.SIGSTOP if pause else signal.SIGCONT
        node.paused = pause
        with contextlib.suppress(ProcessLookupError):  # its end is on its way to us
            signal.pidfd_send_signal(node.pidfd, number)

    def _kill(self, node: Watched) -> None:
        if node.channel is not None:
            self._hang_up(node, node.channel)
        if node.pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(node.pidfd, signal.SIGKILL)
        asyncio.get_running_loop().remove_reader(node.pidfd)
        os.close(node.pidfd)
        node.pidfd = -1


def last_line(path: Path, bytes_max: int = 4096) -> str:
    """The last thing a process said of itself before it ended."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - bytes_max))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return "it said nothing"
    return lines[-1] if lines else "it said nothing"


def voters_of(wish: str, nodes: int) -> int:
    """How many of so many nodes vote: an odd number, five where a second failure is likely."""
    if wish == "off":
        return 0
    wanted = int(wish) if wish != "auto" else 3 if nodes <= THREE_UP_TO else 5
    most = nodes if nodes % 2 else nodes - 1  # two voters stop when either does: one does not
    return min(wanted, most) if nodes > 1 else 1


def refuse_taken(lock: Lock, nodes: int, runtime_dir: Path) -> None:
    """U1."""
    if not lock.acquire(nodes, str(runtime_dir)):
        raise Refused("It is supervised by another process already.", "`manifold status`.")
