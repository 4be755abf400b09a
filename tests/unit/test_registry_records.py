"""What registers hold fits into them; where keys are placed; what a plan does, and what not."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.errors import ProtocolError
from manifold.kernel.limits import ALIAS_CHARS_MAX
from manifold.kernel.nexus.ballots import COUNTER_MAX
from manifold.kernel.nexus.values import DATA_BYTES_MAX
from manifold.kernel.registry.messages import (
    ALIASES_MAX,
    KINDS_MAX,
    MEMBERS_MAX,
    Fence,
    Kind,
    Timing,
)
from manifold.kernel.registry.placing import order, weight_of
from manifold.kernel.registry.plan import Step, when
from manifold.kernel.registry.records import (
    Alias,
    Aliases,
    Rings,
    decode_aliases,
    decode_rings,
    encode_aliases,
    encode_rings,
)
from manifold.vm.kid import kid_of

KIDS = [kid_of(b"%d" % n) for n in range(MEMBERS_MAX)]
FENCE: Fence = (COUNTER_MAX, KIDS[0], COUNTER_MAX, COUNTER_MAX)
members = st.lists(
    st.tuples(st.sampled_from(KIDS[:40]), st.integers(0, 6)), min_size=1, max_size=20
)


def test_as_many_members_and_aliases_as_are_allowed_fit_into_one_register_each() -> None:
    kinds = [Kind(f"{n:064}", True, 15) for n in range(KINDS_MAX)]
    ring = {kid: kinds[n % KINDS_MAX] for n, kid in enumerate(sorted(KIDS))}
    owners = {
        f"{n:0{ALIAS_CHARS_MAX}}": Alias(kid, COUNTER_MAX)
        for n, kid in enumerate(KIDS[:ALIASES_MAX])
    }
    rings, aliases = Rings(COUNTER_MAX, FENCE, ring), Aliases(FENCE, owners)
    assert len(encode_rings(rings)) < 36_000 < DATA_BYTES_MAX
    assert len(encode_aliases(aliases)) < 60_000 < DATA_BYTES_MAX
    assert decode_rings(encode_rings(rings)) == rings
    assert decode_aliases(encode_aliases(aliases)) == aliases


@pytest.mark.parametrize(
    "data",
    [
        b"",
        7,
        b"garbage",
        msgspec.msgpack.encode([1, FENCE, [], bytes(16), bytes(1)]),  # of no kind
        msgspec.msgpack.encode([1, FENCE, [["x", False, 0]], bytes(15), bytes(1)]),
        msgspec.msgpack.encode([1, FENCE, [["x", False, 0]], bytes(32), bytes(2)]),  # twice
        msgspec.msgpack.encode([-1, FENCE, [], b"", b""]),
    ],
)
def test_a_ring_that_no_registry_has_written_is_refused(data: object) -> None:
    with pytest.raises(ProtocolError):
        decode_rings(data)


@pytest.mark.parametrize(
    "entries",
    [
        [["a", bytes(16), 1], ["a", bytes([1] * 16), 1]],
        [["a", bytes(16), 1], ["b", bytes(16), 1]],
        [["", bytes(16), 1]],
        [["a", bytes(15), 1]],
    ],
)
def test_aliases_that_name_somebody_twice_or_nobody_are_refused(entries: object) -> None:
    with pytest.raises(ProtocolError):
        decode_aliases(msgspec.msgpack.encode([FENCE, entries]))


@settings(max_examples=150, deadline=None)
@given(members, st.text(max_size=20))
def test_who_goes_leaves_the_order_of_the_others_as_it_is(
    ring: list[tuple[str, int]], key: str
) -> None:
    """So only the keys of who goes move, and each to who was next for it."""
    whole = dict(ring)
    before = order(key, whole.items())  # type: ignore[arg-type]
    for gone in whole:
        rest = [(kid, weight) for kid, weight in whole.items() if kid != gone]
        after = order(key, rest)  # type: ignore[arg-type]
        assert after == [kid for kid in before if kid != gone]


@settings(max_examples=100, deadline=None)
@given(members, st.integers(1, 3))
def test_who_comes_takes_keys_and_nobody_else_does(
    ring: list[tuple[str, int]], replicas: int
) -> None:
    whole = dict(ring)
    new = KIDS[50]
    for n in range(20):
        before = order(f"k{n}", whole.items())[:replicas]  # type: ignore[arg-type]
        after = order(f"k{n}", [*whole.items(), (new, 2)])[:replicas]  # type: ignore[list-item]
        assert [kid for kid in after if kid != new] == before[: len(after) - (new in after)]


def test_keys_fall_to_members_in_proportion_to_their_weights() -> None:
    ring = [(KIDS[0], 0), (KIDS[1], 1), (KIDS[2], 2), (KIDS[3], 3)]  # 1 + 2 + 4 + 8
    count = dict.fromkeys((kid for kid, _ in ring), 0)
    for n in range(6000):
        count[order(f"key {n}", ring)[0]] += 1
    for kid, weight in ring:
        assert abs(count[kid] / 6000 - 2**weight / 15) < 0.02


def test_the_place_of_a_key_is_the_same_on_every_machine_and_for_ever() -> None:
    """Data lies where this says: it may only be changed together with moving everything."""
    ring = [(kid, n % 5) for n, kid in enumerate(KIDS[:8])]
    assert [KIDS.index(kid) for kid in order("a key", ring)] == [7, 1, 4, 2, 5, 3, 6, 0]


def test_a_weight_follows_memory_and_is_not_moved_by_a_rounding() -> None:
    assert [weight_of(1 << bits, None) for bits in (20, 26, 30, 41, 50)] == [0, 0, 4, 15, 15]
    nearly = int(1.5 * (1 << 30))
    assert weight_of(nearly, 4) == 4 and weight_of(nearly, 5) == 5
    assert weight_of(1 << 31, 4) == 5


def test_steps_wait_for_each_other_but_not_for_ever() -> None:
    timing = Timing(settle_ms=100.0)
    due = [Step(at, "put", KIDS[0]) for at in (1000.0, 1050.0, 1090.0)]
    assert when([], 0.0, timing) == float("inf")
    assert when(due, 900.0, timing) == 1000.0
    assert when(due, 1000.0, timing) == 1090.0 and when(due, 1090.0, timing) <= 1090.0
    random = Random(1)
    trickle = [Step(1000.0 + 50 * n + random.random(), "put", KIDS[n]) for n in range(100)]
    now_ms = 1000.0
    while when(trickle, now_ms, timing) > now_ms:
        now_ms = when(trickle, now_ms, timing)
    assert now_ms == 1000.0 + trickle[0].at_ms - 1000.0 + 4 * timing.settle_ms
