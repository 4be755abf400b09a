"""The judge of histories: against brute force, and on the classics that everybody gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations
from random import Random
from typing import Any

import pytest

from manifold.tools.simulator.linearizable import Operation, Undecided, Violation, check


def op(client: str, words: str, *argument: Any, told: Any = None, at: tuple[Any, Any]) -> Operation:
    kind: Any = words
    return Operation(client, "k", kind, argument, told, float(at[0]), at[1])


# --- brute force ------------------------------------------------------------------------------


def register(order: tuple[Operation, ...]) -> bool:
    """Whether results are right one after another; written apart from what it judges."""
    held: Any = None
    for each in order:
        told: Any = None
        if each.kind == "read":
            told = held
        elif each.kind == "write":
            held = each.argument[0]
        elif each.kind == "cas":
            told = held == each.argument[0]
            held = each.argument[1] if told else held
        elif each.kind == "add" and not isinstance(held, bytes):
            told = held = each.argument[0] + (0 if held is None else held)
        elif each.kind == "delete":
            told, held = held is not None, None
        elif each.kind == "create":
            told = held is None
            held = each.argument[0] if told else held
        if each.ended_ms is not None and (
            told != each.result or type(told) is not type(each.result)
        ):
            return False
    return True


def keeps_real_time(order: tuple[Operation, ...]) -> bool:
    """No operation stands after one that began when it had ended already."""
    return not any(
        later.ended_ms is not None and later.ended_ms < earlier.begun_ms
        for earlier, later in combinations(order, 2)
    )


def some_order_exists(history: list[Operation]) -> bool:
    """All permutations of the completed operations with each subset of the others."""
    done = [each for each in history if each.ended_ms is not None]
    lost = [each for each in history if each.ended_ms is None]
    return any(
        register(order) and keeps_real_time(order)
        for size in range(len(lost) + 1)
        for subset in combinations(lost, size)
        for order in permutations([*done, *subset])
    )


class Histories:
    """Tiny random ones on one key: few values, so that many operations change nothing."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def call(self, held: Any) -> tuple[str, tuple[Any, ...], Any, Any]:
        """A kind, its argument, its result and the next value."""
        random = self.random
        values: list[Any] = [1, 2, 3, b"1"]
        new = random.choice(values)
        kind = random.choice(("read", "write", "write", "cas", "add", "delete", "create"))
        if kind == "read":
            return kind, (), held, held
        if kind == "write":
            return kind, (new,), None, new
        if kind == "cas":
            expected = random.choice([held, held, None, *values])
            return kind, (expected, new), held == expected, new if held == expected else held
        if kind == "add":
            number = random.choice((0, 1, 1, -1))
            total = None if isinstance(held, bytes) else (held or 0) + number
            return kind, (number,), total, held if total is None else total
        if kind == "delete":
            return kind, (), held is not None, None
        return kind, (new,), held is None, new if held is None else held

    def possible(self, size: int, lost: float) -> list[Operation]:
        """A linearizable one: each takes effect at a moment between its begin and its end."""
        random, held, found = self.random, None, []
        for moment in range(size):
            kind, argument, result, after = self.call(held)
            begun = moment - random.choice((0, 0.2, 1, 2.5))
            ended: float | None = moment + random.choice((0, 0.2, 1, 2.5))
            if random.random() < lost:
                ended, result = None, None
            if ended is not None or random.random() < 0.5:
                held = after
            found.append(op(f"c{moment}", kind, *argument, told=result, at=(begun, ended)))
        random.shuffle(found)
        return found

    def altered(self, history: list[Operation]) -> list[Operation]:
        """The same with another result or another time for one operation."""
        random = self.random
        index = random.randrange(len(history))
        chosen = history[index]
        told: Any
        if random.random() < 0.3 and chosen.ended_ms is not None:
            shift = random.choice((-3.0, -1.0, 1.0, 3.0))
            chosen = replace(
                chosen, begun_ms=chosen.begun_ms + shift, ended_ms=chosen.ended_ms + shift
            )
        elif chosen.kind in ("cas", "delete", "create"):
            chosen = replace(chosen, result=not chosen.result)
        elif chosen.kind in ("read", "add"):
            told = random.choice((None, 0, 1, 2, 3, b"1"))
            chosen = replace(chosen, result=told)
        return [*history[:index], chosen, *history[index + 1 :]]


def tiny(seeds: range, size: int) -> Iterator[tuple[int, list[Operation]]]:
    for seed in seeds:
        made = Histories(seed)
        history = made.possible(made.random.randint(1, size), lost=made.random.choice((0, 0.3)))
        yield seed, history
        yield seed, made.altered(history)


