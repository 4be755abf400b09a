"""The registry of one node, against a Nexus that is one dictionary, and answers when it is told."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from random import Random
from typing import Any

from manifold.kernel.effects import Effect, Notify, SetTimer
from manifold.kernel.membership.messages import Me, Member, MemberChanged, State
from manifold.kernel.nexus.ask import Ask
from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.messages import Acquire, Answer, Changed, Operate, Resign, Watch
from manifold.kernel.nexus.values import CasVersion
from manifold.kernel.registry.messages import (
    ALIASES_KEY,
    REGISTRAR_KEY,
    RINGS_KEY,
    AliasTaken,
    Forgot,
    Kind,
    RingChanged,
    Timing,
    Unreadable,
)
from manifold.kernel.registry.placing import order
from manifold.kernel.registry.protocol import CONTENDERS_MAX, Registry
from manifold.kernel.registry.records import (
    Alias,
    Aliases,
    Rings,
    decode_aliases,
    decode_rings,
    encode_aliases,
    encode_rings,
)
from manifold.vm.kid import Kid, kid_of

TIMING = Timing()
A, B, C = (kid_of(name) for name in (b"a", b"b", b"c"))


def me(kid: Kid = A, alias: str = "a", boot: int = 1) -> Me:
    return Me(kid, boot, alias, "board", ("sim://x",), memory_bytes=1 << 30)


def member(kid: Kid, state: State = State.ALIVE, alias: str = "", boot: int = 1) -> MemberChanged:
    meta = me(kid, alias or f"n{kid[2:6]}", boot).meta
    return MemberChanged(Member(kid, boot, 0, state, meta, 0.0, None), None)


class Bench:
    """One registry, a clock, and a Nexus whose registers are here."""

    def __init__(self, registry: Registry | None = None) -> None:
        self.registry = registry or Registry(me(), Random(1), TIMING)
        self.now_ms = 1000.0
        self.registers: dict[str, tuple[int, Any]] = {}
        self.grants = 0
        self.fate = "ok"  # of writes
        self.lease = True  # whether leases are granted
        self.asked: list[Any] = []
        self.events: list[Any] = []
        self.waiting: deque[Ask] = deque()
        self.holds_back = False
        self.watches: dict[str, int] = {}
        self.timer_ms = float("inf")
        self.take(self.registry.start(self.now_ms))

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SetTimer):
                self.timer_ms = effect.at_ms
            elif isinstance(effect, Notify) and isinstance(effect.event, Ask):
                self.asked.append(effect.event.request)
                self.waiting.append(effect.event)
            elif isinstance(effect, Notify):
                self.events.append(effect.event)
        while self.waiting and not self.holds_back:
            self.answer(self.waiting.popleft())

    def answer(self, ask: Ask) -> None:
        request = ask.request
        message: Answer | Changed
        if isinstance(request, Watch):
            self.watches[request.key] = ask.token
            version, data = self.registers.get(request.key, (0, None))
            message = Changed(request.key, version, data)
        elif isinstance(request, Acquire):
            self.grants += self.lease
            fence = Ballot(self.grants, request.holder, 1, 1) if self.lease else None
            message = Answer("ok" if self.lease else "no", fence=fence)
        elif isinstance(request, Operate):
            message = self.operate(request)
        else:
            assert isinstance(request, Resign)
            message = Answer("ok")
        self.take(self.registry.answered(ask.token, message, self.now_ms))
        if isinstance(request, Operate) and request.key in self.registers:
            self.tell(request.key)  # as its watch does, where a hint arrives

    def operate(self, request: Operate) -> Answer:
        change = request.change
        assert isinstance(change, CasVersion)
        if self.fate != "ok":
            return Answer(self.fate, strength="none")  # type: ignore[arg-type]
        version, data = self.registers.get(request.key, (0, None))
        if change.version != version:
            return Answer("no", version, data)
        self.put(request.key, change.data)
        return Answer("ok", self.registers[request.key][0])

    def put(self, key: str, data: Any) -> None:
        self.registers[key] = (self.registers.get(key, (0, None))[0] + 1, data)

    def tell(self, key: str) -> None:
        """The watch has seen it."""
        message = Changed(key, *self.registers[key])
        self.take(self.registry.answered(self.watches[key], message, self.now_ms))

    def run(self, for_ms: float) -> Bench:
        end_ms = self.now_ms + for_ms
        while self.timer_ms <= end_ms:
            self.now_ms, self.timer_ms = max(self.now_ms, self.timer_ms), float("inf")
            self.take(self.registry.tick(self.now_ms))
        self.now_ms = end_ms
        return self

    def hear(self, *changes: MemberChanged) -> Bench:
        for change in changes:
            self.take(self.registry.member_changed(change, self.now_ms))
        return self

    def known(self) -> Bench:
        self.take(self.registry.nexus_known(self.now_ms))
        return self

    def rings(self) -> Rings:
        return decode_rings(self.registers[RINGS_KEY][1])

    def aliases(self) -> Aliases:
        return decode_aliases(self.registers[ALIASES_KEY][1])

    def of(self, kind: type) -> list[Any]:
        return [each for each in (*self.asked, *self.events) if isinstance(each, kind)]


def first_in_line(*others: Kid) -> Bench:
    """A registrar: whoever is registrar of these is asked to be us."""
    bench = Bench().hear(*(member(kid) for kid in others)).known()
    return bench.run(TIMING.settle_ms + len(others) * TIMING.patience_ms)


def test_it_answers_and_asks_nothing_while_no_voters_are_known() -> None:
    bench = Bench().hear(member(B)).run(600_000.0)
    registry = bench.registry
    assert bench.asked == [] and registry.epoch == 0 and registry.ring() == ()
    assert registry.place("key", 2) == () and registry.alias_of(A) is None
    assert registry.kid_of("a") is None


def test_nodes_that_join_together_are_one_epoch_one_lease_and_two_writes() -> None:
    first, *others = order(REGISTRAR_KEY, [(kid_of(b"%d" % n), 0) for n in range(16)])
    bench = Bench(Registry(me(first), Random(1), TIMING)).known()
    for kid in others:
        bench.hear(member(kid)).run(40.0)
    bench.run(2 * TIMING.settle_ms)
    assert bench.rings().epoch == 1 and len(bench.rings().members) == 16
    assert len(bench.of(Acquire)) == 1 and len(bench.of(Operate)) == 2
    assert bench.registry.ring() == tuple(sorted([first, *others]))
    assert bench.registry.kid_of("a") == first and bench.registry.alias_of(first) == "a"
    assert bench.of(RingChanged)[0].epoch == 1


def test_at_rest_it_sets_no_timer_and_asks_nothing() -> None:
    bench = first_in_line()
    before = len(bench.asked)
    bench.run(3_600_000.0)
    assert len(bench.asked) == before and bench.timer_ms == float("inf")


def test_a_node_that_joins_and_dies_before_it_settles_changes_nothing() -> None:
    bench = first_in_line()
    bench.hear(member(B)).run(0.9 * TIMING.settle_ms).hear(member(B, State.DEAD))
    bench.run(10 * TIMING.settle_ms)
    assert bench.rings().epoch == 1 and B not in bench.rings().members


def test_a_restart_moves_no_data_and_a_dead_node_is_retired_after_its_time() -> None:
    bench = first_in_line(B)
    assert B in bench.rings().members
    bench.hear(member(B, State.DEAD)).run(0.9 * TIMING.retire_ms)
    bench.hear(member(B, boot=2)).run(10 * TIMING.settle_ms)
    assert bench.rings().epoch == 1
    bench.hear(member(B, State.DEAD, boot=2)).run(0.95 * TIMING.retire_ms)
    assert bench.rings().epoch == 1
    bench.run(0.1 * TIMING.retire_ms)
    assert bench.rings().epoch == 2 and B not in bench.rings().members


def test_the_dead_keep_their_alias_and_who_leaves_gives_it_back() -> None:
    bench = first_in_line(B, C)
    names = {kid: bench.registry.alias_of(kid) for kid in (B, C)}
    bench.hear(member(B, State.DEAD), member(C, State.LEFT)).run(2 * TIMING.retire_ms)
    bench.tell(ALIASES_KEY)
    assert bench.registry.ring() == (A,)
    assert bench.registry.alias_of(B) == names[B] and bench.registry.alias_of(C) is None


def test_a_second_node_with_an_alias_is_told_and_shown_under_its_kid() -> None:
    bench = Bench()
    bench.put(RINGS_KEY, encode_rings(Rings(4)))
    bench.put(ALIASES_KEY, encode_aliases(Aliases(owners={"a": Alias(B, 3)})))
    bench.known().hear(member(B, alias="a")).run(10 * TIMING.patience_ms)
    assert bench.of(AliasTaken) == [AliasTaken("a", B)]
    assert bench.registry.alias_of(A) is None and bench.registry.kid_of("a") == B
    assert bench.aliases().owners == {"a": Alias(B, 3)}
    assert A in bench.registry.ring(), "it serves all the same"


def test_two_nodes_that_swap_their_aliases_come_to_have_them() -> None:
    bench = Bench(Registry(me(A, "b", 2), Random(1), TIMING))
    bench.put(ALIASES_KEY, encode_aliases(Aliases(owners={"a": Alias(A, 1), "b": Alias(B, 1)})))
    bench.known().hear(member(B, alias="a", boot=2)).run(10 * TIMING.patience_ms)
    bench.tell(ALIASES_KEY)
    bench.run(10 * TIMING.patience_ms)
    assert {name: each.kid for name, each in bench.aliases().owners.items()} == {"a": B, "b": A}


def test_whoever_is_dead_can_be_forgotten_without_the_lease_and_who_is_alive_can_not() -> None:
    bench = Bench()
    bench.lease = False
    fence = (7, B, 1, 1)
    board = Kind("board", False, 4)
    kind = {A: board, B: board}
    bench.put(RINGS_KEY, encode_rings(Rings(3, fence, kind)))
    bench.put(ALIASES_KEY, encode_aliases(Aliases(fence, {"a": Alias(A, 1), "b": Alias(B, 1)})))
    bench.known().take(bench.registry.forget(B, bench.now_ms))
    assert bench.rings() == Rings(4, fence, {A: board})
    assert list(bench.aliases().owners) == ["a"] and bench.of(Forgot) == [Forgot(B, True)]
    bench.hear(member(C)).take(bench.registry.forget(C, bench.now_ms))
    assert not bench.of(Forgot)[1].done and "alive" in bench.of(Forgot)[1].why


def test_forgetting_is_given_up_when_the_voters_do_not_answer() -> None:
    bench = first_in_line(B)
    bench.hear(member(B, State.DEAD))
    bench.fate = "unavailable"
    bench.take(bench.registry.forget(B, bench.now_ms))
    bench.run(2 * TIMING.forget_ms)
    assert [each.done for each in bench.of(Forgot)] == [False]


def test_a_registrar_that_finds_a_later_fence_stops_and_gives_its_lease_back() -> None:
    bench = first_in_line(B)
    bench.put(RINGS_KEY, encode_rings(replace(bench.rings(), epoch=2, fence=(99, B, 1, 1))))
    written = len(bench.of(Operate))
    bench.lease = False
    bench.hear(member(C)).run(TIMING.settle_ms * 4)
    # Its write expected an older version; from the answer it learns of the later fence.
    assert not bench.registry.registrar and bench.of(Resign)
    assert bench.rings().epoch == 2 and bench.rings().fence == (99, B, 1, 1)
    rings = [each for each in bench.of(Operate)[written:] if each.key == RINGS_KEY]
    assert len(rings) == 1


def test_a_lease_that_is_lost_is_not_written_with() -> None:
    bench = first_in_line()
    bench.lease = False
    bench.take(bench.registry.lease_lost(Ballot(bench.grants, A, 1, 1), bench.now_ms))
    written = len(bench.of(Operate))
    bench.hear(member(B)).run(TIMING.settle_ms * 4)
    assert len(bench.of(Operate)) == written and not bench.registry.registrar


def test_what_became_of_a_write_is_unknown_and_it_is_neither_lost_nor_done_twice() -> None:
    bench = first_in_line()
    bench.holds_back = True
    bench.hear(member(B)).run(1.2 * TIMING.settle_ms)
    asks, bench.waiting = list(bench.waiting), deque()
    bench.holds_back = False
    for ask in asks:
        bench.operate(ask.request)  # type: ignore[arg-type]
        unknown = Answer("maybe", strength="none")
        bench.take(bench.registry.answered(ask.token, unknown, bench.now_ms))
    bench.run(10 * TIMING.retry_most_ms)
    assert bench.rings().epoch == 2 and bench.registry.epoch == 2
    assert B in bench.registry.ring()


def test_the_version_of_an_answer_is_not_taken_for_that_of_the_write() -> None:
    """B3: it was found in the ring of operations, and somebody has written since."""
    bench = first_in_line()
    bench.tell(RINGS_KEY)
    bench.holds_back = True
    bench.hear(member(B)).run(1.2 * TIMING.settle_ms)
    asks, bench.waiting = list(bench.waiting), deque()
    bench.holds_back = False
    for ask in asks:
        bench.operate(ask.request)  # type: ignore[arg-type]
        if ask.request.key == RINGS_KEY:  # type: ignore[union-attr]
            other = bench.rings()
            bench.put(RINGS_KEY, encode_rings(Rings(other.epoch + 1, other.fence, {})))
        late = Answer("ok", bench.registers[ask.request.key][0])  # type: ignore[union-attr]
        bench.take(bench.registry.answered(ask.token, late, bench.now_ms))
    bench.hear(member(C)).run(4 * TIMING.settle_ms)
    assert bench.rings().epoch > 3, "it was made from what the other wrote, not over it"
    assert set(bench.rings().members) == {A, B, C}


def test_a_node_that_was_stopped_retires_nobody_for_the_time_it_missed() -> None:
    bench = first_in_line(B)
    bench.hear(member(B, State.DEAD)).run(1000.0)
    bench.now_ms += 10 * TIMING.retire_ms  # SIGSTOP
    bench.timer_ms = bench.now_ms
    bench.run(0.5 * TIMING.retire_ms)
    assert B in bench.rings().members
    bench.run(TIMING.retire_ms)
    assert B not in bench.rings().members


def test_only_a_few_in_line_contend_and_each_waits_for_those_before() -> None:
    kids = [kid_of(b"node %d" % n) for n in range(64)]
    begun: list[float] = []
    for kid in kids:
        bench = Bench(Registry(me(kid), Random(1), TIMING))
        bench.lease = False
        bench.hear(*(member(other) for other in kids if other != kid)).known()
        for step in range(int(CONTENDERS_MAX * TIMING.patience_ms / 100)):
            bench.run(100.0)
            if bench.of(Acquire):
                begun.append(step * 100)
                break
    assert len(begun) == CONTENDERS_MAX
    assert all(
        abs(later - earlier - TIMING.patience_ms) <= 200
        for earlier, later in zip(sorted(begun), sorted(begun)[1:], strict=False)
    )


def test_epochs_of_a_node_never_go_back_even_if_the_register_is_deleted() -> None:
    bench = first_in_line(B)
    bench.hear(member(C)).run(4 * TIMING.settle_ms)
    assert bench.registry.epoch == 2
    message = Changed(RINGS_KEY, 0, None)
    del bench.registers[RINGS_KEY]
    bench.take(bench.registry.answered(bench.watches[RINGS_KEY], message, bench.now_ms))
    bench.run(10 * TIMING.settle_ms)
    assert bench.rings().epoch == 3 and len(bench.registry.ring()) == 3


def test_a_register_that_cannot_be_read_is_told_of_and_left_alone() -> None:
    bench = Bench()
    bench.put(RINGS_KEY, b"garbage")
    bench.known().run(60_000.0)
    assert [each.key for each in bench.of(Unreadable)] == [RINGS_KEY]
    assert not bench.of(Operate) and not bench.of(Acquire)
    bench.put(RINGS_KEY, encode_rings(Rings(5)))
    bench.tell(RINGS_KEY)
    bench.run(10 * TIMING.patience_ms)
    assert bench.rings().epoch == 6 and bench.registry.ring() == (A,)


def test_a_registrar_without_work_resigns_where_that_is_wanted() -> None:
    bench = Bench(Registry(me(), Random(1), replace(TIMING, idle_ms=5000.0))).known()
    bench.run(3000.0)
    assert bench.registry.registrar
    bench.run(10_000.0)
    assert not bench.registry.registrar and len(bench.of(Resign)) == 1
    bench.hear(member(B)).run(10 * TIMING.patience_ms)
    assert B in bench.registry.ring()


def test_who_leaves_gives_the_lease_back_and_does_not_ask_for_it_again() -> None:
    bench = first_in_line()
    bench.take(bench.registry.leave(bench.now_ms))
    assert len(bench.of(Resign)) == 1 and not bench.registry.registrar
    bench.hear(member(B)).run(100 * TIMING.patience_ms)
    assert len(bench.of(Acquire)) == 1


def test_it_notices_that_it_was_stopped_while_it_waited_for_the_lease_as_well() -> None:
    bench = first_in_line(B)
    bench.take(bench.registry.lease_lost(Ballot(bench.grants, A, 1, 1), bench.now_ms))
    bench.holds_back = True
    bench.hear(member(C)).run(10 * TIMING.patience_ms)  # there is something to do: it asks
    assert [type(ask.request) for ask in bench.waiting] == [Acquire]
    bench.hear(member(B, State.DEAD)).run(1000.0)
    bench.now_ms += 10 * TIMING.retire_ms  # SIGSTOP, and the answer comes first
    bench.holds_back = False
    bench.answer(bench.waiting.popleft())
    bench.timer_ms = min(bench.timer_ms, bench.now_ms)
    bench.run(5 * TIMING.settle_ms)
    assert set(bench.rings().members) == {A, B, C}
