"""A worker's side of the protocol, over a socket pair, with programs that really run."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from manifold.kernel.process import worker as module
from manifold.kernel.process.channel import Channel, Closed
from manifold.kernel.process.messages import (
    Abort,
    Blocks,
    Compute,
    Ended,
    Fault,
    GlobalCall,
    GlobalDone,
    Limit,
    Limited,
    ToNode,
    ToWorker,
    WorkerSpec,
)
from manifold.kernel.process.worker import Worker
from manifold.vm.runtime.results import finish
from manifold.vm.syntax import Program, load

SQUARES = ".cells 1\nLOAD 0\nLOAD 0\nMUL\nEMIT\nHALT\n"
SLOW = ".cells 1\nSLEEP 0.02\nLOAD 0\nEMIT\nHALT\n"
FOREVER = ".cells 1\nagain:\nJMP again\n"
COUNT = ".global count i64\nPUSH 1\nADD_GLOBAL count\nEMIT\nHALT\n"
SWAP = """.global rate f64
LOAD_GLOBAL rate
PUSH 0.5
PROPOSE_GLOBAL rate
EMIT
EMIT
PUSH 2.5
STORE_GLOBAL rate
HALT
"""
HALVES = ".cells 1\nPUSH 100\nLOAD 0\nDIV\nEMIT\nHALT\n"
PATIENCE_S = 20.0


class Node:
    """The node's side: sends, and collects what comes until a run has ended."""

    def __init__(self, end: socket.socket) -> None:
        self.channel: Channel[ToNode] = Channel(end, ToNode)
        self.heard: list[ToNode] = []

    def send(self, *messages: Any) -> None:
        self.channel.send(*messages)

    def until(self, condition: Callable[[list[ToNode]], object]) -> list[ToNode]:
        deadline = time.monotonic() + PATIENCE_S
        while not condition(self.heard):
            assert time.monotonic() < deadline, self.heard
            self.heard += self.channel.wait(0.1)
        return self.heard

    def ended(self, run: int) -> Ended:
        self.until(lambda heard: any(isinstance(m, Ended) and m.run == run for m in heard))
        (found,) = [m for m in self.heard if isinstance(m, Ended) and m.run == run]  # W2
        return found

    def results(self, run: int) -> list[Any]:
        """Results of a run's blocks, which must have come in order (W1)."""
        found: list[Any] = []
        first = None
        for message in self.heard:
            if isinstance(message, Blocks) and message.run == run:
                first = message.first if first is None else first
                assert message.first == first + len(found)
                found += message.results
        return found


def spec(share: float = 1.0) -> WorkerSpec:
    return WorkerSpec("test-01", 0, 64 << 20, 5.0, share, "", "")


@pytest.fixture
def node() -> Iterator[Node]:
    yield from serving(spec(), False)


def serving(told: WorkerSpec, paced: bool) -> Iterator[Node]:
    ours, theirs = socket.socketpair()
    channel: Channel[ToWorker] = Channel(theirs, ToWorker)
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            Worker(channel, told, paced).serve()
        except Closed:
            return
        except BaseException as error:
            failed.append(error)
        finally:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Node(ours)
    finally:
        ours.close()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert not failed, failed


def assembled(source: str) -> Program:
    return load(source, "test.ent")


def compute(run: int, source: str, first: int, last: int, **changes: Any) -> Compute:
    program = assembled(source)
    fields: dict[str, Any] = {
        "run": run, "program": program.kid, "ir": program.ir, "reduce": "sum", "arguments": (),
        "isolate": False, "lo": 0, "hi": 1 << 40, "size": 10, "first": first, "last": last,
    }  # fmt: skip
    return Compute(**(fields | changes))


def sums(results: list[Any]) -> list[Any]:
    return [finish("sum", each, 0, 10) for each in results]


def test_blocks_come_in_order_and_then_the_end(node: Node) -> None:
    node.send(compute(1, SQUARES, 2, 5))
    assert node.ended(1).fault is None
    expected = [sum(n * n for n in range(10 * b, 10 * b + 10)) for b in (2, 3, 4)]
    assert sums(node.results(1)) == expected
    assert sum(m.gas for m in node.heard if isinstance(m, Blocks)) > 0


def test_the_last_block_ends_where_the_grid_does(node: Node) -> None:
    node.send(compute(1, SQUARES, 0, 2, hi=13))
    node.ended(1)
    assert sums(node.results(1))[1] == 100 + 121 + 144


