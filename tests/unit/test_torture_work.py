"""The torturer of whole clusters: its plan, the work it gives, a judge that must never be wrong.

The right runs are made here by hand; each planted fault is one change of a right run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest

from manifold.shells.sdk.programs import program_of
from manifold.tools.torture.cluster_plan import plan
from manifold.tools.torture.plan import Dealer
from manifold.tools.torture.report import ClusterReport
from manifold.tools.torture.verbs import summary
from manifold.tools.torture.work import KINDS, Mode, Ran, Work, bad_index, deal, expected, piece
from manifold.tools.torture.work import program as program_text
from manifold.tools.torture.work_verdict import effects, judge_work, latest
from manifold.vm.errors import Trap
from manifold.vm.runtime import Machine, finish

SHARED = "work/shared/0"
COMPUTING = ("collatz", "primes", "squares", "floats", "slow")

# -- the plan ---------------------------------------------------------------------------------


def test_the_plan_is_a_function_of_the_seed_in_every_process() -> None:
    here = [str(step) for step in plan(7, 60, 7, 5)]
    program = (
        "from manifold.tools.torture.cluster_plan import plan\nfor s in plan(7, 60, 7, 5): print(s)"
    )
    there = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "5"},
    ).stdout.splitlines()  # fmt: skip
    assert here == there
    assert here != [str(step) for step in plan(8, 60, 7, 5)]


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_has_every_fault_of_a_cluster_and_ends_healed(seed: int) -> None:
    steps = plan(seed, 120, 7, 5)
    assert {step.what for step in steps} == {
        "kill", "pause", "resume", "cut", "mend", "replace", "heal", "workers", "owner", "zygote",
        "slow", "clock",
    }  # fmt: skip
    assert steps[-1].what == "heal"
    assert [step.at_ms for step in steps] == sorted(step.at_ms for step in steps)
    assert any(step.what == "kill" and len(step.nodes) == 7 for step in steps)
    for step in steps:
        links = [*step.cuts, *((each.one, each.other) for each in step.slow)]
        assert {*step.nodes, *(node for link in links for node in link)} <= set(range(7))
        assert all(one != other for one, other in links)
        assert all(0.0 <= each.loss < 1.0 and each.latency_ms > 0 for each in step.slow)
        assert all(0.0 <= pick < 1.0 for pick in step.picks)
        assert 0.9 < step.rate < 1.1, "more than clocks are allowed to differ by"


def test_every_fault_comes_before_any_comes_twice() -> None:
    class Names(Dealer):
        def _new_deck(self) -> list[Callable[[float, float], object]]:  # type: ignore[override]
            return [lambda at, hold, name=name: name for name in "abcdef"]  # type: ignore[misc]

    dealer = Names(Random(5), 3, 3)
    dealt = [str(dealer._round()(0.0, 0.0)) for _ in range(12)]
    assert sorted(dealt[:6]) == sorted(dealt[6:]) == list("abcdef")


def test_what_is_picked_is_always_among_those_that_there_are() -> None:
    for seed in range(300):
        for step in plan(seed, 120, 4, 3):
            assert all(0.0 <= pick < 1.0 for pick in step.picks)


@pytest.mark.parametrize(("nodes", "voters"), [(2, 1), (3, 3), (16, 5)])
def test_clusters_of_other_sizes_have_plans_as_well(nodes: int, voters: int) -> None:
    for seed in range(20):
        steps = plan(seed, 30, nodes, voters)
        assert steps[-1].what == "heal"
        assert all(1 <= len(s.nodes) <= voters for s in steps if s.what == "replace")


# -- the work ---------------------------------------------------------------------------------


def computed(work: Work) -> Any:
    """What its program gives, on this process' machine."""
    unit = Machine(1 << 24).load(program_of(program_text(work)), work.reduce)
    outcome = unit.run(
        work.lo, work.hi, gas=1 << 60, on_yield=lambda used: 0, on_sleep=lambda seconds: None
    )
    return finish(work.reduce, outcome.partial, work.lo, work.hi)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", COMPUTING)
def test_what_is_expected_is_what_the_program_gives(kind: str, seed: int) -> None:
    work = piece(kind, Random(seed), "w0.1")  # type: ignore[arg-type]
    work = msgspec.structs.replace(work, wait_ms=0, hi=min(work.hi, work.lo + 3000))
    got = computed(work)
    assert got == (pytest.approx(expected(work), rel=1e-12) if kind == "floats" else expected(work))


