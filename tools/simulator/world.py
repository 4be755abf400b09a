"""A whole cluster in one process: a heap of `(t, seq, event)` and one seeded `Random`.

Interface: `World(seed, faults, count, boot, messages)`; `start_all`, then `run(ms)` or
`run_until(predicate, ms)`. A node is any `Machine` that `boot(kid, boot, durable, random, now)`
makes; its effects are carried out here and nowhere else. What a node sends is encoded, and
decoded again for each receiver, so two nodes never share an object. Other code takes part by
`call` (a later call into a machine), `on_notify`, `on_reply`, `on_send`, `on_boot`,
`on_crash`.

The driver modelled is the weakest one allowed: a `Persist` delays only the later effects of its
own list, a `Held` only what it holds; writes become durable in order after `faults.sync`, and a
crash keeps any subset of those under way, the last of them perhaps torn (then its checksum fails
and it never was).

Invariants:
  W1  the same seed and arguments give the same digest, whatever PYTHONHASHSEED is;
  W2  time never goes back, and no node's clock does;
  W3  a process that has crashed is never called again.
Source: design page of testing; FoundationDB's and TigerBeetle's simulators.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any, Protocol

import blake3
import msgspec

from manifold.kernel.effects import Effect, Held, Notify, Persist, Reply, Send, SetTimer
from manifold.tools.simulator.disk import Disk
from manifold.tools.simulator.faults import Faults, Range
from manifold.tools.simulator.network import Network
from manifold.vm.kid import Kid, kid_of

DIGEST_CHUNK_BYTES = 1 << 16  # hashed at once: a call per event would cost as much as the event
CLOCK_OFFSET_MS = 1e6  # clocks of nodes start up to this far apart: nobody may compare them
JUMP_MS_MAX = 5000.0
TIMER_LATE_MS = 0.001  # never early, whatever the rounding of a clock that runs at another rate
MINUTE_MS = 60_000.0
_EVENT = struct.Struct("<dBi")
_TIMER, _DELIVER, _SYNCED, _CALL, _WORLD = range(5)


class Host(Protocol):
    """A machine as the simulator needs it."""

    def start(self, now_ms: float) -> list[Effect]: ...

    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]: ...

    def tick(self, now_ms: float) -> list[Effect]: ...


Boot = Callable[[Kid, int, dict[str, bytes], Random, float], Host]
Call = Callable[[Any, float], list[Effect]]


class Node:
    """One node: the disk and clock outlive its processes, `machine` is the present process."""

    def __init__(self, index: int, kid: Kid, clock_offset_ms: float) -> None:
        self.index = index
        self.kid = kid
        self.address = f"sim://{index}"
        self.boot = 0
        self.machine: Any = None  # None while it is down
        self.disk = Disk()
        self.paused_until_ms = 0.0
        self.backlog: list[tuple[Any, ...]] = []
        self.timer_at_ms: float | None = None  # by its own clock
        self.timer_token = 0
        self.rate = 1.0
        self._base_ms = 0.0
        self._local_ms = clock_offset_ms

    @property
    def up(self) -> bool:
        return self.machine is not None

    def local(self, t_ms: float) -> float:
        """This node's clock at `t_ms`."""
        return self._local_ms + (t_ms - self._base_ms) * self.rate

    def real(self, local_ms: float) -> float:
        """When this node's clock shows `local_ms`."""
        return self._base_ms + (local_ms - self._local_ms) / self.rate

    def set_clock(self, t_ms: float, *, rate: float, jump_ms: float = 0.0) -> None:
        assert rate > 0 and jump_ms >= 0, "W2"
        self._local_ms = self.local(t_ms) + jump_ms
        self._base_ms = t_ms
        self.rate = rate


