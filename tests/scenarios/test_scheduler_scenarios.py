"""Readable transcripts of jobs on small simulated clusters, compared with `scheduler/*.txt`.

A change of the protocol changes them: read the difference, and if it is what you meant, write them
anew with `MANIFOLD_REWRITE=1 pytest tests/scenarios`. Reports and acknowledgements are left out,
but for those that end an attempt.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifold.kernel.effects import Send
from manifold.kernel.scheduler.messages import (
    AbortRun,
    AssignShard,
    DropShard,
    JobEvent,
    JobSpec,
    JobStatus,
    NeedProgram,
    Rejected,
    Report,
    Shrink,
    Shrunk,
    StartRun,
)
from manifold.tools.simulator.clients import Task
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.jobs import Exact, composite
from manifold.tools.simulator.run import build, settle
from manifold.tools.simulator.workers import CORE_GAS_PER_S, Program
from manifold.tools.simulator.world import Node, World
from manifold.vm.kid import kid_of

FOLDER = Path(__file__).parent / "scheduler"
INDICES = 40  # blocks of one index each


class Stage:
    """Three or more unequal nodes that have met, a job, and a transcript of what they say."""

    def __init__(self, nodes: int, seconds: float, traps: tuple[int, ...] = ()) -> None:
        self.world, made = build(1, nodes, Faults(), composite)
        self.checkers = made.checkers
        self.exact = next(checker for checker in made.checkers if isinstance(checker, Exact))
        self.lines: list[str] = []
        self.world.start_all()
        self.world.run(2000.0)
        self.begun_ms = self.world.now_ms
        self.world.on_send.append(self._sent)
        self.world.on_notify.setdefault(JobEvent, []).append(self._event)
        for kind in (StartRun, AbortRun):
            self.world.on_notify.setdefault(kind, []).append(self._worker)
        program = Program("ints", seconds * CORE_GAS_PER_S / INDICES, 1, traps)
        spec = JobSpec(kid_of(program.ir), 0, INDICES, "sum")
        self.task = Task("J-0000000000000001", spec, program.ir, 0)

    def say(self, who: str, what: str) -> None:
        self.lines.append(f"{self.world.now_ms - self.begun_ms:7.0f}  {who:<28} {what}")

    def _name(self, kid: str) -> str:
        if kid.startswith("C-"):
            return "client"
        index = self.world.node(kid).index
        return f"{('sensor', 'board', 'server', 'accelerator')[index % 4]}-{index}"

    def _sent(self, node: Node, send: Send) -> None:
        text = _said(send.message)
        if text:
            self.say(f"{self._name(node.kid)} -> {self._name(send.to)}", text)

    def _event(self, node: Node, event: JobEvent) -> None:
        self.say(self._name(node.kid), f"{event.what}: {event.detail}")

    def _worker(self, node: Node, event: Any) -> None:
        if isinstance(event, StartRun):
            text = f"run {event.run} of blocks {event.first} to {event.last}"
        else:
            text = f"abort run {event.run}"
        self.say(f"{self._name(node.kid)} slot {event.worker}", text)

    def play(self) -> list[str]:
        """Until the job has ended and nothing is left of it."""
        failures: list[str] = []
        assert settle(self.world, self.checkers, self.world.nodes, failures) is not None, failures
        at_ms = self.task.ended_ms - self.begun_ms
        return [*self.lines, f"{at_ms:7.0f}  {'client':<28} it is {self.task.ended}"]


def _said(message: Any) -> str:
    match message:
        case AssignShard():
            carried = ", with the program" if message.ir else ""
            return (
                f"assign shard {message.shard} try {message.tries}: blocks {message.first} to "
                f"{message.last}{carried}"
            )
        case Shrink():
            return f"shrink shard {message.shard} to {message.last}?"
        case Shrunk():
            return f"shard {message.shard} stops at {message.last}"
        case DropShard():
            return f"drop shard {message.shard}"
        case Rejected():
            return f"reject shard {message.shard}"
        case NeedProgram():
            return f"need the program of shard {message.shard}"
        case Report() if message.fault is not None or message.lost:
            why = message.fault.message if message.fault is not None else message.lost
            return f"shard {message.shard} ends: {why}"
        case JobStatus() if message.state != "running":
            return f"the job is {message.state}: {message.done} of {message.total} indices"
    return ""


def quiet() -> Stage:
    stage = Stage(3, 2.0)
    stage.exact.clients.submit(stage.task)
    return stage


def a_node_slows_down() -> Stage:
    stage = Stage(4, 4.0)
    stage.exact.clients.submit(stage.task)
    stage.world.at(200.0, stage.exact.workers.factors.__setitem__, 2, 0.1)
    return stage


def a_node_is_killed() -> Stage:
    stage = Stage(3, 4.0)
    stage.exact.clients.submit(stage.task)
    stage.world.run(200.0)
    crash(stage, 2)
    stage.world.restart(stage.world.nodes[2], 6000.0)
    return stage


def a_worker_dies() -> Stage:
    stage = Stage(3, 2.0)
    stage.exact.clients.submit(stage.task)
    stage.world.run(150.0)
    stage.say("server-2 slot 0", "its worker is killed")
    stage.exact.workers.lose(stage.world.nodes[2], 0)
    return stage


def the_owner_is_killed() -> Stage:
    stage = Stage(3, 4.0)
    stage.exact.clients.submit(stage.task)
    stage.world.run(300.0)
    crash(stage, 0)
    stage.world.restart(stage.world.nodes[0], 200.0)
    return stage


def a_job_is_cancelled() -> Stage:
    stage = Stage(3, 4.0)
    stage.exact.clients.submit(stage.task)
    stage.world.run(300.0)
    stage.say("client", "kills the job")
    stage.exact.clients.kill(stage.task)
    return stage


def a_program_traps() -> Stage:
    stage = Stage(3, 2.0, traps=(17,))
    stage.exact.clients.submit(stage.task)
    return stage


def crash(stage: Stage, index: int) -> None:
    node = stage.world.nodes[index]
    stage.say(stage._name(node.kid), "is killed")
    stage.world.crash(node)


SCENARIOS: list[Callable[[], Stage]] = [
    quiet,
    a_node_slows_down,
    a_node_is_killed,
    a_worker_dies,
    the_owner_is_killed,
    a_job_is_cancelled,
    a_program_traps,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.__name__)
def test_the_transcript_is_as_it_was(scenario: Callable[[], Stage]) -> None:
    lines = scenario().play()
    file = FOLDER / f"{scenario.__name__}.txt"
    text = "\n".join(lines) + "\n"
    if os.environ.get("MANIFOLD_REWRITE"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "read the difference; then MANIFOLD_REWRITE=1 if it is right"


def test_every_transcript_has_its_scenario() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.txt")) == sorted(
        scenario.__name__ for scenario in SCENARIOS
    )
    assert isinstance(quiet().world, World)
