"""Simulated clients: they submit, watch, kill, and go elsewhere when their node does not answer.

The behaviour is that of `shells/sdk/client.py`: a job's id is its idempotency token; a job of
which nothing was heard for `CHECK_MS` is asked about; a node that does not answer is left, and
where the next one does not know the job it is submitted there again, under the same id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from manifold.kernel.effects import Effect, Send, after_writes
from manifold.kernel.errors import ManifoldError
from manifold.kernel.process.messages import Result
from manifold.kernel.scheduler.messages import (
    FetchResult,
    JobSpec,
    JobStatus,
    KillJob,
    ResultPart,
    SubmitJob,
    WatchJob,
)
from manifold.tools.simulator.world import Node, World

CHECK_MS = 1000.0
ASK_TIMEOUT_MS = 1500.0
LINK_MS = 0.3  # between a client and its node, one way


@dataclass(slots=True)
class Task:
    """One job as its client sees it. `ended` is "" while it waits for it."""

    job: str
    spec: JobSpec
    ir: bytes
    home: int  # index of the node the client is attached to
    client: str = ""
    kill: bool = False
    ended: str = ""  # done, failed, cancelled, refused
    status: JobStatus | None = None
    results: tuple[Result, ...] = ()
    error: str = ""
    submits: int = 0
    begun_ms: float = 0.0
    ended_ms: float = 0.0
    heard_ms: float = 0.0
    token: int = 0  # of the last question; an answer to an earlier one is ignored
    asking: bool = False  # it is open


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What a node answers to a question, once all that it says is durable."""

    task: Task
    token: int
    message: Any
    answer: Any


@dataclass(slots=True)
class Clients:
    """Every client of the world, one for each job."""

    world: World
    tasks: list[Task] = field(default_factory=list)
    _by_name: dict[str, Task] = field(default_factory=dict)

    def watch(self) -> None:
        self.world.on_send.append(self._pushed)
        self.world.on_notify.setdefault(Acknowledged, []).append(self._acknowledged)

    def submit(self, task: Task) -> None:
        """Now; the client is attached to node `task.home`."""
        task.client = f"C-{len(self.tasks):06}"
        task.begun_ms = task.heard_ms = self.world.now_ms
        self.tasks.append(task)
        self._by_name[task.client] = task
        self._submit(task)
        self.world.at(CHECK_MS, self._check, task)

    def kill(self, task: Task) -> None:
        if not task.ended:
            task.kill = True
            self._ask(task, KillJob(task.job))

    def _submit(self, task: Task) -> None:
        task.submits += 1
        again = task.submits > 1
        self._ask(task, SubmitJob(task.job, task.spec, task.ir, again=again))

    def _check(self, task: Task) -> None:
        if task.ended:
            return
        if not task.asking and self.world.now_ms - task.heard_ms >= CHECK_MS:
            self._ask(task, KillJob(task.job) if task.kill else WatchJob(task.job))
        self.world.at(CHECK_MS, self._check, task)

    # -- questions ----------------------------------------------------------------------------

    def _ask(self, task: Task, message: Any) -> None:
        task.token += 1
        task.asking = True
        token, home = task.token, task.home
        self.world.at(ASK_TIMEOUT_MS, self._unanswered, task, token, message)
        if self._passes():
            self.world.at(LINK_MS, self._arrived, task, token, home, message)

    def _passes(self) -> bool:
        network = self.world.network
        return not network.faulty or self.world.random.random() >= self.world.faults.drop

    def _arrived(
        self, task: Task, token: int, home: int, message: Any, *, relayed: bool = False
    ) -> None:
        node = self.world.nodes[home]
        if not node.up:
            return

        def serve(core: Any, now_ms: float) -> list[Effect]:
            effects: list[Effect] = []
            answer: Any
            try:
                answer, effects = core.request(task.client, message, now_ms)
            except ManifoldError as error:
                answer = error
                owner = self._owner(task.job) if error.code == "not_found" else None
                if owner is not None and not relayed:  # the node asks all the others
                    there = owner.index
                    self.world.at(
                        LINK_MS, lambda: self._arrived(task, token, there, message, relayed=True)
                    )
                    return []
            return after_writes(effects, Acknowledged(task, token, message, answer))

        self.world.call(node, serve)

    def _acknowledged(self, node: Node, event: Acknowledged) -> None:
        """The answer leaves its node, when what it says is on the disk."""
        if self._passes():
            self.world.at(
                LINK_MS, self._answered, event.task, event.token, event.message, event.answer
            )

    def _owner(self, job: str) -> Node | None:
        """Who would answer a question to all nodes."""
        for node in self.world.nodes:
            if node.up and self.world.now_ms >= node.paused_until_ms:
                owner = node.machine.scheduler.owner
                if job in owner.jobs or job in owner.shelf.jobs or owner.queue.holds(job):
                    return node
        return None

    def _unanswered(self, task: Task, token: int, message: Any) -> None:
        if task.ended or token != task.token:
            return
        node = self.world.nodes[task.home]
        if not node.up or self.world.now_ms < node.paused_until_ms:
            task.home = self.world.random.randrange(len(self.world.nodes))
        if isinstance(message, SubmitJob):
            self._submit(task)
        else:
            self._ask(task, message)

    def _answered(self, task: Task, token: int, message: Any, answer: Any) -> None:
        if task.ended or token != task.token:
            return
        task.token += 1
        task.asking = False
        if isinstance(answer, ManifoldError):
            self._refused(task, message, answer)
        elif isinstance(answer, ResultPart):
            self._fetched(task, answer)
        else:
            self._heard(task, answer)

    def _refused(self, task: Task, message: Any, error: ManifoldError) -> None:
        if error.code == "not_found" and isinstance(message, WatchJob):
            task.results = ()
            self._submit(task)  # its owner is gone, and the job with it
        elif error.code == "not_found" and isinstance(message, KillJob):
            self._end(task, "cancelled")  # its owner has ended: it does not run there
        else:
            task.error = f"{error.code}: {error.message}"
            self._end(task, "refused")

    # -- news ---------------------------------------------------------------------------------

    def _pushed(self, node: Node, send: Send) -> None:
        if isinstance(send.message, JobStatus) and self._passes():
            task = self._by_name.get(send.to)
            if task is not None:
                self.world.at(LINK_MS, self._heard, task, send.message)

    def _heard(self, task: Task, status: JobStatus) -> None:
        if task.ended or status.job != task.job:
            return
        task.heard_ms = self.world.now_ms
        task.status = status
        if status.state in ("queued", "running"):
            return
        if status.state == "done" and status.results is None:
            task.results = ()
            self._ask(task, FetchResult(task.job, 0))
            return
        task.results = status.results or ()
        self._end(task, status.state)

    def _fetched(self, task: Task, part: ResultPart) -> None:
        status = task.status
        assert status is not None, "only what is done is fetched"
        task.heard_ms = self.world.now_ms
        if part.first == len(task.results):
            task.results += part.results
        if len(task.results) >= status.parts:
            self._end(task, "done")
        else:
            self._ask(task, FetchResult(task.job, len(task.results)))

    def _end(self, task: Task, how: str) -> None:
        task.ended = how
        task.ended_ms = self.world.now_ms
        task.token += 1
