"""The runner: what a node does with shards that owners assign to it. Pure.

Interface rules: owners speak through `receive`, workers through the `run_…` events; each returns
effects. Workers are numbered slots; a slot computes one run (a stretch of one attempt) at a time.
Two owners may run a job of one id (its client thought the first lost): attempts are told apart by
their owner.
Invariants: R1 a slot has at most one run; R2 results stay here until the owner has counted them;
R3 admission never holds more than `ATTEMPTS_MAX` attempts; R4 a run is fenced by its number: what
an ended run still says is ignored; R5 an attempt never
computes what it gave up with `Shrunk`; R6 at most
`WINDOW_BYTES` and one report of results of an attempt are on their way; R7 an attempt that is over
is not begun again by a late copy of its assignment, as far as `OVER_MAX` reach.
Source: design page of the scheduler (blocks, one writer, credits). Between owner and runner this
is go-back-N over blocks: acknowledgements are cumulative, what is not acknowledged is sent again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from manifold.kernel.config import SchedulerConfig
from manifold.kernel.effects import Effect, Notify, Plane, Send
from manifold.kernel.geode.messages import LoadReport
from manifold.kernel.process.messages import Fault, Result
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.messages import (
    ATTEMPT_BITS,
    BOOT_MASK,
    RESULTS_PER_REPORT_MAX,
    AbortRun,
    AssignShard,
    DropShard,
    JobSpec,
    LimitRun,
    NeedProgram,
    Rejected,
    Report,
    ReportAck,
    Shrink,
    Shrunk,
    StartRun,
)
from manifold.kernel.tasks.messages import Parcel
from manifold.vm.kid import Kid, kid_of

ATTEMPTS_MAX = 4096  # held at once; each is under 1 KiB without its results
OVER_MAX = 4096  # attempts that are over, remembered; 300 bytes each
PROGRAMS_MAX = 256  # IRs kept by KID
PROGRAM_CACHE_BYTES_MAX = 64 << 20
REPORT_BYTES_MAX = 2 << 20  # results of one report: two frames, so that control gets through
QUANTUM_MS = 100.0  # a run that others wait for yields its slot after this
RESEND_MS = 500.0  # a report not acknowledged in this time is sent again; twice that the next time
RESEND_MS_MAX = 8000.0  # and so on up to this: a slow link is not to drown in repetitions
REWIND_MS = 20.0  # a gap is repaired at once, but not again until the repair can have arrived
# Results of a run that goes on are sent together, this often: the owner's time per report is a
# hundred microseconds, and 64 busy slots would take a tenth of it at one report each 64 ms.
REPORT_MS = 50.0
EAGER_BYTES = 256 << 10  # or when they are so large
WINDOW_BYTES = 4 << 20  # two reports: while one is acknowledged the next is on its way
SETTLED_JOBS_MAX = 256  # jobs with effects of which it is remembered what is settled
ORPHAN_MS = 30_000.0  # an owner that has acknowledged nothing for so long is gone


Key = tuple[Kid, str, int]  # owner, job, shard


@dataclass(slots=True)
class Attempt:
    """One attempt of one shard, from its assignment until its owner drops it."""

    owner: Kid
    job: str
    shard: int
    attempt: int
    spec: JobSpec
    ir: bytes
    last: int
    base: int  # first block whose result is still here
    next: int  # first block that is not computed
    sent: int  # first block that was never reported since the last rewind
    heard_ms: float
    reported_ms: float
    results: deque[Result] = field(default_factory=deque)
    run: int = 0  # 0 while it waits for a slot
    slot: int = -1
    run_since_ms: float = 0.0
    yielding: bool = False
    shrink_to: int = -1  # the boundary asked for while a run is on; -1: none
    gas: float = 0.0
    busy_ms: float = 0.0
    gas_per_block: float = 0.0
    fresh_gas: float = 0.0  # used since the last block that was done
    fault: Fault | None = None
    lost: str = ""
    tries: int = 1
    unacked_ms: float = 0.0  # since when the oldest unacknowledged result is on its way
    resend_ms: float = RESEND_MS
    rewound_ms: float = -1e9
    told: bool = False  # whether any result was ever sent
    unsent_bytes: int = 0  # of results, about
    flying_bytes: int = 0  # of results sent and not acknowledged
    queued_gas: float = 0.0  # its part of `Runner._queued_gas`
    parcels: tuple[Parcel, ...] = ()  # of the blocks from `first`
    first: int = 0

    @property
    def key(self) -> Key:
        return self.owner, self.job, self.shard

    @property
    def owed_parcels(self) -> tuple[Parcel, ...]:
        return self.parcels[self.next - self.first : self.last - self.first]

    @property
    def ended(self) -> bool:
        return self.next >= self.last or self.fault is not None or bool(self.lost)


def _size(result: Result) -> int:
    return 256 + 16 * len(result.cells) if isinstance(result, Fault) else result.nbytes


class Runner:
    """See the module."""

    def __init__(self, me: Kid, config: SchedulerConfig, slots: int) -> None:
        self.me = me
        self.config = config
        self.slots = slots
        self.gas_per_s = 0.0  # of one slot, measured
        self.free_memory_bytes = 1 << 60
        self.cordoned = False
        self._attempts: dict[Key, Attempt] = {}
        self._over: OrderedDict[Key, int] = OrderedDict()
        self._waiting: deque[Key] = deque()
        self._running: dict[int, Attempt] = {}  # by slot, R1
        self._programs: OrderedDict[Kid, bytes] = OrderedDict()
        self._program_bytes = 0
        self._next_run = 1
        self._queued_gas = 0.0  # of all attempts, as far as it can be told
        self._gas_per_index: OrderedDict[Kid, float] = OrderedDict()  # as seen here, by program
        self._settled: OrderedDict[str, tuple[tuple[int, int], ...]] = OrderedDict()  # by job

    # -- from owners --------------------------------------------------------------------------

    def receive(
        self,
        source: Kid,
        message: AssignShard | Shrink | DropShard | ReportAck,
        now_ms: float,
    ) -> list[Effect]:
        match message:
            case AssignShard():
                return self._assigned(source, message, now_ms)
            case Shrink():
                return self._shrink(source, message)
            case DropShard():
                held = self._attempts.get((source, message.job, message.shard))
                if held is not None and held.attempt <= message.attempt:
                    return self._drop(held, now_ms)
                return []
            case ReportAck():
                return self._acknowledged(source, message, now_ms)

    def holds(self, owner: Kid, message: AssignShard) -> bool:
        """Whether this very attempt, or a later one, is here already."""
        held = self._attempts.get((owner, message.job, message.shard))
        return held is not None and held.attempt >= message.attempt

    def _assigned(self, owner: Kid, message: AssignShard, now_ms: float) -> list[Effect]:
        key = (owner, message.job, message.shard)
        effects: list[Effect] = []
        held = self._attempts.get(key)
        if held is not None:
            if held.attempt > message.attempt:
                return []
            if held.attempt == message.attempt:
                return [self._report(held, now_ms)]
            effects += self._drop(held, now_ms)
        if message.attempt <= self._over.get(key, -1):
            return effects  # R7
        identity = (message.job, message.shard, message.attempt)
        ir = message.ir or self._programs.get(message.spec.program, b"")
        if not ir:
            return [*effects, Send(owner, NeedProgram(*identity))]
        if not self._admits():
            refused = Rejected(*identity, self.config.backlog_ms, load=self.load())
            return [*effects, Send(owner, refused)]
        attempt = Attempt(
            owner, *identity, message.spec, ir, message.last,
            message.first, message.first, message.first, now_ms, now_ms, tries=message.tries,
            parcels=message.parcels, first=message.first,
        )  # fmt: skip
        known = self._gas_per_index.get(message.spec.program)
        if known is not None:
            attempt.gas_per_block = known * blocks.block_indices(message.spec)
        if message.ir and not self._keep_program(message.spec.program, message.ir):
            attempt.fault = Fault("invalid_program", "The program does not have the KID it claims.")
        self._attempts[key] = attempt
        self._weigh(attempt)
        if attempt.fault is None:
            self._waiting.append(key)
            effects += self._fill(now_ms)
        if attempt.run == 0:
            effects.append(self._report(attempt, now_ms))
        return effects

    def _admits(self) -> bool:
        return self.credits() > 0

    def credits(self) -> int:
        """Attempts that would still be admitted: free slots and a short backlog each."""
        if self.cordoned:
            return 0
        free = self._free()
        if len(self._waiting) >= 2 * self.slots and self._backlog_ms() > self.config.backlog_ms:
            return max(0, free)
        room = free + self.config.queue - len(self._waiting)
        return max(0, min(ATTEMPTS_MAX - len(self._attempts), room))  # R3

    def _free(self) -> int:
        return self.slots - sum(slot < self.slots for slot in self._running)

    def _backlog_ms(self) -> float:
        """How long the slots will take for all that is here."""
        return self._queued_gas / self.gas_per_s * 1000 / self.slots if self.gas_per_s else 0.0

    def _weigh(self, attempt: Attempt, *, gone: bool = False) -> None:
        """Keep the sum of what is queued up to date."""
        queued = 0.0 if gone else attempt.gas_per_block * (attempt.last - attempt.next)
        self._queued_gas += queued - attempt.queued_gas
        attempt.queued_gas = queued
        if not self._attempts:
            self._queued_gas = 0.0  # exactly: sums of floats leave dust

    def _keep_program(self, kid: Kid, ir: bytes) -> bool:
        if kid in self._programs:
            self._programs.move_to_end(kid)
            return True
        if kid_of(ir) != kid:
            return False
        self._programs[kid] = ir
        self._program_bytes += len(ir)
        while len(self._programs) > PROGRAMS_MAX or self._program_bytes > PROGRAM_CACHE_BYTES_MAX:
            _, old = self._programs.popitem(last=False)
            self._program_bytes -= len(old)
        return True

    def _current(self, source: Kid, message: Shrink | ReportAck) -> Attempt | None:
        held = self._attempts.get((source, message.job, message.shard))
        if held is None or held.attempt != message.attempt:
            return None
        return held

    def _shrink(self, owner: Kid, message: Shrink) -> list[Effect]:
        held = self._current(owner, message)
        if held is None:
            return []  # R5: its assignment may still come; if not, our silence tells
        if held.run and message.last < held.last:
            held.shrink_to = message.last
            return [Notify(LimitRun(held.slot, held.run, message.last))]
        return [self._shrunk(held, message.last)]

    def _acknowledged(self, owner: Kid, message: ReportAck, now_ms: float) -> list[Effect]:
        if message.settled:
            self._settled.pop(message.job, None)
            self._settled[message.job] = message.settled
            if len(self._settled) > SETTLED_JOBS_MAX:
                self._settled.popitem(last=False)
        held = self._current(owner, message)
        if held is None:
            return []
        held.heard_ms = now_ms
        before = held.base
        while held.base < message.counted and held.results:
            result = held.results.popleft()
            if held.base < held.sent:
                held.flying_bytes -= _size(result)
            held.base += 1
        held.sent = max(held.sent, held.base)
        if held.base > before:  # only progress says that nothing is missing
            held.unacked_ms = now_ms
            held.resend_ms = RESEND_MS
        if held.base >= held.last and held.ended:
            # Its run has nothing left to do and ends by itself: that is cheaper than an abort.
            return [] if held.run else self._drop(held, now_ms)
        if message.missing and now_ms - held.rewound_ms > REWIND_MS:
            return [self._rewind(held, now_ms)]
        if held.sent < held.next and (held.ended or now_ms - held.reported_ms >= REPORT_MS):
            return [self._report(held, now_ms)]
        return []

    def _rewind(self, attempt: Attempt, now_ms: float) -> Effect:
        """Go back to what is not acknowledged, and send it again."""
        attempt.sent, attempt.flying_bytes = attempt.base, 0
        attempt.rewound_ms = now_ms
        return self._report(attempt, now_ms)

    def _drop(self, attempt: Attempt, now_ms: float) -> list[Effect]:
        del self._attempts[attempt.key]
        self._over.pop(attempt.key, None)
        self._over[attempt.key] = attempt.attempt
        if len(self._over) > OVER_MAX:
            self._over.popitem(last=False)
        self._weigh(attempt, gone=True)
        if attempt.run:
            del self._running[attempt.slot]
            abort = AbortRun(attempt.slot, attempt.run)
            return [Notify(abort), *self._fill(now_ms)]
        if attempt.key in self._waiting:
            self._waiting.remove(attempt.key)
        return []

    def drop_owner(self, owner: Kid, boot: int, now_ms: float) -> list[Effect]:
        """Process `boot` of the owner is dead: whatever it assigned is nobody's any more."""
        effects: list[Effect] = []
        below = ((boot & BOOT_MASK) + 1) << ATTEMPT_BITS
        for attempt in [
            a for a in self._attempts.values() if a.owner == owner and a.attempt < below
        ]:
            effects += self._drop(attempt, now_ms)
        return effects

    # -- to and from workers ------------------------------------------------------------------

    def _fill(self, now_ms: float) -> list[Effect]:
        """Give free slots to waiting attempts, in order."""
        effects: list[Effect] = []
        for slot in range(self.slots):
            if not self._waiting:
                break
            if slot in self._running:
                continue
            attempt = self._attempts[self._waiting.popleft()]
            attempt.run, attempt.slot = self._next_run, slot
            attempt.run_since_ms = now_ms
            attempt.yielding = False
            self._next_run += 1
            self._running[slot] = attempt
            start = StartRun(
                slot, attempt.run, attempt.spec, attempt.ir, attempt.next, attempt.last,
                attempt.owed_parcels,
            )  # fmt: skip
            effects.append(Notify(start))
        return effects

    def _run(self, slot: int, run: int) -> Attempt | None:
        attempt = self._running.get(slot)
        return attempt if attempt is not None and attempt.run == run else None  # R4

    def running_at(self, slot: int, run: int) -> Attempt | None:
        """The attempt of a run that goes on."""
        return self._run(slot, run)

    def settled(self, job: str) -> tuple[tuple[int, int], ...]:
        """Positions of a job with effects that nobody will have again, as far as we know."""
        return self._settled.get(job, ())

    def run_blocks(
        self,
        slot: int,
        run: int,
        first: int,
        results: Sequence[Result],
        gas: float,
        busy_ms: float,
        now_ms: float,
    ) -> list[Effect]:
        """A worker has computed the blocks from `first`. None at all: it is alive, within one."""
        attempt = self._run(slot, run)
        if attempt is None:
            return []
        self._account(attempt, len(results), gas, busy_ms)
        if not results:
            return []
        assert first == attempt.next, "a worker computes its blocks in order"
        attempt.results.extend(results)
        attempt.next += len(results)
        self._weigh(attempt)
        attempt.unsent_bytes += sum(_size(result) for result in results)
        if (
            attempt.next >= attempt.last
            or not attempt.told  # the first says how fast we are
            or now_ms - attempt.reported_ms >= REPORT_MS
            or attempt.unsent_bytes >= EAGER_BYTES
        ):
            return [self._report(attempt, now_ms)]
        return []

    def _account(self, attempt: Attempt, count: int, gas: float, busy_ms: float) -> None:
        attempt.gas += gas
        attempt.busy_ms += busy_ms
        attempt.fresh_gas += gas
        if count:
            attempt.gas_per_block, attempt.fresh_gas = attempt.fresh_gas / count, 0.0
            self._learn_gas(attempt)
        if busy_ms > 1.0:  # shorter stretches measure the clock, not the machine
            speed = gas / busy_ms * 1000
            self.gas_per_s = 0.7 * self.gas_per_s + 0.3 * speed if self.gas_per_s else speed

    def _learn_gas(self, attempt: Attempt) -> None:
        """What waits is weighed by what the program took here before."""
        program = attempt.spec.program
        gas = attempt.gas_per_block / blocks.block_indices(attempt.spec)
        if self._gas_per_index.pop(program, None) is None:
            while len(self._gas_per_index) >= PROGRAMS_MAX:
                self._gas_per_index.popitem(last=False)
        self._gas_per_index[program] = gas

    def run_limited(self, slot: int, run: int, last: int, now_ms: float) -> list[Effect]:
        """The worker will stop before block `last`, the answer to `LimitRun`."""
        attempt = self._run(slot, run)
        if attempt is None or attempt.shrink_to < 0:
            return []
        # Where the run stops to let another have its slot, the attempt goes on later.
        return [self._shrunk(attempt, max(last, attempt.shrink_to))]

    def _shrunk(self, attempt: Attempt, last: int) -> Effect:
        attempt.shrink_to = -1
        attempt.last = min(attempt.last, max(last, attempt.next))
        self._weigh(attempt)
        answer = Shrunk(attempt.job, attempt.shard, attempt.attempt, attempt.last)
        return Send(attempt.owner, answer)

    def run_moved(self, slot: int, run: int, to: int, now_ms: float) -> list[Effect]:
        """R1 holds for slots beyond ours too: there a call waits for calls of its own."""
        attempt = self._run(slot, run)
        if attempt is None:
            return []
        assert to >= self.slots and to not in self._running, "R1"
        del self._running[slot]
        attempt.slot = to
        self._running[to] = attempt
        return self._fill(now_ms)

    def run_ended(self, slot: int, run: int, fault: Fault | None, now_ms: float) -> list[Effect]:
        """The run is over: at its limit, or with the program's fault."""
        attempt = self._run(slot, run)
        if attempt is None:
            return []
        effects: list[Effect] = []
        if attempt.shrink_to >= 0:
            effects.append(self._shrunk(attempt, attempt.shrink_to))
        self._leave_slot(attempt)
        attempt.fault = fault
        if fault is not None or attempt.sent < attempt.next:
            effects.append(self._report(attempt, now_ms))
        if not attempt.ended:
            self._waiting.append(attempt.key)
        elif fault is None and attempt.base >= attempt.last:
            effects += self._drop(attempt, now_ms)
        return effects + self._fill(now_ms)

    def run_lost(self, slot: int, run: int, reason: str, now_ms: float) -> list[Effect]:
        """The process that had the run is gone; the pool starts another when it is needed."""
        attempt = self._run(slot, run)
        if attempt is None:
            return []
        self._leave_slot(attempt)
        attempt.lost = reason
        return [self._report(attempt, now_ms), *self._fill(now_ms)]

    def drain(self) -> list[Effect]:
        """Admit nothing from now on and give back what is not begun: its owners ask elsewhere."""
        self.cordoned = True
        effects: list[Effect] = []
        for attempt in self._attempts.values():
            if attempt.run:  # the block that it is at is finished; then as if it had been shrunk
                attempt.shrink_to = attempt.next
                effects.append(Notify(LimitRun(attempt.slot, attempt.run, attempt.next)))
            elif not attempt.ended:
                effects.append(self._shrunk(attempt, attempt.next))
        self._waiting.clear()
        return effects

    def _leave_slot(self, attempt: Attempt) -> None:
        del self._running[attempt.slot]
        attempt.run, attempt.slot = 0, -1
        attempt.shrink_to = -1

    # -- reports ------------------------------------------------------------------------------

    def load(self) -> LoadReport:
        """What this node says of itself."""
        return LoadReport(
            queued_gas=max(0.0, self._queued_gas),
            slots=self.slots,
            free_slots=max(0, self._free() - len(self._waiting)),
            credits=self.credits(),
            free_memory_bytes=self.free_memory_bytes,
            gas_per_s=self.gas_per_s,
        )

    def _report(self, attempt: Attempt, now_ms: float) -> Effect:
        batch: list[Result] = []
        size = 0
        if attempt.sent < attempt.next and attempt.flying_bytes < WINDOW_BYTES:  # R6
            offset = attempt.sent - attempt.base
            for index in range(offset, min(len(attempt.results), offset + RESULTS_PER_REPORT_MAX)):
                each = _size(attempt.results[index])
                if batch and size + each > REPORT_BYTES_MAX:
                    break
                size += each
                batch.append(attempt.results[index])
        first = attempt.sent
        if batch and attempt.sent == attempt.base:
            attempt.unacked_ms = now_ms
        attempt.sent += len(batch)
        attempt.flying_bytes += size
        attempt.told = attempt.told or bool(batch)
        attempt.reported_ms = now_ms
        whole = attempt.sent == attempt.next  # a fault counts only after all that preceded it
        attempt.unsent_bytes = 0 if whole else attempt.unsent_bytes
        report = Report(
            attempt.job, attempt.shard, attempt.attempt, first, tuple(batch),
            attempt.run > 0, attempt.gas, attempt.busy_ms, self.load(),
            attempt.fault if whole else None, attempt.lost if whole else "",
        )  # fmt: skip
        return Send(attempt.owner, report, Plane.DATA)

    def tick(self, now_ms: float) -> list[Effect]:
        """Heartbeats, resends, time slices; orphans are dropped."""
        effects: list[Effect] = []
        for attempt in list(self._attempts.values()):
            if now_ms - attempt.heard_ms > ORPHAN_MS:
                effects += self._drop(attempt, now_ms)
                continue
            if attempt.base < attempt.sent and now_ms - attempt.unacked_ms > attempt.resend_ms:
                attempt.resend_ms = min(2 * attempt.resend_ms, RESEND_MS_MAX)
                effects.append(self._rewind(attempt, now_ms))
            elif (
                attempt.sent < attempt.next
                or now_ms - attempt.reported_ms >= self.config.progress_ms
            ):
                effects.append(self._report(attempt, now_ms))
            if (
                self._waiting
                and attempt.run
                and not attempt.yielding
                and attempt.shrink_to < 0
                and now_ms - attempt.run_since_ms > QUANTUM_MS
            ):
                attempt.yielding = True
                effects.append(Notify(LimitRun(attempt.slot, attempt.run, 0)))
        return effects

    @property
    def busy(self) -> bool:
        """Whether ticks are needed."""
        return bool(self._attempts)

    @property
    def runs(self) -> int:
        """How many were begun."""
        return self._next_run - 1

    @property
    def held(self) -> int:
        """Attempts that are here, whatever their state."""
        return len(self._attempts)

    def attempts(self) -> list[Attempt]:
        return list(self._attempts.values())

    def running(self) -> list[tuple[int, Attempt]]:
        """Slot and attempt of what is being computed, by slot (for `ps`)."""
        return sorted(self._running.items())

    def waiting(self) -> list[Attempt]:
        return [self._attempts[key] for key in self._waiting]