def test_single_indices_are_computed_each_with_its_own_fault(node: Node) -> None:
    node.send(compute(1, HALVES, 0, 3, indices=(5, 0, 4), isolate=True, reduce="collect", size=1))
    assert node.ended(1).fault is None
    good, bad, last = node.results(1)
    assert finish("collect", good, 5, 6) == [20]
    assert finish("collect", last, 4, 5) == [25]
    assert isinstance(bad, Fault)
    assert (bad.code, bad.index) == ("trap", 0)


def test_a_trap_ends_the_run_with_where_it_happened(node: Node) -> None:
    node.send(compute(1, HALVES.replace("LOAD 0", "LOAD 0\nPUSH 15\nSUB"), 0, 5))
    fault = node.ended(1).fault
    assert fault is not None
    assert (fault.code, fault.index) == ("trap", 15)
    assert fault.line == 6
    assert len(node.results(1)) == 1  # the block before it counts


def test_a_program_is_sent_once(node: Node) -> None:
    node.send(compute(1, SQUARES, 0, 1))
    node.send(compute(2, SQUARES, 1, 2, ir=b""))
    assert node.ended(2).fault is None
    node.send(compute(3, HALVES, 1, 2, ir=b""))
    fault = node.ended(3).fault
    assert fault is not None
    assert "not sent the program" in fault.message