def test_a_program_that_is_to_trap_does_so_where_it_should() -> None:
    work = piece("trap", Random(1), "w0.1")
    with pytest.raises(Trap) as trapped:
        computed(work)
    assert trapped.value.index == bad_index(work)


def test_a_counting_program_writes_its_own_counter_and_a_shared_one() -> None:
    work = piece("tick", Random(3), "w4.12")
    assert work.own == "work/own/w4.12"
    written = program_of(program_text(work)).written
    assert set(written) == {work.own, work.shared}


def test_work_is_a_function_of_the_seed_and_of_every_kind() -> None:
    dealt = [deal(Random(f"{seed}"), "w0.1") for seed in range(300)]
    assert dealt == [deal(Random(f"{seed}"), "w0.1") for seed in range(300)]
    assert {work.kind for work, _ in dealt} == set(KINDS)
    assert {mode for _, mode in dealt} == {"plain", "detached", "twice", "cancelled", "left"}


# -- the judge --------------------------------------------------------------------------------


def ran(
    number: int, work: Work, status: str = "ok", result: object = None, mode: Mode = "plain"
) -> Ran:
    """What client number `number` says of one piece."""
    return Ran(f"w{number}", "n-01", f"J-{number}", work, mode, status, number, number + 1, result)


def right_run() -> tuple[list[Ran], dict[str, int]]:
    """One of each kind that was done, and a few that were not."""
    all_ran: list[Ran] = []
    counters: dict[str, int] = {SHARED: 0, "work/added": 0}
    for number, kind in enumerate((*KINDS, *COMPUTING, "tick", "tick", "adds", "floats")):
        work = piece(kind, Random(number), f"w{number}")  # type: ignore[arg-type]
        result = expected(work)
        status = "ok"
        match kind:
            case "floats":
                work = Work("floats", 0, 40, "sum")
                result = expected(work)
            case "trap":
                status, result = "trap", bad_index(work)
            case "tick":
                work = msgspec.structs.replace(work, shared=SHARED)
                result = list(range(counters[SHARED], counters[SHARED] + work.count))
                counters[SHARED] += work.count
                counters[work.own] = work.count
            case "adds":
                result = list(range(counters[work.shared], counters[work.shared] + work.count))
                counters[work.shared] += work.count
        all_ran.append(ran(number, work, status, result))
    half = Work("tick", 0, 20, own="work/own/half", shared=SHARED)
    counters[half.own] = 7
    counters[SHARED] += 7
    all_ran.append(ran(90, half, "maybe"))
    left = Work("tick", 0, 20, own="work/own/left", shared=SHARED)
    counters[left.own] = 0
    all_ran.append(ran(91, left, "left", mode="left"))
    all_ran.append(ran(92, Work("slow", 0, 9, "sum"), "cancelled", mode="cancelled"))
    return all_ran, counters


def judged(all_ran: list[Ran], counters: dict[str, int], **flags: bool) -> list[str]:
    options = {"workers_killed": False, "crashed": False} | flags
    return judge_work(all_ran, counters, clients=0, **options)


def test_what_is_right_is_never_blamed() -> None:
    assert judged(*right_run()) == []


def first(all_ran: list[Ran], kind: str) -> int:
    return next(n for n, each in enumerate(all_ran) if each.work.kind == kind)


def altered(result: object) -> object:
    """The same, but for one number."""
    if isinstance(result, list):
        return [*result[:-1], result[-1] + 1]
    assert isinstance(result, (int, float))
    return result * 1.5 if isinstance(result, float) else result + 1


@pytest.mark.parametrize("kind", [*COMPUTING, "calls"])
def test_one_result_that_was_altered_is_found_out(kind: str) -> None:
    all_ran, counters = right_run()
    at = first(all_ran, kind)
    all_ran[at] = msgspec.structs.replace(all_ran[at], result=altered(all_ran[at].result))
    assert any(kind in failure for failure in judged(all_ran, counters))


def test_a_float_whose_last_bit_differs_is_found_out() -> None:
    all_ran, counters = right_run()
    at = first(all_ran, "floats")
    value = all_ran[at].result
    all_ran[at] = msgspec.structs.replace(all_ran[at], result=value * (1 + 2.3e-16))
    assert all_ran[at].result != value
    (failure,) = judged(all_ran, counters)
    assert "not always the same" in failure


