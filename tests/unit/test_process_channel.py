"""The channel between a node and a worker: whole messages, however the bytes arrive."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.errors import PeerError
from manifold.kernel.process.channel import Channel, Closed, framed
from manifold.kernel.process.messages import LENGTH_BYTES, LOCAL_BYTES_MAX, Abort, Ended, Limit

Ends = tuple[Channel[Limit | Abort], Channel[Limit | Abort]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        yield Channel(left, Limit | Abort), Channel(right, Limit | Abort)


@given(
    st.lists(st.builds(Limit, st.integers(0, 9), st.integers(0, 1 << 60)), max_size=20),
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
@settings(deadline=None)
def test_messages_come_whole_and_in_order_however_the_bytes_are_cut(
    sent: list[Limit], cuts: list[int]
) -> None:
    left, right = socket.socketpair()
    with left, right:
        channel: Channel[Limit] = Channel(right, Limit)
        data = b"".join(map(framed, sent))
        found, at = [], 0
        for cut in [*cuts, len(data)]:
            left.sendall(data[at : at + cut])
            at += cut
            found += channel.take()
        assert found == sent


def test_taking_does_not_wait(ends: Ends) -> None:
    assert ends[1].take() == []
    assert ends[1].wait(0.0) == []


def test_waiting_ends_with_the_first_message(ends: Ends) -> None:
    ends[0].send(Abort(1), Abort(2))
    assert ends[1].wait() == [Abort(1), Abort(2)]


def test_the_end_of_the_other_side_is_seen(ends: Ends) -> None:
    ends[0].socket.close()
    with pytest.raises(Closed):
        ends[1].take()
    with pytest.raises(Closed):
        ends[1].send(Abort(1))


def test_what_was_said_before_the_end_is_still_heard(ends: Ends) -> None:
    ends[0].send(Abort(1))
    ends[0].socket.close()
    assert ends[1].take() == [Abort(1)]
    with pytest.raises(Closed):
        ends[1].take()


def test_posting_never_blocks_and_the_rest_leaves_later(ends: Ends) -> None:
    near, far = ends
    posted = 0
    while not near.post(Limit(posted, 1 << 60)):
        posted += 1
    near.post(Limit(posted + 1, 0))
    found: list[Limit | Abort] = []
    while near.flush() or len(found) < posted + 2:
        found += far.take()
    assert [message.run for message in found] == list(range(posted + 2))


@pytest.mark.parametrize(
    "data",
    [
        (LOCAL_BYTES_MAX + 1).to_bytes(LENGTH_BYTES, "big"),
        framed(Ended(1, None)),
        (5).to_bytes(LENGTH_BYTES, "big") + b"\xc1\xc1\xc1\xc1\xc1",
        (3).to_bytes(LENGTH_BYTES, "big") + b"\x91\xa1\xff",
        (0).to_bytes(LENGTH_BYTES, "big"),
    ],
    ids=["too large", "not of this side", "no MessagePack", "no UTF-8", "empty"],
)
def test_what_does_not_belong_is_a_peer_error(ends: Ends, data: bytes) -> None:
    ends[0].socket.sendall(data)
    with pytest.raises(PeerError):
        ends[1].take()