@pytest.mark.parametrize("part", range(4))
def test_it_agrees_with_brute_force_on_thousands_of_tiny_histories(part: int) -> None:
    verdicts = {True: 0, False: 0}
    for seed, history in tiny(range(part * 1000, part * 1000 + 1000), 5):
        expected = some_order_exists(history)
        found = check(history)
        assert (found is None) == expected, f"seed {seed}: {history}\n{found}"
        assert not isinstance(found, Undecided)
        verdicts[expected] += 1
    assert min(verdicts.values()) > 100, "both verdicts are tried"


def test_it_agrees_with_brute_force_where_most_fates_are_unknown() -> None:
    refused = 0
    for seed in range(400):
        made = Histories(10_000 + seed)
        history = made.altered(made.possible(6, lost=0.6))
        expected = some_order_exists(history)
        assert (check(history) is None) == expected, f"seed {seed}: {history}"
        refused += not expected
    assert refused > 20


def test_the_answer_does_not_depend_on_the_order_in_which_a_history_was_collected() -> None:
    for _, history in tiny(range(20_000, 20_100), 5):
        shuffled = list(history)
        Random(1).shuffle(shuffled)
        assert check(shuffled) == check(history)


def test_what_really_happened_one_after_another_is_never_refused() -> None:
    for seed in range(50):
        assert check(Histories(seed).possible(60, lost=0.2)) is None, f"seed {seed}"


# --- the classics -----------------------------------------------------------------------------


def test_nothing_at_all_is_linearizable() -> None:
    assert check([]) is None


def test_a_stale_read_is_refused() -> None:
    history = [
        op("a", "write", 1, at=(0, 1)),
        op("a", "write", 2, at=(2, 3)),
        op("b", "read", told=1, at=(4, 5)),
    ]
    found = check(history)
    assert found is not None and found.key == "k"
    assert found.prefix == tuple(history[:2]) and found.stuck == (history[2],)


def test_an_old_value_may_be_read_while_the_new_one_is_being_written() -> None:
    history = [
        op("a", "write", 1, at=(0, 1)),
        op("a", "write", 2, at=(2, 9)),
        op("b", "read", told=2, at=(3, 4)),
        op("c", "read", told=1, at=(3, 5)),
    ]
    assert check(history) is None
    later = op("c", "read", told=1, at=(4.5, 5))
    assert check([*history[:3], later]) is not None, "new, then old again"


def test_a_lost_update_is_refused() -> None:
    history = [
        op("a", "write", 0, at=(0, 1)),
        op("a", "cas", 0, 1, told=True, at=(2, 5)),
        op("b", "cas", 0, 2, told=True, at=(3, 6)),
    ]
    assert check(history) is not None


def test_a_failed_cas_needs_a_moment_at_which_it_fails() -> None:
    write = op("a", "write", 0, at=(0, 1))
    failed = op("b", "cas", 0, 2, told=False, at=(2, 3))
    assert check([write, failed]) is not None
    assert check([write, failed, op("c", "write", 7, at=(2, 9))]) is None


def test_an_add_of_unknown_fate_may_happen_once_late_or_never_but_not_twice() -> None:
    add = op("a", "add", 1, at=(0, None))

    def seen(*values: int) -> bool:
        reads = [
            op("b", "read", told=v or None, at=(i * 10, i * 10 + 1)) for i, v in enumerate(values)
        ]
        return check([add, *reads]) is None

    assert seen(0, 0) and seen(0, 1) and seen(1, 1)
    assert not seen(1, 2), "applied twice"
    assert not seen(1, 0), "and not undone"


def test_each_of_two_equal_adds_of_unknown_fate_counts_once() -> None:
    adds = [op("a", "add", 1, at=(0, None)), op("b", "add", 1, at=(15, None))]
    assert check([*adds, op("c", "read", told=2, at=(20, 21))]) is None
    assert check([*adds, op("c", "read", told=2, at=(10, 11))]) is not None, "the other is not yet"
    assert check([*adds, op("c", "read", told=3, at=(20, 21))]) is not None


def test_a_value_that_nobody_wrote_or_not_yet_is_refused() -> None:
    read = op("b", "read", told=5, at=(2, 3))
    assert check([read]) is not None
    assert check([read, op("a", "write", 5, at=(4, 6))]) is not None
    assert check([read, op("a", "write", 5, at=(4, None))]) is not None
    assert check([read, op("a", "write", 5, at=(3, None))]) is None, "equal times overlap"


def test_a_write_that_changes_nothing_now_may_be_needed_later() -> None:
    history = [
        op("a", "write", 1, at=(0, 1)),
        op("b", "write", 1, at=(2, 20)),
        op("a", "write", 2, at=(3, 4)),
        op("a", "read", told=2, at=(5, 6)),
        op("a", "read", told=1, at=(7, 8)),
    ]
    assert check(history) is None