class World:
    """The cluster, its network, its disks, its faults."""

    def __init__(
        self, seed: int, faults: Faults, count: int, boot: Boot, messages: Any = Any
    ) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.faults = faults
        self.now_ms = 0.0
        self.events = 0
        self.network = Network(self.random, faults, count)
        self.nodes = [
            Node(index, kid_of(b"sim %d" % index), self.random.random() * CLOCK_OFFSET_MS)
            for index in range(count)
        ]
        self.replies: dict[tuple[int, int, int], Any] = {}  # (node, boot, request) -> message
        self.on_notify: dict[type, list[Callable[[Node, Any], None]]] = {}
        self.on_reply: list[Callable[[Node, Reply], None]] = []
        self.on_send: list[Callable[[Node, Send], None]] = []
        self.on_boot: list[Callable[[Node], None]] = []
        self.on_crash: list[Callable[[Node], None]] = []
        self._boot = boot
        self._where: dict[str, int] = {node.kid: node.index for node in self.nodes}
        self._where |= {node.address: node.index for node in self.nodes}
        self._heap: list[tuple[Any, ...]] = []
        self._seq = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._encoded: tuple[Any, bytes] = (None, b"")
        self._hash = blake3.blake3()
        self._trace = bytearray()
        self._faulty = False
        self.disturbed = False  # whether anything but a crash has gone wrong so far

    def speak(self, messages: Any) -> None:
        """The union of message types that nodes decode."""
        self._decoder = msgspec.msgpack.Decoder(messages)

    # Nodes.

    def node(self, kid: str) -> Node:
        return self.nodes[self._where[kid]]

    def start(self, node: Node) -> None:
        """A new process of `node`, with a larger boot, from what is on its disk."""
        assert not node.up, f"{node.address} is up"
        node.boot += 1
        node.paused_until_ms = 0.0
        local_ms = node.local(self.now_ms)
        random = Random(self.random.getrandbits(64))
        node.machine = self._boot(node.kid, node.boot, node.disk.recovered(), random, local_ms)
        for boot_handler in self.on_boot:
            boot_handler(node)
        self._carry_out(node, node.machine.start(local_ms), 0)

    def start_all(self, spread_ms: float = 50.0) -> None:
        """Start every node at a random moment of the next `spread_ms`."""
        for node in self.nodes:
            self.at(self.random.random() * spread_ms, self._start_if_down, node)

    def _start_if_down(self, node: Node) -> None:
        if not node.up:
            self.start(node)

    def crash(self, node: Node) -> None:
        """The process ends; of the writes under way a random subset stays."""
        assert node.up, f"{node.address} is down"
        node.machine = None
        node.timer_at_ms = None
        node.timer_token += 1
        node.backlog.clear()
        node.disk.crash(self.random)
        for crash_handler in self.on_crash:
            crash_handler(node)

    def restart(self, node: Node, after_ms: float) -> None:
        self.at(after_ms, self._start_if_down, node)

    def pause(self, node: Node, for_ms: float) -> None:
        """Stop a process for a while: its messages wait, its timers fire late."""
        self.disturbed = True
        node.paused_until_ms = max(node.paused_until_ms, self.now_ms + for_ms)
        self.at(for_ms, self._resume, node)

    def _resume(self, node: Node) -> None:
        if self.now_ms < node.paused_until_ms:
            return
        waiting, node.backlog = node.backlog, []
        for event in waiting:
            self._handle(event)

    def set_clock(self, node: Node, *, rate: float, jump_ms: float = 0.0) -> None:
        node.set_clock(self.now_ms, rate=rate, jump_ms=jump_ms)
        if node.timer_at_ms is not None:
            self._arm(node, node.timer_at_ms)

    # Time.

    def at(self, after_ms: float, action: Callable[..., None], *arguments: Any) -> None:
        """Run `action` in the world, `after_ms` from now."""
        self._push(after_ms, _WORLD, -1, 0, action, arguments)

    def call(self, node: Node, action: Call, after_ms: float = 0.0) -> None:
        """Call `action(machine, now_ms) -> effects` later, if that process still lives."""
        assert node.up, "W3"
        self._push(after_ms, _CALL, node.index, node.boot, action, None)

    def run(self, duration_ms: float) -> World:
        """Everything that happens in the next `duration_ms`."""
        end_ms = self.now_ms + duration_ms
        heap = self._heap
        while heap and heap[0][0] <= end_ms:
            event = heappop(heap)
            assert event[0] >= self.now_ms, "W2"
            self.now_ms = event[0]
            self.events += 1
            self._handle(event)
        self.now_ms = end_ms
        return self

    def run_until(
        self, predicate: Callable[[], bool], limit_ms: float, step_ms: float = 250.0
    ) -> float | None:
        """Run until `predicate()` holds, looked at each `step_ms`: how long it took, or None."""
        begun_ms = self.now_ms
        while not predicate():
            if self.now_ms - begun_ms >= limit_ms:
                return None
            self.run(step_ms)
        return self.now_ms - begun_ms

    def digest(self) -> str:
        """The hash of all that has happened (W1)."""
        self._flush()
        return self._hash.hexdigest(16)

    def _flush(self) -> None:
        self._hash.update(bytes(self._trace))
        self._trace.clear()

    def _push(
        self, after_ms: float, kind: int, index: int, boot: int, first: Any, second: Any
    ) -> None:
        self._seq += 1
        event = (self.now_ms + after_ms, self._seq, kind, index, boot, first, second)
        heappush(self._heap, event)

    def _handle(self, event: tuple[Any, ...]) -> None:
        _, _, kind, index, boot, first, second = event
        if kind == _WORLD:
            first(*second)
            return
        node = self.nodes[index]
        if node.machine is None or (kind != _DELIVER and boot != node.boot):
            return  # W3
        if self.now_ms < node.paused_until_ms:
            node.backlog.append(event)
            return
        if kind == _TIMER and first != node.timer_token:
            return
        self._trace += _EVENT.pack(self.now_ms, kind, index)
        local_ms = node.local(self.now_ms)
        if kind == _DELIVER:
            self._trace += second
            if len(self._trace) > DIGEST_CHUNK_BYTES:
                self._flush()
            self.network.delivered += 1
            message = self._decoder.decode(second)
            self._carry_out(node, node.machine.receive(first, message, local_ms), 0)
        elif kind == _TIMER:
            node.timer_at_ms = None
            self._carry_out(node, node.machine.tick(local_ms), 0)
        elif kind == _SYNCED:
            self._synced(node, first, second)
        else:
            self._carry_out(node, first(node.machine, local_ms), 0)

    # Effects.

    def _synced(self, node: Node, effects: Sequence[Effect], begin: int) -> None:
        """A write is over. Where it fails, what stood after it never happens."""
        failing = self._faulty and self.faults.fsync > 0
        if failing and not node.disk.broken and self.random.random() < self.faults.fsync:
            node.disk.broken = self.disturbed = True
            if not hasattr(node.machine, "storage_failed"):
                self.crash(node)
                self.restart(node, self._draw(self.faults.down))
                return
            failed = node.machine.storage_failed(node.local(self.now_ms))
            self._carry_out(node, failed, 0)
        if not node.disk.broken:
            node.disk.synced()
            self._carry_out(node, effects, begin)

    def _carry_out(self, node: Node, effects: Sequence[Effect], begin: int) -> None:
        for place in range(begin, len(effects)):
            effect = effects[place]
            if isinstance(effect, Send):
                self._send(node, effect)
            elif isinstance(effect, SetTimer):
                self._arm(node, effect.at_ms)
            elif isinstance(effect, Notify):
                for notify_handler in self.on_notify.get(type(effect.event), ()):
                    notify_handler(node, effect.event)
            elif isinstance(effect, Persist):
                if node.disk.holds(effect.name, effect.record):
                    continue
                self._persist(node, effect, effects, place + 1)
                return
            elif isinstance(effect, Held):
                if node.disk.holds(effect.persist.name, effect.persist.record):
                    self._carry_out(node, effect.then, 0)
                else:
                    self._persist(node, effect.persist, effect.then, 0)
            else:
                self.replies[(node.index, node.boot, effect.request)] = effect.message
                for reply_handler in self.on_reply:
                    reply_handler(node, effect)

    def _persist(self, node: Node, effect: Persist, effects: Sequence[Effect], begin: int) -> None:
        """Begin a write; `effects[begin:]` follow it."""
        due_ms = self.now_ms + self._draw(self.faults.sync)
        due_ms = node.disk.write(effect.name, effect.record, due_ms)
        self._push(due_ms - self.now_ms, _SYNCED, node.index, node.boot, effects, begin)

    def _arm(self, node: Node, at_ms: float) -> None:
        node.timer_at_ms = at_ms
        node.timer_token += 1
        after_ms = max(0.0, node.real(at_ms) - self.now_ms) + TIMER_LATE_MS
        self._push(after_ms, _TIMER, node.index, node.boot, node.timer_token, None)

    def _send(self, node: Node, effect: Send) -> None:
        for send_handler in self.on_send:
            send_handler(node, effect)
        target = self._where.get(effect.to)
        if target is None:
            self.network.lost += 1
            return
        if effect.message is not self._encoded[0]:
            self._encoded = (effect.message, self._encoder.encode(effect.message))
        for after_ms in self.network.routes(node.index, target, self.now_ms):
            self._push(after_ms, _DELIVER, target, 0, node.kid, self._encoded[1])

    def _draw(self, span: Range) -> float:
        low, high = span
        return low + (high - low) * self.random.random()

    # Faults that come by themselves.

    def break_things(self) -> None:
        """From now on faults happen at their rates, until `heal`."""
        self._faulty = True
        self.disturbed = self.disturbed or not self.faults.quiet
        self.network.faulty = True
        spread = self.faults.clock
        for node in self.nodes:
            self.set_clock(node, rate=1 + spread * (2 * self.random.random() - 1))
        for name in ("cut", "partition", "clog", "crash", "pause", "jump"):
            self._plan(name)

    def _plan(self, name: str) -> None:
        rate = getattr(self.faults, name)
        if self._faulty and rate > 0:
            self.at(self.random.expovariate(rate / MINUTE_MS), self._strike, name)

    def _strike(self, name: str) -> None:
        if not self._faulty:
            return
        node = self.random.choice(self.nodes)
        broken_ms = self._draw(self.faults.broken)
        if name == "crash" and node.up:
            self.crash(node)
            self.restart(node, self._draw(self.faults.down))
        elif name == "pause" and node.up:
            self.pause(node, self._draw(self.faults.stop))
        elif name == "jump":
            self.set_clock(node, rate=node.rate, jump_ms=self.random.random() * JUMP_MS_MAX)
        elif name == "cut":
            other = self.random.choice(self.nodes)
            self.network.cut(node.index, other.index, self.now_ms + broken_ms)
        elif name == "partition":
            self.partition(self._minority(), broken_ms)
        elif name == "clog":
            for member in self._minority():  # swizzle: one after the other
                begin_ms = self.now_ms + self.random.random() * broken_ms / 2
                end_ms = self.now_ms + broken_ms * (0.5 + self.random.random() / 2)
                self.network.clog(member.index, begin_ms, end_ms)
        self._plan(name)

    def _minority(self) -> list[Node]:
        most = max(1, (len(self.nodes) - 1) // 2)
        return self.random.sample(self.nodes, self.random.randint(1, most))

    def partition(self, minority: Sequence[Node], for_ms: float) -> None:
        """Cut `minority` off from the rest, both ways."""
        self.disturbed = True
        side = [node.index for node in minority]
        self.network.partition(side, self.now_ms + for_ms)

    def heal(self, core: Sequence[Node] | None = None) -> None:
        """Faults end. With a `core`, only its members are well from now on, for ever.

        The others stay as they are, and cut off: progress may depend on the core alone.
        """
        self._faulty = False
        well = list(self.nodes if core is None else core)
        self.network.heal()
        inside = {node.index: None for node in well}
        outside = [node.index for node in self.nodes if node.index not in inside]
        if outside:
            self.partition([self.nodes[index] for index in outside], float("inf"))
        for node in self.nodes:
            self.set_clock(node, rate=1.0)
        for node in well:
            if node.paused_until_ms > self.now_ms:
                node.paused_until_ms = self.now_ms
                self._resume(node)
            self._start_if_down(node)

    def majority(self) -> list[Node]:
        """A random majority, in the order of the nodes."""
        count = self.random.randint(len(self.nodes) // 2 + 1, len(self.nodes))
        chosen = self.random.sample(range(len(self.nodes)), count)
        return [self.nodes[index] for index in sorted(chosen)]