@pytest.mark.parametrize("by", [1, -1])
def test_an_effect_that_took_place_twice_or_not_at_all_is_found_out(by: int) -> None:
    all_ran, counters = right_run()
    own = all_ran[first(all_ran, "tick")].work.own
    counters[own] += by
    (failure,) = judged(all_ran, counters)
    assert own in failure
    counters[own] -= by
    counters[SHARED] += 21 + 20 if by > 0 else -8  # beyond what may have been, below what was
    assert any(SHARED in failure for failure in judged(all_ran, counters))


def test_more_effects_than_indices_of_unknown_fate_are_found_out() -> None:
    all_ran, counters = right_run()
    counters["work/own/half"] = 21
    assert any("work/own/half" in failure for failure in judged(all_ran, counters))


@pytest.mark.parametrize("kind", ["tick", "adds"])
def test_two_that_were_given_one_value_of_a_counter_are_found_out(kind: str) -> None:
    all_ran, counters = right_run()
    at = first(all_ran, kind)
    told = all_ran[at].result
    assert len(told) > 1
    all_ran[at] = msgspec.structs.replace(all_ran[at], result=[told[0], *told[:-1]])
    assert any("more than one" in failure for failure in judged(all_ran, counters))


@pytest.mark.parametrize("status", ["trap", "job_failed", "refused", "stuck", "begun", "cancelled"])
def test_an_end_that_is_not_documented_is_found_out(status: str) -> None:
    all_ran, counters = right_run()
    all_ran.append(ran(95, Work("slow", 0, 9, "sum"), status))
    assert len(judged(all_ran, counters)) == 1


def test_ends_that_are_documented_are_excused() -> None:
    all_ran, counters = right_run()
    for number, status in enumerate(("maybe", "unavailable", "busy", "no_cluster", "exhausted")):
        all_ran.append(ran(100 + number, Work("slow", 0, 9, "sum"), status))
    assert judged(all_ran, counters) == []


def test_a_program_that_should_have_trapped_is_found_out() -> None:
    all_ran, counters = right_run()
    at = first(all_ran, "trap")
    all_ran[at] = msgspec.structs.replace(all_ran[at], status="ok", result=190)
    assert len(judged(all_ran, counters)) == 1
    all_ran[at] = msgspec.structs.replace(all_ran[at], status="trap", result=3)
    assert len(judged(all_ran, counters)) == 1


def test_a_call_may_lose_its_process_only_where_processes_were_killed() -> None:
    all_ran, counters = right_run()
    at = first(all_ran, "calls")
    lost = [None, *all_ran[at].result[1:]]
    all_ran[at] = msgspec.structs.replace(all_ran[at], result=lost)
    assert len(judged(all_ran, counters)) == 1
    assert judged(all_ran, counters, workers_killed=True) == []


def test_whoever_got_nothing_done_after_healing_is_found_out() -> None:
    all_ran, counters = right_run()
    assert judge_work(all_ran, counters, clients=1, workers_killed=False, crashed=False) == [
        f"{len(KINDS)} pieces of work failed after healing."
    ]
    closing = [
        msgspec.structs.replace(all_ran[first(all_ran, kind)], mode="closing") for kind in KINDS
    ]
    counters[SHARED] = sum(each.work.count for each in closing if each.work.kind == "tick")
    counters["work/added"] = 10
    done = judge_work(closing, counters, clients=1, workers_killed=False, crashed=False)
    assert done == []


def test_the_last_word_on_a_piece_counts() -> None:
    begun = ran(1, Work("slow", 0, 9, "sum"), "begun")
    done = msgspec.structs.replace(begun, status="ok", result=36)
    other = ran(2, Work("slow", 0, 9, "sum"), "begun")
    assert latest([begun, other, done]) == [done, other]
    assert effects([ran(1, Work("tick", 0, 20, own="a", shared="b")), begun]) == 40


def test_a_summary_tells_how_to_repeat_the_plan() -> None:
    report = ClusterReport(9, 90.0, 5, 3)
    report.jobs["maybe"] = 2
    report.failures.append("A result is wrong.")
    lines = summary(report)
    assert (
        "the same plan: manifold torture cluster --seed 9 --minutes 1.5 --nodes 5 --voters 3"
        in (lines)
    )
    assert any("2 maybe" in line for line in lines)
    assert "FAILED: A result is wrong." in lines
