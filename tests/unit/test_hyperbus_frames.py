"""Frames, queues and chunks: what is put in comes out, and nothing grows past its bound."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel import errors
from manifold.kernel.errors import Maybe, PeerError, Unavailable
from manifold.kernel.hyperbus import frames, messages
from manifold.kernel.hyperbus.faults import to_error, to_failure
from manifold.kernel.hyperbus.frames import (
    Outbox,
    Reassembly,
    decode_envelope,
    decode_frame,
    encode_envelope,
)
from manifold.kernel.hyperbus.messages import CHUNK_BYTES, Chunk, Envelope, Failure, Frame
from manifold.kernel.limits import (
    FRAME_BYTES_MAX,
    FRAME_ENVELOPES_MAX,
    PEER_QUEUE_BYTES_MAX,
    PEER_QUEUE_ENVELOPES_MAX,
)


class Raw(msgspec.Struct, frozen=True, array_like=True, tag="raw"):
    data: bytes


ORIGIN = ("K-a", 1, "data")
body_decoder: msgspec.msgpack.Decoder[Chunk | Failure] = msgspec.msgpack.Decoder(Chunk | Failure)


def failure(size: int) -> bytes:
    return encode_envelope(Failure("x", "m" * size))


def emptied(outbox: Outbox, cluster: str = "c") -> list[Frame]:
    """Every frame that an outbox gives, as a peer decodes it."""
    found = []
    while outbox.queue:
        data, count = outbox.take(cluster, "K-a", 1)
        assert len(data) <= FRAME_BYTES_MAX, "F1"
        frame = decode_frame(data, cluster)
        assert len(frame.envelopes) == count <= FRAME_ENVELOPES_MAX
        outbox.drop(count)
        found.append(frame)
    assert outbox.queued_bytes == 0
    return found


@given(st.lists(st.integers(0, 60_000), max_size=80))
@settings(deadline=None, max_examples=40)
def test_what_is_queued_leaves_in_order_and_in_as_few_frames_as_fit(sizes: list[int]) -> None:
    outbox = Outbox()
    for size in sizes:
        outbox.put(failure(size))
    found = emptied(outbox)
    bodies = [body_decoder.decode(e.body) for frame in found for e in frame.envelopes]
    assert [len(body.message) for body in bodies if isinstance(body, Failure)] == sizes
    assert len(found) <= 1 + sum(sizes) // (FRAME_BYTES_MAX // 2)


def test_a_whole_queue_of_small_messages_is_one_frame() -> None:
    outbox = Outbox()
    for _ in range(PEER_QUEUE_ENVELOPES_MAX):
        outbox.put(failure(10))
    assert len(emptied(outbox)) == 1


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    outbox = Outbox()
    for _ in range(PEER_QUEUE_ENVELOPES_MAX):
        outbox.put(failure(10))
    with pytest.raises(Unavailable, match="full"):
        outbox.put(failure(10))
    outbox.drop(1)
    outbox.put(failure(10))


def test_a_queue_is_bounded_in_bytes_too() -> None:
    outbox = Outbox()
    with pytest.raises(Unavailable, match="full"):
        for _ in range(PEER_QUEUE_ENVELOPES_MAX):
            outbox.put(failure(60_000))
    assert outbox.queued_bytes < PEER_QUEUE_BYTES_MAX + 61_000


def test_a_message_larger_than_any_may_be_is_refused_and_nothing_of_it_is_queued() -> None:
    outbox = Outbox()
    with pytest.raises(Unavailable, match="larger than"):
        outbox.put(bytes(messages.MESSAGE_BYTES_MAX + 1))
    assert not outbox.queue


@given(st.integers(FRAME_BYTES_MAX, 6 << 20), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=15)
def test_a_large_message_travels_in_chunks_and_is_whole_again(size: int, seed: int) -> None:
    whole = encode_envelope(Raw(Random(seed).randbytes(size)))
    outbox = Outbox()
    outbox.put(encode_envelope(Chunk(9, 0, 1, b"a neighbour")))
    outbox.put(whole)
    found = emptied(outbox)
    assert len(found) <= 2 + size // FRAME_BYTES_MAX  # two chunks a frame
    reassembly = Reassembly()
    chunks = [body_decoder.decode(e.body) for frame in found for e in frame.envelopes]
    results = [reassembly.add(ORIGIN, chunk) for chunk in chunks if isinstance(chunk, Chunk)]
    assert [r for r in results if r is not None] == [b"a neighbour", whole]
    assert (reassembly.held_bytes, len(reassembly)) == (0, 0)


# -- reassembly -----------------------------------------------------------------------------------


def chunk(stream: int, index: int, count: int, data: bytes = b"x") -> Chunk:
    return Chunk(stream, index, count, data)


def test_a_gap_gives_the_stream_up_and_the_next_one_arrives() -> None:
    reassembly = Reassembly()
    assert reassembly.add(ORIGIN, chunk(1, 0, 3)) is None
    assert reassembly.add(ORIGIN, chunk(1, 2, 3)) is None
    assert reassembly.add(ORIGIN, chunk(1, 1, 3)) is None
    assert len(reassembly) == 0
    assert reassembly.add(ORIGIN, chunk(2, 0, 1)) == b"x"


def test_a_line_that_was_opened_anew_counts_its_streams_from_the_start() -> None:
    reassembly = Reassembly()
    reassembly.add(ORIGIN, chunk(1, 0, 3, b"old"))
    assert reassembly.add(ORIGIN, chunk(1, 0, 2, b"new ")) is None
    assert reassembly.add(ORIGIN, chunk(1, 1, 2, b"whole")) == b"new whole"


@pytest.mark.parametrize(
    "other", [("K-b", 1, "data"), ("K-a", 2, "data"), ("K-a", 1, "control")], ids=str
)
def test_streams_of_one_number_from_elsewhere_do_not_mix(other: tuple[str, int, str]) -> None:
    reassembly = Reassembly()
    reassembly.add(ORIGIN, chunk(1, 0, 2, b"a"))
    reassembly.add(other, chunk(1, 0, 2, b"b"))
    assert reassembly.add(ORIGIN, chunk(1, 1, 2, b"a")) == b"aa"
    assert reassembly.add(other, chunk(1, 1, 2, b"b")) == b"bb"


def test_a_stream_that_changes_its_length_is_given_up() -> None:
    reassembly = Reassembly()
    reassembly.add(ORIGIN, chunk(1, 0, 100))
    assert reassembly.add(ORIGIN, chunk(1, 1, 2)) is None
    assert len(reassembly) == 0


def test_what_is_held_is_bounded_whoever_sends_it() -> None:
    reassembly = Reassembly()
    data = bytes(CHUNK_BYTES)
    for number in range(600):
        reassembly.add((f"K-{number}", 1, "data"), chunk(1, 0, 100, data))
        assert reassembly.held_bytes <= messages.REASSEMBLY_BYTES_MAX
        assert len(reassembly) <= messages.REASSEMBLY_STREAMS_MAX


def test_one_source_does_not_push_out_the_others() -> None:
    reassembly = Reassembly()
    reassembly.add(ORIGIN, chunk(1, 0, 2, b"a"))
    for number in range(1000):
        reassembly.add(("K-flood", 1, "data"), chunk(number, 0, 2))
    assert len(reassembly) == 1 + messages.REASSEMBLY_SOURCE_STREAMS_MAX
    assert reassembly.add(ORIGIN, chunk(1, 1, 2, b"b")) == b"ab"
    reassembly.forget("K-flood")
    assert (len(reassembly), reassembly.held_bytes) == (0, 0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]), st.integers(0, 3), st.integers(0, 4), st.integers(1, 4),
            st.binary(max_size=3),
        ),
        max_size=200,
    )
)  # fmt: skip
def test_whatever_chunks_come_the_books_are_right(
    said: list[tuple[str, int, int, int, bytes]],
) -> None:
    reassembly = Reassembly()
    for source, stream, index, count, data in said:
        reassembly.add((source, 1, "data"), Chunk(stream, index, count, data))
        held = [part for s in reassembly._streams.values() for part in s.parts]
        assert reassembly.held_bytes == sum(map(len, held))
        assert sum(reassembly._per_source.values()) == len(reassembly)


# -- decoding -------------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_peer_error(data: bytes) -> None:
    for decode in (lambda: decode_frame(data, "c"), lambda: decode_envelope(data)):
        try:
            decode()
        except PeerError:
            continue


@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 400))
@settings(max_examples=300)
def test_no_mutation_of_a_frame_raises_anything_but_a_peer_error(
    at: int, byte: int, cut: int
) -> None:
    outbox = Outbox()
    for size in (0, 5, 300):
        outbox.put(failure(size))
    data = bytearray(outbox.take("c", "K-a", 1)[0])
    data[at % len(data)] = byte
    del data[len(data) - cut % len(data) :]
    try:
        decode_frame(bytes(data), "c")
    except PeerError:
        return


@pytest.mark.parametrize("version", [0, messages.VERSION + 1, 1 << 60])
def test_another_version_is_refused_with_those_that_are_understood(version: int) -> None:
    data = msgspec.msgpack.encode((version, "c", "K-a", 1, []))
    with pytest.raises(PeerError, match=f"speaks {messages.VERSION_OLDEST} to {messages.VERSION}"):
        decode_frame(data, "c")


def test_a_frame_of_another_cluster_is_refused() -> None:
    with pytest.raises(PeerError, match="another cluster"):
        decode_frame(msgspec.msgpack.encode((messages.VERSION, "d", "K-a", 1, [])), "c")


def test_an_envelope_keeps_its_fields() -> None:
    given_fields = Envelope(msgspec.Raw(b""), 7, 8, 9.0, "rpi4-01", "trace")
    found = decode_envelope(encode_envelope(Failure("a", "b"), given_fields))
    assert (found.request, found.reply_to, found.deadline_ms) == (7, 8, 9.0)
    assert (found.destination, found.trace) == ("rpi4-01", "trace")
    assert body_decoder.decode(found.body) == Failure("a", "b")


def test_text_that_is_not_utf_8_is_a_peer_error() -> None:
    with pytest.raises(PeerError, match="does not decode"):
        decode_frame(b"\x95\x01\xa1\xff\xa1y\x01\x90", "c")


def test_the_overhead_kept_free_is_enough_for_the_largest_header() -> None:
    header = msgspec.msgpack.encode((1, "\U0001f600" * 256, "\U0001f600" * 256, (1 << 32) - 1, []))
    assert len(header) + 5 <= frames.FRAME_OVERHEAD_BYTES


# -- faults and the filter ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__])
def test_an_error_is_the_same_kind_after_its_journey(kind: type[errors.ManifoldError]) -> None:
    sent = kind("It broke.", "Mend it.")
    found = to_error(msgspec.msgpack.decode(msgspec.msgpack.encode(to_failure(sent)), type=Failure))
    assert type(found) is kind
    assert (found.code, found.message, found.next_step) == (sent.code, "It broke.", "Mend it.")
    assert found.exit_code == sent.exit_code


def test_who_is_busy_says_when_to_come_again() -> None:
    sent = to_failure(errors.Busy("It is full.", retry_ms=1500))
    found = to_error(msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Failure))
    assert isinstance(found, errors.Busy) and found.retry_ms == 1500
    old = msgspec.msgpack.encode(["h.failure", "busy", "It is full.", ""])  # before it was said
    found = to_error(msgspec.msgpack.decode(old, type=Failure))
    assert isinstance(found, errors.Busy) and found.retry_ms == 0


def test_an_error_of_an_unknown_code_keeps_its_code() -> None:
    found = to_error(Failure("of_tomorrow", "It broke."))
    assert type(found) is errors.ManifoldError
    assert found.code == "of_tomorrow"
    assert not isinstance(found, Maybe)


def test_a_frame_of_a_size_has_so_many_bytes_or_a_single_message() -> None:
    outbox = Outbox()
    for _ in range(20):
        outbox.put(b"x" * 1000)
    frame, count = outbox.take("c", "K-a", 1, 4096 + 5000)
    assert (count, len(frame) < 9096) == (5, True)
    _, count = outbox.take("c", "K-a", 1, 1)
    assert count == 1