def test_deleting_and_creating_take_turns() -> None:
    history = [
        op("a", "create", 1, told=True, at=(0, 1)),
        op("b", "create", 2, told=False, at=(2, 3)),
        op("a", "delete", told=True, at=(4, 5)),
        op("b", "delete", told=False, at=(6, 7)),
        op("b", "create", 2, told=True, at=(8, 9)),
        op("b", "read", told=2, at=(10, 11)),
    ]
    assert check(history) is None
    for index in (0, 1, 2, 3, 4):
        changed = replace(history[index], result=not history[index].result)
        assert check([*history[:index], changed, *history[index + 1 :]]) is not None, index


def test_a_result_of_the_wrong_kind_is_refused() -> None:
    assert check([op("a", "add", 1, told=True, at=(0, 1))]) is not None, "True is not 1"
    assert check([op("a", "create", 1, told=1, at=(0, 1))]) is not None


def test_keys_are_judged_one_by_one_and_a_violation_names_its_own() -> None:
    good = op("a", "write", 1, at=(0, 1))
    bad = replace(op("a", "read", told=1, at=(2, 3)), key="other")
    found = check([good, bad])
    assert found is not None and found.key == "other"


def test_a_violation_is_told_in_words() -> None:
    writes = [op("a", "write", n, at=(n, n + 0.5)) for n in range(20)]
    found = check([*writes, op("b", "read", told=3, at=(30, 31))])
    text = str(found)
    assert "'k' is not linearizable" in text
    assert "(20 operations)" in text and "8 before these" in text
    assert "a: write(19) -> None   19-19.5 ms" in text
    assert "leaves the key 19" in text and "b: read() -> 3   30-31 ms" in text


# --- size -------------------------------------------------------------------------------------


def long_history(seed: int, operations: int, keys: int, clients: int) -> list[Operation]:
    """Clients in closed loops on a real register, one in fifty never told; unique values."""
    random = Random(seed)
    held: dict[str, Any] = {}
    busy = [0.0] * clients
    found = []
    for number in range(operations):
        client = min(range(clients), key=busy.__getitem__)
        begun = busy[client]
        middle, ended = begun + random.random(), begun + 1 + random.random()
        found.append((middle, client, number, begun, ended))
        busy[client] = ended + random.random() / 10
    history = []
    for _, client, number, begun, ended in sorted(found):
        key = f"k{random.randrange(keys)}"
        lost = random.random() < 0.02
        kind = random.choice(("read", "write", "add", "cas"))
        before = held.get(key)
        if kind == "write":
            call, told, held[key] = (number,), None, number
        elif kind == "add":
            held[key] = (before or 0) + 10_000
            call, told = (10_000,), held[key]
        elif kind == "cas":
            expected = before if random.random() < 0.7 else -1
            call, told = (expected, number), before == expected
            held[key] = number if told else before
        else:
            call, told = (), before
        chosen: Any = kind
        history.append(
            Operation(f"c{client}", key, chosen, call, told, begun, None if lost else ended)
        )
    return history


def test_two_thousand_operations_over_twenty_keys_take_few_configurations() -> None:
    history = long_history(7, 2000, keys=20, clients=16)
    assert check(history, configurations_max=400) is None
    assert check(long_history(8, 2000, keys=1, clients=6), configurations_max=20_000) is None


def test_one_wrong_read_among_thousands_is_found() -> None:
    history = long_history(9, 2000, keys=20, clients=16)
    reads = [i for i, each in enumerate(history) if each.kind == "read" and each.ended_ms]
    for index in reads[50:60]:
        changed = [*history]
        changed[index] = replace(history[index], result=-5)
        found = check(changed)
        assert found is not None and not isinstance(found, Undecided)
        assert found.key == history[index].key


def test_a_deep_history_needs_no_recursion() -> None:
    history = [op("a", "add", 1, told=n + 1, at=(n, n + 0.5)) for n in range(5000)]
    assert check(history) is None
    assert check([*history, op("a", "read", told=0, at=(6000, 6001))]) is not None


def test_what_is_given_up_is_undecided_and_never_passes() -> None:
    hard = [op(f"c{n}", "add", 1 << n, at=(0, None)) for n in range(30)]
    history = [*hard, op("r", "read", told=-1, at=(1, 2))]
    found = check(history, configurations_max=1000)
    assert isinstance(found, Undecided) and isinstance(found, Violation)
    assert found.configurations == 1000 and "Undecided" in str(found)


def test_a_definite_violation_is_told_before_a_doubtful_one() -> None:
    hard = [op(f"c{n}", "add", 1 << n, at=(0, None)) for n in range(30)]
    bad = replace(op("a", "read", told=1, at=(0, 1)), key="z")
    history = [*hard, op("r", "read", told=-1, at=(1, 2)), bad]
    found = check(history, configurations_max=1000)
    assert found is not None and not isinstance(found, Undecided) and found.key == "z"


def test_a_malformed_operation_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="time goes forward"):
        op("a", "read", at=(2, 1))
    with pytest.raises(AssertionError, match="arguments of cas"):
        op("a", "cas", 1, at=(1, 2))