def test_programs_are_forgotten_in_the_order_in_which_they_were_last_sent(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRAMS_MAX", 3)
    others = [SQUARES.replace("MUL", f"MUL\nPUSH {n}\nADD") for n in range(4)]
    for run, source in enumerate([SQUARES, others[0], others[1], SQUARES, others[2]], 1):
        node.send(compute(run, source, 0, 1))
    node.send(compute(6, SQUARES, 0, 1, ir=b""))  # sent again later than the first of the others
    assert node.ended(6).fault is None
    node.send(compute(7, others[0], 0, 1, ir=b""))
    assert node.ended(7).fault is not None


def test_a_limit_stops_before_a_block_and_says_where(node: Node) -> None:
    node.send(compute(1, SLOW, 0, 1000, size=1))
    node.until(lambda heard: any(isinstance(m, Blocks) and m.results for m in heard))
    node.send(Limit(1, 0))  # past already: after the block under way
    node.ended(1)
    (limited,) = [m for m in node.heard if isinstance(m, Limited)]
    assert 1 <= limited.last < 1000
    assert len(node.results(1)) == limited.last
    assert node.heard.index(limited) < len(node.heard) - 1


def test_a_limit_ahead_is_reached_exactly(node: Node) -> None:
    node.send(compute(1, SLOW, 0, 1000, size=1), Limit(1, 7))
    node.ended(1)
    assert Limited(1, 7) in node.heard
    assert len(node.results(1)) == 7


def test_a_limit_never_lengthens_a_run(node: Node) -> None:
    node.send(compute(1, SLOW, 0, 5, size=1), Limit(1, 50))
    node.ended(1)
    assert Limited(1, 5) in node.heard
    assert len(node.results(1)) == 5


@pytest.mark.parametrize("source", [SLOW, FOREVER, SLOW.replace("0.02", "1000")])
def test_an_abort_ends_whatever_runs_within_a_moment(node: Node, source: str) -> None:
    node.send(compute(1, source, 0, 1000))
    node.until(lambda heard: heard)  # it says within 0.1 s that it is alive
    began = time.monotonic()
    node.send(Abort(1))
    assert node.ended(1).fault is None
    assert time.monotonic() - began < 0.5
    node.send(compute(2, SQUARES, 0, 1))
    node.ended(2)
    assert sums(node.results(2)) == [285]


def test_an_abort_of_a_run_that_waits_is_answered_at_once_and_it_never_starts(node: Node) -> None:
    node.send(compute(1, SLOW.replace("0.02", "1000"), 0, 1), compute(2, SQUARES, 0, 1))
    node.until(lambda heard: heard)
    node.send(Abort(2))
    assert node.ended(2).fault is None
    assert node.results(2) == []
    assert not any(isinstance(m, Ended) and m.run == 1 for m in node.heard)
    node.send(compute(3, SQUARES, 0, 1), Abort(1))
    node.ended(3)
    assert sums(node.results(3)) == [285]


def test_a_limit_of_a_run_that_waits_is_answered_at_once_and_holds(node: Node) -> None:
    node.send(compute(1, SLOW.replace("0.02", "1000"), 0, 1), compute(2, SQUARES, 3, 9))
    node.until(lambda heard: heard)
    node.send(Limit(2, 5))
    node.until(lambda heard: Limited(2, 5) in heard)
    node.send(Limit(2, 1))  # before its first block: nothing is left to do
    node.until(lambda heard: Limited(2, 3) in heard)
    node.send(Abort(1))
    node.ended(2)
    assert node.results(2) == []


def test_all_of_it_in_one_write_comes_to_the_same(node: Node) -> None:
    node.send(
        compute(1, SLOW, 0, 2, size=1), compute(2, SQUARES, 0, 9), compute(3, SQUARES, 0, 9),
        Limit(2, 2), Abort(3), Limit(9, 1), Abort(9), compute(4, SQUARES, 1, 2),
    )  # fmt: skip
    node.ended(4)
    assert [len(node.results(run)) for run in (1, 2, 3, 4)] == [2, 2, 0, 1]
    assert [m.run for m in node.heard if isinstance(m, Ended)] == [3, 1, 2, 4]
    assert [m for m in node.heard if isinstance(m, Limited)] == [Limited(2, 2)]


def test_what_comes_after_a_run_ended_is_not_an_error(node: Node) -> None:
    node.send(compute(1, SQUARES, 0, 1))
    node.ended(1)
    node.send(Abort(1), Limit(1, 0), compute(2, SQUARES, 0, 1))
    node.ended(2)
    assert not any(isinstance(m, Limited) for m in node.heard)


def test_a_busy_worker_says_that_it_is_alive(node: Node) -> None:
    node.send(compute(1, FOREVER, 0, 1))
    node.until(lambda heard: len(heard) >= 3)
    assert all(isinstance(m, Blocks) and not m.results for m in node.heard)
    node.send(Abort(1))
    node.ended(1)


def calls(heard: list[ToNode]) -> list[GlobalCall]:
    return [message for message in heard if isinstance(message, GlobalCall)]


def answer(node: Node, number: int, found: int | float, **fields: Any) -> GlobalCall:
    """Waits for the `number`th call, and answers it."""
    node.until(lambda heard: len(calls(heard)) >= number)
    call = calls(node.heard)[number - 1]
    node.send(GlobalDone(call.run, call.number, **({"ok": True, "found": found} | fields)))
    return call


def test_a_global_is_the_nodes_and_the_worker_waits_for_it(node: Node) -> None:
    node.send(compute(1, COUNT, 0, 2, size=2, reduce="collect"))
    seen = [answer(node, number, 100 + number) for number in (1, 2, 3, 4)]
    assert node.ended(1).fault is None
    assert [(c.index, c.block, c.k, c.op, c.name, c.float, c.value) for c in seen] == [
        (index, index // 2, 0, "add", "count", False, 1) for index in (0, 1, 2, 3)
    ]
    assert len({call.number for call in seen}) == 4
    found = [finish("collect", each, 0, 2) for each in node.results(1)]
    assert found == [[101, 102], [103, 104]]


def test_each_operation_says_all_that_its_node_must_know(node: Node) -> None:
    node.send(compute(1, SWAP, 0, 1, indices=(7,), isolate=True, size=1, reduce="collect"))
    load, propose = answer(node, 1, 1.5), answer(node, 2, 0.25, ok=False)
    store = answer(node, 3, 0)
    assert node.ended(1).fault is None
    assert load == GlobalCall(1, load.number, 7, 0, "load", "rate", True)
    assert propose == GlobalCall(1, propose.number, 7, 0, "propose", "rate", True, 1.5, 0.5)
    assert store == GlobalCall(1, store.number, 7, 0, "store", "rate", True, 0, 2.5)
    assert [finish("collect", each, 7, 8) for each in node.results(1)] == [[[0, 0.25]]]


@pytest.mark.parametrize("isolate", [False, True])
def test_what_a_node_cannot_do_is_a_fault_with_its_place(node: Node, isolate: bool) -> None:
    node.send(compute(1, COUNT, 3, 5, size=1, isolate=isolate))
    refused = Fault("unavailable", "No quorum: test-02 is away.", "Wait.")
    answer(node, 1, 0)
    answer(node, 2, 0, fault=refused)
    ended = node.ended(1)
    fault = node.results(1)[1] if isolate else ended.fault
    assert isinstance(fault, Fault)
    assert (fault.code, fault.next_step, fault.line, fault.index) == ("unavailable", "Wait.", 3, 4)
    assert fault.message == (
        f"{assembled(COUNT).kid}, line 3, ADD_GLOBAL count: No quorum: test-02 is away at index 4."
    )
    assert fault.instruction == "ADD_GLOBAL count" and fault.cells == (4,)
    assert (ended.fault is None) == isolate


def test_a_register_of_another_type_is_a_trap(node: Node) -> None:
    node.send(compute(1, COUNT, 0, 1))
    answer(node, 1, 1.0)
    fault = node.ended(1).fault
    assert fault is not None and (fault.code, fault.line) == ("trap", 3)
    assert "holds an f64" in fault.message


def test_a_sum_that_does_not_fit_is_a_trap(node: Node) -> None:
    node.send(compute(1, COUNT, 0, 1))
    answer(node, 1, (1 << 63) - 1, ok=False)
    fault = node.ended(1).fault
    assert fault is not None and (fault.code, fault.line) == ("trap", 3)
    assert "is 9223372036854775807: adding 1 does not fit in 64 bits" in fault.message


def test_a_worker_that_waits_for_a_global_says_that_it_is_alive_and_not_busy(node: Node) -> None:
    node.send(compute(1, COUNT, 0, 2, size=1))
    answer(node, 1, 0)
    node.until(lambda heard: len(calls(heard)) == 2)
    before = len(node.heard)
    began_s = time.monotonic()
    node.until(lambda heard: len(heard) >= before + 4)
    assert time.monotonic() - began_s > 2 * module.ALIVE_S
    alive = [message for message in node.heard[before:] if isinstance(message, Blocks)]
    assert sum(message.busy_ms for message in alive) < 0.3 * 1000 * (time.monotonic() - began_s)
    assert sums(node.results(1)) == [0]  # what was done before the wait has been told
    assert calls(node.heard)[1].block == 1
    answer(node, 2, 0)
    assert node.ended(1).fault is None


def test_an_abort_ends_the_wait_for_a_global_and_its_answer_comes_too_late(node: Node) -> None:
    node.send(compute(1, COUNT, 0, 5))
    node.until(lambda heard: len(calls(heard)) == 1)
    began_s = time.monotonic()
    node.send(Abort(1))
    assert node.ended(1).fault is None
    assert time.monotonic() - began_s < 0.5
    late = calls(node.heard)[0]
    node.send(GlobalDone(1, late.number, True, 77), compute(2, COUNT, 0, 1, size=1))
    node.until(lambda heard: len(calls(heard)) == 2)
    current = calls(node.heard)[1]
    for run, number in ((1, current.number), (2, late.number), (3, current.number)):
        node.send(GlobalDone(run, number, True, 66))
    answer(node, 2, 5)
    node.ended(2)
    assert sums(node.results(2)) == [5]


def test_a_limit_is_heard_by_one_that_waits_for_a_global(node: Node) -> None:
    node.send(compute(1, COUNT, 0, 9, size=1), compute(2, SQUARES, 3, 9))
    node.until(lambda heard: len(calls(heard)) == 1)
    node.send(Limit(1, 0), Limit(2, 4), GlobalDone(2, 1, True, 5))
    node.until(lambda heard: {Limited(1, 1), Limited(2, 4)} <= set(heard))
    answer(node, 1, 8)
    node.ended(2)
    assert sums(node.results(1)) == [8]
    assert len(node.results(2)) == 1


def test_a_worker_that_waits_for_a_global_ends_when_its_node_does() -> None:
    for node in serving(spec(), False):
        node.send(compute(1, COUNT, 0, 5))
        node.until(lambda heard: calls(heard))


def test_a_paced_worker_takes_its_share_of_a_core() -> None:
    for node in serving(spec(0.25), True):
        began, cpu_s = time.monotonic(), time.process_time()
        node.send(compute(1, SQUARES, 0, 30_000))
        node.ended(1)
        used = (time.process_time() - cpu_s) / (time.monotonic() - began)
        assert used < 0.6  # 0.25, and this thread's own work beside it
        assert len(node.results(1)) == 30_000


def test_a_worker_ends_when_its_node_does() -> None:
    for node in serving(spec(), False):
        node.send(compute(1, FOREVER, 0, 1))
        node.until(lambda heard: heard)
        # `serving` closes our end now, and asserts that the worker's thread has ended
