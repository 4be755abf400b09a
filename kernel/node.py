"""The kernel process: sockets and timers in, the pure core in the middle, effects out.

Interface rules: one event loop, and everything here runs on its thread; only durable writes are
done in another. Effects are carried out in order; those after a `Persist` wait until it is on the
disk. Invariants: N1 an `AssertionError` (our bug) or a record that cannot be made durable ends
the process: the supervisor starts a new one with a higher boot number.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

from manifold.kernel import durable, identity, places, traces
from manifold.kernel.addressing import Addressing
from manifold.kernel.clock import Clock
from manifold.kernel.consulting import Consulting
from manifold.kernel.core import NEXUS_REQUESTS, REQUESTS, Core
from manifold.kernel.effects import (
    Effect,
    Held,
    Notify,
    Persist,
    Reply,
    Send,
    SetTimer,
    after_writes,
)
from manifold.kernel.errors import ManifoldError, Refused, Unavailable
from manifold.kernel.hyperbus.driver import Bus, Incoming
from manifold.kernel.hyperbus.faults import to_failure
from manifold.kernel.hyperbus.messages import CLIENT_PREFIX
from manifold.kernel.labelling import Labelling
from manifold.kernel.leaving import Leaving
from manifold.kernel.logbook import Logbook
from manifold.kernel.membership.messages import (
    Me,
    MemberChanged,
    Refuted,
    State,
    Superseded,
    saved_incarnation,
)
from manifold.kernel.messages import (
    DECODER,
    Agreed,
    Alive,
    Drain,
    FirstVoters,
    FromSupervisor,
    LinkOrders,
    ProcessEnded,
    Ready,
    SetPace,
    SettleVoters,
    Stop,
    ToSupervisor,
)
from manifold.kernel.nexus import storage_driver as disk
from manifold.kernel.nexus.rejoin import RejoinStep
from manifold.kernel.nodespec import NodeSpec
from manifold.kernel.observe.families import Tally
from manifold.kernel.observe.observatory import Observatory
from manifold.kernel.observe.spans import Spans
from manifold.kernel.persisting import Acknowledged, Persisting, load_outbox
from manifold.kernel.process import memory
from manifold.kernel.process.channel import Channel, Closed
from manifold.kernel.process.messages import (
    Calls,
    Compute,
    Fault,
    GlobalCall,
    Result,
    TaskSpec,
    WorkerSpec,
)
from manifold.kernel.process.pool import Pool
from manifold.kernel.process.remains import answers
from manifold.kernel.process.taskpool import TaskPool
from manifold.kernel.registry.messages import AliasTaken, RingChanged
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.globalcalls import GlobalAnswer
from manifold.kernel.scheduler.messages import (
    AbortRun,
    Counted,
    JobEvent,
    JobStatus,
    LimitRun,
    Placed,
    StartRun,
    SubmitJob,
)
from manifold.kernel.syscalls import SystemCalls
from manifold.vm.kid import Kid

log = logging.getLogger("manifold.node")

LAG_MS_MIN = 50.0  # a timer later than this is worth telling membership
CLIENT_CHECK_S = 2.0  # a client's lease: who does not answer at its socket then has lost it
CLIENT = re.compile(r"C-[0-9a-f]{16}")
HOLD_S = 0.002  # a submission is answered at the latest after this
JOB_LOG_S = 0.01  # lines about jobs are written out of the way of the jobs


class Node:
    """See the module. `control` is the channel to the supervisor."""

    def __init__(self, spec: NodeSpec, control: socket.socket, logbook: Logbook) -> None:
        self.spec = spec
        self.logbook = logbook
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self.loop.create_future()
        self.clock = Clock(self.loop)
        self.now_ms = self.clock.now_ms
        self.started_ms = self.now_ms()
        self._control: Channel[FromSupervisor] = Channel(control, FromSupervisor)
        self._timer: asyncio.TimerHandle | None = None
        self._due_ms = 0.0  # when it is to wake us
        self._clients_checked: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._alive = 0
        self._job_events: list[JobEvent] = []
        self._held: dict[str, tuple[Incoming, JobStatus, asyncio.TimerHandle]] = {}
        folder = Path(spec.state_dir)
        self.persisting = Persisting(self, folder)
        self.identity = identity.load_identity(folder)
        self.boot = identity.next_boot(folder)
        incarnation = saved_incarnation(durable.read_record(folder / "incarnation"))
        files = disk.files(spec.config.nexus.disk)
        opened, records = disk.recover(folder / disk.FOLDER, self.boot, files)
        self.commits = disk.Commits(
            folder / disk.FOLDER, files, opened, records, self.loop, self.perform,
            self._voter_stopped, lambda: self.bus.flush(),
        )  # fmt: skip
        self.labelling = Labelling(self, folder, spec.labels)
        self.core = Core(
            self._me(), spec.config, Random(SystemRandom().getrandbits(64)),
            incarnation=incarnation, seeds=spec.seeds, durable=dict(records),
            rejoin=disk.load_step(folder / disk.FOLDER), outbox=load_outbox(folder),
            slots=spec.slots,
        )  # fmt: skip
        self.bus = Bus(
            self.identity.kid, self.boot, spec.config.cluster, DECODER, self._arrived,
            alias=spec.alias, tcp=bool(spec.line),
        )  # fmt: skip
        self.addressing = Addressing(self.bus, self.core.membership.get)
        self.memory = memory.Memory(spec.alias, spec.memory_bytes, spec.memory_cgroup, os.getppid())
        ends = (spec.config.tasks.grace_ms, self, self.memory)
        self.pool = Pool(spec.zygote, self._worker_spec(), *ends)
        self.tasks = TaskPool(spec.zygote, self._task_spec(), spec.slots, *ends)
        self.tally = Tally()
        self.commits.on_batch = self.tally.commit.observe
        self.observatory = Observatory(self)
        self.spans = Spans(self) if traces.wanted(os.environ) else None
        self.calls = SystemCalls(self)
        self.consulting = Consulting(self)
        self.leaving = Leaving(self)

    def _me(self) -> Me:
        spec = self.spec
        return Me(
            self.identity.kid, self.boot, spec.alias, spec.node_class, (spec.reached_at,),
            spec.cores, spec.compute, spec.memory_bytes, spec.bandwidth_bps, spec.latency_ms,
            spec.gpu, os.uname().machine, self.labelling.own,
        )  # fmt: skip

    def _worker_spec(self) -> WorkerSpec:
        tasks = self.spec.config.tasks
        log_path = os.path.join(self.spec.state_dir, "workers.log")
        return WorkerSpec(
            self.spec.alias, 0, min(tasks.memory, self.spec.memory_bytes), tasks.slice_ms,
            self.spec.compute, self.spec.cgroup, log_path, self.spec.memory_cgroup,
        )  # fmt: skip

    def _task_spec(self) -> TaskSpec:
        spec = self.spec
        state, runtime = Path(spec.state_dir), Path(spec.address.removeprefix("ipc://")).parent
        return TaskSpec(
            spec.alias, spec.compute, spec.cgroup, spec.memory_bytes,
            str(state.parent / places.SPOOL),
            places.environ_of(spec.config.cluster, state.parent, runtime), spec.memory_cgroup,
        )  # fmt: skip

    # -- life ---------------------------------------------------------------------------------

    def start(self, liveness_fd: int) -> None:
        """Serve, watch the supervisor, and join."""
        self.loop.set_exception_handler(self._bug)
        self.bus.listen(self.spec.address, self.spec.line)
        self.observatory.start()
        self.loop.add_reader(liveness_fd, self._orphaned)
        self.loop.add_reader(self._control.socket, self._commanded)
        log.info("boot %d of %s (%s)", self.boot, self.spec.alias, self.identity.kid)
        ready = Ready(self.identity.kid, self.boot, self.spec.alias, self.labelling.own)
        self._control.post(ready)
        self.perform(self.core.start(self.now_ms()))
        self._tell_alive()

    def _orphaned(self) -> None:
        self.end(0, "the supervisor is gone")

    def _commanded(self) -> None:
        try:
            messages = self._control.take()
        except Closed:
            self._orphaned()
            return
        for message in messages:
            match message:
                case ProcessEnded(kid=kid, boot=boot):
                    self.perform(self.core.process_ended(kid, boot, self.now_ms()))
                case FirstVoters(voters=voters):
                    self.consulting.initialise(voters)
                case LinkOrders() as orders:
                    self.calls.obey(orders)
                case SettleVoters():
                    self.run(self.leaving.settle(message))
                case Drain(deadline_ms=deadline_ms):
                    self.leaving.drain(deadline_ms)
                case SetPace(share=share):
                    self.pool.pace(share)
                    self.tasks.pace(share)
                case Stop():
                    self.leaving.leave()

    def tell(self, message: ToSupervisor) -> None:
        self._control.post(message)

    def end(self, status: int, why: str) -> None:
        if not self.ended.done():
            log.info("ends: %s", why)
            self.ended.set_result(status)

    def close(self) -> None:
        self._log_jobs()
        for _, _, timer in self._held.values():
            timer.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._clients_checked is not None:
            self._clients_checked.cancel()
        for task in self._tasks:
            task.cancel()
        self.leaving.close()
        self.observatory.close()
        if self.spans is not None:
            self.spans.close()
        self.memory.close()
        self.pool.close()
        self.tasks.close()
        self.commits.close()
        self.bus.close()

    def _bug(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """N1: an exception nobody expected is our bug."""
        error = context.get("exception")
        log.critical("a bug: %s", context.get("message"), exc_info=error)
        self.end(70, "a bug")

    # -- messages -----------------------------------------------------------------------------

    def _arrived(self, incoming: Incoming) -> None:
        body = incoming.body
        if incoming.source.startswith(CLIENT_PREFIX):
            self.watch_clients()
        if incoming.destination and incoming.destination not in (
            self.identity.kid,
            self.spec.alias,
        ):
            self.run(self.calls.relay(incoming))
        elif (kind := type(body)) in REQUESTS and incoming.request:
            self._requested(incoming)
        elif kind in NEXUS_REQUESTS:
            self.consulting.serve(incoming)
        elif self.calls.serves(body):
            self.calls.serve(incoming)
        else:
            self.perform(self.core.receive(Kid(incoming.source), body, self.now_ms()))

    def _requested(self, incoming: Incoming) -> None:
        if self.leaving.left:
            return  # the client hears nothing, and asks another
        try:
            self._check_kind(incoming.body)
            answer, effects = self.core.request(incoming.source, incoming.body, self.now_ms())
        except ManifoldError as error:
            if error.code == "not_found" and incoming.source.startswith(CLIENT_PREFIX):
                self.run(self.calls.ask_all(incoming, error))
            else:
                self.bus.reply(incoming, to_failure(error))
            return
        body = incoming.body
        watches = isinstance(body, SubmitJob) and body.watch
        if watches and isinstance(answer, JobStatus) and answer.state != "queued":
            self._hold(incoming, answer)
            self.perform(effects)
            return
        if any(type(effect) is Held for effect in effects):  # what is acknowledged is on the disk
            self.perform(after_writes(effects, Acknowledged(incoming, answer)))
            return
        self.perform(effects)
        self.bus.reply(incoming, answer)

    def _check_kind(self, body: Any) -> None:
        python = isinstance(body, SubmitJob) and body.spec.kind == "python"
        if python and self.spec.config.tasks.python == "off":
            raise Refused(
                "Python functions are off in this cluster.",
                "Write a kernel, or set tasks.python: on.",
            )

    def _hold(self, incoming: Incoming, answer: JobStatus) -> None:
        """A job that ends soon is answered once, with its result: half a short task's messages."""
        if answer.state != "running" or answer.job in self._held:
            self.bus.reply(incoming, answer)
            return
        timer = self.loop.call_later(HOLD_S, self._answer_held, answer.job)
        self._held[answer.job] = (incoming, answer, timer)

    def _answer_held(self, job: str) -> None:
        held = self._held.pop(job, None)
        if held is not None:
            self.bus.reply(held[0], held[1])

    def _send(self, effect: Send) -> None:
        status = effect.message
        if effect.to == self.identity.kid:  # it waited for a record of ours
            self.perform(self.core.receive(self.identity.kid, effect.message, self.now_ms()))
            return
        if isinstance(status, JobStatus) and status.job in self._held:
            incoming, _, timer = self._held[status.job]
            if incoming.source == effect.to:
                timer.cancel()
                del self._held[status.job]
                self.bus.reply(incoming, status)
                return
        try:
            self.bus.send(effect.to, effect.message, effect.plane)
        except Unavailable:
            if not self.addressing.send_anyway(effect.to, effect.message):
                self.bus.counters["sends_dropped"] += 1  # its protocol will try again

    def run(self, coroutine: Any) -> None:
        """Run a coroutine of ours to its end; its exception is a bug like any other."""
        task: asyncio.Task[None] = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ran)

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._bug(self.loop, {"message": "in a task", "exception": task.exception()})

    # -- effects ------------------------------------------------------------------------------

    def perform(self, effects: Sequence[Effect]) -> None:
        """Carry effects out, in order."""
        for effect in effects:  # an address that is news is needed by what is sent with the news
            if type(effect) is Notify and type(effect.event) is MemberChanged:
                self._learn(effect.event)
        for effect in effects:
            if type(effect) is Send:
                self._send(effect)
            else:
                self._perform_one(effect)
        if self.leaving.draining:
            self.loop.call_soon(self.leaving.look)

    def _voter_stopped(self, error: ManifoldError) -> None:
        """The node goes on without a vote; what its disk holds is read again when it restarts."""
        log.critical("nexus: this voter stops: %s", error)
        self.perform(self.core.voter_stopped(str(error), self.now_ms()))

    def _perform_one(self, effect: Effect) -> None:
        match effect:
            case SetTimer(at_ms=at_ms):
                self._wake_at(at_ms)
            case Notify(event=event):
                self._notified(event)
            case Held(persist=Persist(name=name)):
                if name.startswith(disk.PREFIX):
                    self.commits.write(effect)
                else:
                    self.run(self.persisting.write(effect))
            case Reply():
                self.consulting.answered(effect)
            case Persist():
                raise AssertionError("never emitted by the core")

    def _wake_at(self, at_ms: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_ms = at_ms
        self._timer = self.loop.call_at(self.clock.loop_s(at_ms), self._tick, at_ms)

    def skew_clock(self, jump_ms: float, rate: float) -> None:
        """For tests: see `Clock.skew`."""
        self.clock.skew(jump_ms, rate)
        if self._timer is not None:
            self._wake_at(self._due_ms)

    def _tick(self, due_ms: float) -> None:
        self._timer = None
        now_ms = self.now_ms()
        self.tally.lag.observe(max(0.0, now_ms - due_ms) / 1000)
        if now_ms - due_ms > LAG_MS_MIN:
            self.core.loop_lag(now_ms - due_ms, now_ms)
        self.perform(self.core.tick(max(now_ms, due_ms)))

    def _notified(self, event: Any) -> None:
        match event:
            case Acknowledged(incoming=incoming, answer=answer):
                self.bus.reply(incoming, answer)
            case StartRun():
                self._start_run(event)
            case LimitRun(worker=slot, run=run, last=last):
                if self.tasks.has(run):
                    self.tasks.limit(run, last)
                else:
                    self.pool.limit(slot, run, last)
            case AbortRun(worker=slot, run=run):
                if self.spans is not None:
                    self.spans.run_aborted(run)
                if self.tasks.has(run):
                    self.tasks.abort(run)
                else:
                    self.pool.abort(slot, run)
            case GlobalAnswer(slot=slot, done=done):
                self.pool.global_done(slot, done)
            case MemberChanged(member=member, previous_state=previous):
                before = previous.name.lower() if previous is not None else "unknown"
                log.info(
                    "%s (%s, boot %d): %s -> %s", member.meta.alias, member.kid[:10],
                    member.boot, before, member.state.name.lower(),
                )  # fmt: skip
                self._tell_alive()
            case AliasTaken(alias=alias, kid=kid):
                log.warning("the alias %s belongs to %s; this node goes by its KID", alias, kid)
            case RejoinStep(step=step, why=why):
                log.warning("nexus: %s", why)
                disk.save_step(Path(self.spec.state_dir) / disk.FOLDER, step)
            case RingChanged(epoch=epoch, joined=joined, left=left):
                log.info("epoch %d: %d joined, %d left the ring", epoch, len(joined), len(left))
            case JobEvent():
                if event.trace and self.spans is not None:
                    self.spans.job_event(event)
                if not self._job_events:
                    self.loop.call_later(JOB_LOG_S, self._log_jobs)
                self._job_events.append(event)
            case Placed() if self.spans is not None:
                self.spans.placed(event)
            case Counted() if self.spans is not None:
                self.spans.counted(event)
            case Refuted(by=by):
                log.warning("somebody (%s) held us for dead; refuted", by[:10])
            case Superseded(boot=boot):
                self.end(75, f"another process with our key has boot {boot}")

    def _log_jobs(self) -> None:
        events, self._job_events = self._job_events, []
        for event in events:
            self.tally.job_events[event.what] += 1
            log.info("job %s %s: %s", event.job, event.what, event.detail)

    def _learn(self, change: MemberChanged) -> None:
        member = change.member
        if member.kid == self.identity.kid:
            return
        self.calls.member_changed(member)
        self.addressing.learn(member)

    def tell_agreed(self) -> None:
        self._control.post(Agreed())

    def _tell_alive(self) -> None:
        count = sum(m.state in (State.ALIVE, State.SUSPECT) for m in self.core.membership.members())
        if count != self._alive:
            self._alive = count
            self._control.post(Alive(count))

    # -- workers ------------------------------------------------------------------------------

    def _start_run(self, start: StartRun) -> None:
        spec = start.spec
        if spec.trace and self.spans is not None:
            self.spans.run_begins(start)
        if spec.kind == "python":
            self._start_calls(start)
            return
        self.pool.compute(
            start.worker,
            Compute(
                start.run, spec.program, start.ir, spec.reduce, spec.arguments, spec.isolate,
                spec.lo, spec.hi, blocks.block_indices(spec), start.first, start.last,
                spec.indices[start.first : start.last], spec.kind == "wasm", spec.entry,
                start.parcels,
            ),
        )  # fmt: skip

    def _start_calls(self, start: StartRun) -> None:
        session = start.spec.session
        refusal = ""
        if self.spec.config.tasks.python == "off":
            refusal = "Python functions are off on this node."
        elif session is None or len(start.parcels) != start.last - start.first:
            refusal = "A call came without its session or its arguments."
        if refusal or session is None:
            fault = Fault("refused", refusal, "Submit it through the SDK.")
            self.loop.call_soon(self.run_ended, start.worker, start.run, fault)
            return
        calls = Calls(
            start.run, session, start.spec.program, start.ir, start.parcels, start.first, start.last
        )
        self.tasks.compute(start.worker, calls)

    def run_blocks(
        self, slot: int, run: int, first: int, results: Sequence[Result], gas: float, busy_ms: float
    ) -> None:
        now_ms = self.now_ms()
        self.perform(self.core.run_blocks(slot, run, first, results, gas, busy_ms, now_ms))

    def run_limited(self, slot: int, run: int, last: int) -> None:
        self.perform(self.core.run_limited(slot, run, last, self.now_ms()))

    def run_ended(self, slot: int, run: int, fault: Fault | None) -> None:
        if self.spans is not None:
            self.spans.run_ends(run, fault)
        self.perform(self.core.run_ended(slot, run, fault, self.now_ms()))

    def run_moved(self, slot: int, run: int, to: int) -> None:
        self.perform(self.core.run_moved(slot, run, to, self.now_ms()))

    def run_lost(self, slot: int, run: int, reason: str) -> None:
        log.warning("slot %d: %s", slot, reason)
        self.tally.runs_lost += 1
        if self.spans is not None:
            self.spans.run_ends(run, lost=reason)
        self.perform(self.core.run_lost(slot, run, reason, self.now_ms()))

    def global_call(self, slot: int, call: GlobalCall) -> None:
        self.perform(self.core.global_call(slot, call, self.now_ms()))

    # -- clients ------------------------------------------------------------------------------

    def watch_clients(self) -> None:
        """See to it that clients who die without a goodbye are forgotten."""
        if self._clients_checked is None:
            self._clients_checked = self.loop.call_later(CLIENT_CHECK_S, self._check_clients)

    def _check_clients(self) -> None:
        self._clients_checked = None
        left = 0
        for client, address in self.bus.clients():
            socket_path = Path(address.removeprefix("ipc://") + ".c")
            if answers(socket_path):
                left += 1
                continue
            log.info("client %s is gone without a goodbye", client)
            with contextlib.suppress(OSError):
                socket_path.unlink()
            self.client_gone(client)
        if left:
            self.watch_clients()

    def client_gone(self, client: str) -> None:
        """What it alone waited for ends, and what it left on this host goes."""
        self.perform(self.core.client_gone(client, self.now_ms()))
        self.consulting.client_gone(client)
        self.tasks.client_gone(client)
        self.bus.forget(client)
        if CLIENT.fullmatch(client):
            folder = Path(self.tasks.spool) / client
            self.run(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


async def serve(spec: NodeSpec, control: socket.socket, liveness_fd: int, logbook: Logbook) -> int:
    """Run a node until it ends; its exit status."""
    control.setblocking(False)
    node = Node(spec, control, logbook)
    try:
        node.start(liveness_fd)
        return await node.ended
    finally:
        node.close()
        sys.stdout.flush()
