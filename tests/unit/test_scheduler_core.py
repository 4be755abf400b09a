"""Membership, geode and scheduler put together: what the driver is asked for, in which order."""

from __future__ import annotations

from random import Random

from manifold.kernel.config import Config
from manifold.kernel.core import Core
from manifold.kernel.effects import Effect, Held, Notify, Persist, Send, SetTimer
from manifold.kernel.membership.messages import Me, Member, MemberChanged, State
from manifold.kernel.scheduler.messages import (
    AbortRun,
    AssignShard,
    DropShard,
    JobSpec,
    JobStatus,
    StartRun,
    SubmitJob,
)
from manifold.vm.kid import Kid, kid_of
from manifold.vm.runtime.results import Partial

IR = b"a program"
SPEC = JobSpec(kid_of(IR), 0, 1, "count")


def machine(name: str, boot: int = 1) -> Me:
    return Me(kid_of(name.encode()), boot, name, "c", (f"ipc://{name}",), 1, 1.0, 1 << 30, 1e9, 0.3)


def core_of(name: str = "me") -> Core:
    core = Core(machine(name), Config(), Random(1), incarnation=0, seeds=("ipc://seed",))
    core.start(0.0)
    return core


def changed(name: str, boot: int, state: State) -> MemberChanged:
    meta = machine(name, boot).meta
    member = Member(kid_of(name.encode()), boot, 1, state, meta, 0.0, None)
    return MemberChanged(member, None)


def events(effects: list[Effect], kind: type) -> list[object]:
    return [e.event for e in effects if isinstance(e, Notify) and isinstance(e.event, kind)]


def test_what_membership_says_first_waits_for_what_must_be_durable_and_the_timer_does_not() -> None:
    core = Core(machine("me"), Config(), Random(1), incarnation=0, seeds=("ipc://seed",))
    effects = core.start(0.0)
    every = [effect for effect in effects if isinstance(effect, Held)]
    (held,) = [each for each in every if each.persist.name == "incarnation"]
    assert any(isinstance(effect, Send) for effect in held.then)
    assert not [effect for effect in effects if isinstance(effect, Send)]
    assert [type(effect) for effect in effects].count(SetTimer) == 1


def test_what_follows_from_news_does_not_wait_for_what_membership_makes_durable() -> None:
    """H2: the abort of a dead owner's run must not come after the run that takes its slot."""
    core = core_of()
    owner = kid_of(b"owner")
    given = AssignShard("J-0000000000000001", 0, (1 << 40) + 1, SPEC, 0, 1, IR)
    assert events(core.receive(owner, given, 10.0), StartRun)
    told = core._deliver(
        [
            (
                "membership",
                [
                    Persist("incarnation", b"x"),
                    Notify(changed("owner", 1, State.DEAD)),
                    Send(owner, given),
                ],
            )
        ],
        20.0,
    )
    assert events(told, AbortRun)
    (held,) = [effect for effect in told if isinstance(effect, Held)]
    assert Send(owner, given) in held.then and not events(list(held.then), AbortRun)


def test_the_death_of_an_owners_former_process_leaves_what_the_present_one_assigned() -> None:
    core = core_of()
    owner = kid_of(b"owner")
    core._deliver([("membership", [Notify(changed("owner", 1, State.ALIVE))])], 1.0)
    given = AssignShard("J-0000000000000001", 0, (2 << 40) + 1, SPEC, 0, 1, IR)
    assert events(core.receive(owner, given, 10.0), StartRun)
    told = core._deliver([("membership", [Notify(changed("owner", 2, State.ALIVE))])], 20.0)
    assert not events(told, AbortRun)
    assert core.scheduler.runner.held == 1


def test_what_a_node_says_to_itself_does_not_leave_it() -> None:
    core = core_of()
    submit = SubmitJob("J-0000000000000001", SPEC, IR)
    answer, effects = core.request("C-1", submit, 10.0)
    assert isinstance(answer, JobStatus) and answer.state == "running"
    assert not [e for e in effects if isinstance(e, Send)]
    (start,) = events(effects, StartRun)
    assert isinstance(start, StartRun)
    effects = core.run_blocks(0, start.run, 0, (Partial(1),), 10.0, 1.0, 11.0)
    (send,) = [e for e in effects if isinstance(e, Send)]
    assert send.to == "C-1" and isinstance(send.message, JobStatus)
    assert not events(core.run_ended(0, start.run, None, 12.0), AbortRun)
    assert core.scheduler.runner.held == 0 and not core.scheduler.owner.jobs


def test_a_slot_is_not_given_to_another_run_before_the_present_one_has_ended() -> None:
    core = core_of()
    first = core.request("C-1", SubmitJob("J-0000000000000001", SPEC, IR), 10.0)[1]
    second = core.request("C-1", SubmitJob("J-0000000000000002", SPEC, IR), 10.0)[1]
    (start,) = events(first, StartRun)
    assert isinstance(start, StartRun) and not events(second, StartRun)
    effects = core.run_blocks(0, start.run, 0, (Partial(1),), 10.0, 1.0, 11.0)
    assert not events(effects, StartRun)
    assert events(core.run_ended(0, start.run, None, 12.0), StartRun)


def test_a_drop_from_an_owner_that_is_not_known_ends_nothing() -> None:
    core = core_of()
    owner = kid_of(b"owner")
    core.receive(owner, AssignShard("J-0000000000000001", 0, 1, SPEC, 0, 1, IR), 10.0)
    core.receive(Kid(kid_of(b"other")), DropShard("J-0000000000000001", 0, 1), 11.0)
    assert core.scheduler.runner.held == 1
