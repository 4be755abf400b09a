"""A node's sockets under fire: whatever arrives, the node lives, answers and counts.

Each attack lasts `SECONDS`; `MANIFOLD_HOSTILE_S=60` makes it a minute each. A failure prints the
seed, and `MANIFOLD_HOSTILE_SEED` sets it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any, get_args

import msgspec
import pynng
import pytest
from msgspec import inspect

from manifold.kernel import messages as m
from manifold.kernel.effects import Plane
from manifold.kernel.errors import ManifoldError, Refused
from manifold.kernel.hyperbus import sockets
from manifold.kernel.hyperbus.door import knock
from manifold.kernel.hyperbus.frames import encode_envelope
from manifold.kernel.hyperbus.messages import CHUNK_BYTES, VERSION, Chunk, Envelope, Hello
from manifold.kernel.hyperbus.splitter import LENGTH, SEALED_BYTES_MAX, framed
from manifold.kernel.hyperbus.streams import CONNECTIONS_MAX
from manifold.kernel.limits import FRAME_BYTES_MAX, FRAME_ENVELOPES_MAX, PEERS_MAX
from manifold.shells.sdk import Client
from manifold.tools.emulator.testing import TestCluster

SECONDS = float(os.environ.get("MANIFOLD_HOSTILE_S", "0.7"))
SEED = int(os.environ.get("MANIFOLD_HOSTILE_SEED", "20"))
CLUSTER = f"h{secrets.token_hex(4)}"
# Valid commands that do what they say, to whoever may give them: no attack on the decoding.
OBEYED = (m.SetLink, m.LinkOrders)


class Target:
    """One node, and what is needed to throw things at it."""

    def __init__(self, cluster: TestCluster) -> None:
        self.cluster = cluster
        self.name = cluster.name
        self.client: Client = cluster.client(cluster.aliases[0])
        self.before = self.info()
        self.address = self.before.address
        self.path = self.address.removeprefix("ipc://")
        self.random = Random(SEED)
        self.stack = ExitStack()

    def info(self) -> m.NodeInfo:
        found: m.NodeInfo = self.client.ask(m.GetNode())
        return found

    def pusher(self, plane: Plane) -> socket.socket:
        return self.stack.enter_context(connected(sockets.path(self.address, plane)))

    def push(self, push: socket.socket, data: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the node has had enough of it
            push.sendall(framed(data))

    def until_counted(self, count: int) -> None:
        """Until that many drops more were counted than before."""
        deadline = time.monotonic() + 10
        while (now := self.info().bad_messages) < self.before.bad_messages + count:
            assert time.monotonic() < deadline, f"{now} counted, seed {SEED}"

    def quiet(self) -> m.NodeInfo:
        """What it says once nothing that was sent before is counted any more."""
        last, same = self.info(), 0
        while same < 50:
            now = self.info()
            same = same + 1 if now.bad_messages == last.bad_messages else 0
            last = now
        return last

    def check(self) -> None:
        """The same process, alive, quick to answer."""
        began = time.monotonic()
        after = self.info()
        assert (after.pid, after.boot) == (self.before.pid, self.before.boot), self.why()
        assert time.monotonic() - began < 2, f"seed {SEED}"
        assert self.cluster.supervisor.nodes[after.alias].restarts == 0, self.why()

    def why(self) -> str:
        return f"seed {SEED}: {self.cluster.logs(self.before.alias)[-3000:]}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    environment = os.environ | {
        "MANIFOLD_STATE_HOME": str(folder / "state"),
        "MANIFOLD_RUNTIME_DIR": str(folder / "run"),
        "MANIFOLD_CLUSTER": CLUSTER,
    }
    cluster = TestCluster(2, environment)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder)


@pytest.fixture
def target(cluster: TestCluster) -> Iterator[Target]:
    found = Target(cluster)
    with found.stack:
        yield found
    try:
        found.check()
    except ManifoldError as error:
        pytest.fail(f"the node does not answer: {error}; {found.why()}")


def while_time(act: Callable[[], None]) -> int:
    """Repeat for `SECONDS`; how often."""
    until, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < until:
        act()
        count += 1
    return count


def frame(
    *envelopes: bytes, cluster: str = CLUSTER, source: str = "K-" + "0" * 32, version: int = VERSION
) -> bytes:
    raws = [msgspec.Raw(each) for each in envelopes]
    return msgspec.msgpack.encode((version, cluster, source, 1, raws))


# -- frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", list(Plane))
def test_random_bytes_are_counted_and_dropped(target: Target, plane: Plane) -> None:
    push = target.pusher(plane)
    random = target.random
    sent = while_time(lambda: target.push(push, random.randbytes(random.randrange(200))))
    target.until_counted(sent)


def test_mutated_frames_are_survived(target: Target) -> None:
    push = target.pusher(Plane.CONTROL)
    random = target.random
    valid = [
        frame(encode_envelope(m.GetNode(), Envelope(msgspec.Raw(b""), request=5))),
        frame(encode_envelope(m.ReadLog()), encode_envelope(m.Done("x" * 300))),
        frame(encode_envelope(Chunk(1, 0, 3, b"abc"))),
        *(frame(encode_envelope(value(kind, random))) for kind in kinds()),
    ]

    def mutate() -> None:
        data = bytearray(random.choice(valid))
        for _ in range(random.randrange(1, 4)):
            at = random.randrange(len(data))
            match random.randrange(3):
                case 0:
                    data[at] = random.randrange(256)
                case 1:
                    del data[at : at + random.randrange(1, 9)]
                case _:
                    data[at:at] = random.randbytes(random.randrange(1, 9))
            if not data:
                return
        target.push(push, bytes(data))

    while_time(mutate)
    assert target.info().bad_messages > target.before.bad_messages


def test_messages_that_decode_but_make_no_sense_are_survived(target: Target) -> None:
    """Every type of the vocabulary, filled at random within its bounds, from nobody we know."""
    push = target.pusher(Plane.CONTROL)
    random = target.random
    every = kinds()

    def act() -> None:
        body = value(random.choice(every), random)
        way = random.randrange(3)
        envelope = Envelope(
            msgspec.Raw(b""),
            request=random.randrange(1 << 20) if way == 1 else 0,
            reply_to=random.randrange(1 << 20) if way == 2 else 0,
            destination="" if random.random() < 0.8 else text(random),
        )
        source = random.choice(["K-" + random.randbytes(16).hex(), "C-1", text(random), ""])
        target.push(push, frame(encode_envelope(body, envelope), source=source))

    while_time(act)


@pytest.mark.parametrize(
    "wrong",
    [
        frame(encode_envelope(m.GetNode()), cluster="another"),
        frame(encode_envelope(m.GetNode()), version=VERSION + 1),
        frame(encode_envelope(m.GetNode()), version=0),
        frame(encode_envelope(m.GetNode()), version=1 << 60),
        frame(encode_envelope(m.GetNode()), source="x" * 257),
        frame(b"\x92" * 5000 + b"\x00"),  # nested beyond any recursion
        frame(*[encode_envelope(m.GetNode())] * (FRAME_ENVELOPES_MAX + 1)),
        frame(b"\xdd\xff\xff\xff\xff"),  # claims four thousand million elements
        frame(b"\x91\xc6\xff\xff\xff\xff"),  # claims four gigabytes
        frame(encode_envelope(Chunk(1, 0, 2, b"x" * (CHUNK_BYTES + 1)))),
        b"\x95" + b"\x00" * FRAME_BYTES_MAX,
        b"",
    ],
    ids=[
        "another cluster", "a later version", "an earlier version", "an absurd version",
        "a long source", "deep nesting", "too many envelopes", "a huge array", "a huge binary",
        "a large chunk", "a byte too many", "nothing",
    ],
)  # fmt: skip
def test_what_does_not_belong_is_counted_once_each(target: Target, wrong: bytes) -> None:
    push = target.pusher(Plane.CONTROL)
    for _ in range(3):
        target.push(push, wrong)
    target.until_counted(3)
    assert target.info().bad_messages == target.before.bad_messages + 3


def test_a_body_that_does_not_decode_costs_its_neighbours_nothing(target: Target) -> None:
    push = target.pusher(Plane.CONTROL)
    bad = encode_envelope(m.LogLines("a", 0, ())).replace(b"n.loglines", b"n.nonsense")
    good = encode_envelope(m.Done())
    target.push(push, frame(bad, good, bad))
    target.until_counted(2)


def test_messages_larger_than_any_frame_never_arrive(target: Target) -> None:
    for size in (FRAME_BYTES_MAX + 10_000, 8 << 20, 64 << 20):
        for plane in Plane:
            target.push(target.pusher(plane), b"\x95" + bytes(size))
    target.check()
    assert resident_bytes(target.before.pid) < 400 << 20


def test_streams_of_chunks_that_never_end_are_bounded(target: Target) -> None:
    push = target.pusher(Plane.DATA)
    part = bytes(CHUNK_BYTES)
    before = resident_bytes(target.before.pid)
    for number in range(400):  # 200 MB, none of it a whole message
        chunk = encode_envelope(Chunk(number, 0, 100, part))
        target.push(push, frame(chunk, source=f"K-{number % 50:032x}"))
    target.check()
    assert resident_bytes(target.before.pid) - before < 180 << 20


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- the door -------------------------------------------------------------------------------------


def test_the_door_answers_whatever_is_said_to_it(target: Target) -> None:
    random = target.random
    url = sockets.url(target.address, sockets.DOOR)
    good = msgspec.msgpack.encode(Hello(VERSION, CLUSTER, "C-1", 1, "x"))
    with pynng.Req0(dial=url, recv_timeout=5000, send_timeout=5000, resend_time=150) as door:

        def act() -> None:
            question = bytearray(random.choice([good, random.randbytes(random.randrange(100))]))
            for _ in range(random.randrange(3)):
                if question:
                    question[random.randrange(len(question))] = random.randrange(256)
            door.send(bytes(question))
            assert door.recv()

        while_time(act)
    assert target.info().bad_messages > target.before.bad_messages


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(VERSION, "x" * 256, "C-1", 1, ""), "not 'x"),
        (Hello(VERSION, "\x01" * 256, "C-1", 1, ""), "not '"),
        (Hello(VERSION + 7, CLUSTER, "C-1", 1, ""), f"version {VERSION + 7}"),
        (Hello(VERSION, CLUSTER, "C-1", 1, "tcp://127.0.0.1:80"), "not in this node's directory"),
        (Hello(VERSION, CLUSTER, "C-1", 1, "ipc:///tmp/elsewhere"), "not in this node's directory"),
    ],
)
def test_the_door_refuses_with_a_reason(target: Target, hello: Hello, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        knock(target.address, hello, 2000)


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "a\0b", "n" * 90, "sub/x"])
def test_the_door_takes_no_address_that_is_no_plain_name_beside_it(
    target: Target, name: str
) -> None:
    address = f"{target.address.rpartition('/')[0]}/{name}"
    hello = Hello(VERSION, CLUSTER, "C-" + secrets.token_hex(4), 1, address)
    with pytest.raises(Refused, match="not in this node's directory"):
        knock(target.address, hello, 2000)


def test_a_greeting_moves_nobody_who_is_known(target: Target) -> None:
    elsewhere = f"{target.address.rpartition('/')[0]}/elsewhere"
    other = next(node for node in target.client.nodes() if node.alias != target.before.alias)
    for kid in (other.kid, target.before.kid):
        for address in (elsewhere, ""):
            with pytest.raises(Refused, match=r"known at|own identity"):
                knock(target.address, Hello(VERSION, CLUSTER, str(kid), 1, address), 2000)
    assert {node.state for node in target.client.nodes()} == {"ready"}


def test_more_strangers_than_a_node_remembers_do_not_stop_it(target: Target) -> None:
    folder = target.address.rpartition("/")[0]
    url = sockets.url(target.address, sockets.DOOR)
    refused = 0
    with pynng.Req0(dial=url, recv_timeout=5000, resend_time=150) as door:
        for number in range(PEERS_MAX + 100):
            hello = Hello(VERSION, CLUSTER, f"C-{number}", 1, f"{folder}/s{number}")
            door.send(msgspec.msgpack.encode(hello))
            answer = door.recv()
            refused += b"Too many peers" in answer
    assert refused == 0  # nobody listens at those addresses: they were forgotten to make room


def test_many_who_ask_for_a_reverse_channel_get_few(target: Target) -> None:
    def channels() -> int:
        return len(list(Path(target.path).parent.glob(f"{Path(target.path).name}.r*")))

    for number in range(100):
        knock(target.address, Hello(VERSION, CLUSTER, f"C-r{number}", 1, ""), 2000)
    assert channels() <= 16


# -- below the frames -----------------------------------------------------------------------------


def connected(path: str, timeout_s: int = 5) -> socket.socket:
    """Connect, and wait while the listener's queue is full: with a timeout of Python's, that would
    be refused at once (connect(2), EAGAIN)."""
    raw = socket.socket(socket.AF_UNIX)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", timeout_s, 0))
    raw.connect(path)
    raw.settimeout(timeout_s)
    return raw


def every_socket(target: Target) -> list[str]:
    return [f"{target.path}{ending}" for ending in (".d", ".c", ".a")]


def test_raw_bytes_instead_of_a_handshake_or_a_frame_are_survived(target: Target) -> None:
    random = target.random
    paths = every_socket(target)
    header = b"\0SP\0" + struct.pack(">HH", 80, 0)  # a handshake of nng, as a push socket makes it
    length = struct.pack(">BQ", 1, 1 << 62)
    whole = framed(frame(encode_envelope(m.GetNode())))

    def act() -> None:
        data = random.choice(
            [
                random.randbytes(64),
                header[: random.choice((3, len(header)))],
                header + length[: random.choice((4, len(length)))],
                whole[: random.randrange(len(whole))],
                whole + LENGTH.pack(1 << 31) + whole,
            ]
        )
        with socket.socket(socket.AF_UNIX) as raw, suppress(OSError):
            raw.settimeout(1)
            raw.connect(random.choice(paths))
            raw.sendall(data)

    while_time(act)


@pytest.mark.parametrize("length", [SEALED_BYTES_MAX + 1, 1 << 24, 1 << 31, (1 << 32) - 1])
def test_a_length_that_no_frame_has_ends_the_connection_and_is_counted(
    target: Target, length: int
) -> None:
    before = target.quiet().bad_messages
    for plane in Plane:
        push = target.pusher(plane)
        push.sendall(LENGTH.pack(length) + b"x" * 1000)
        with suppress(ConnectionResetError):  # closed with something unread
            assert push.recv(1) == b""
    target.until_counted(before + 2 - target.before.bad_messages)
    assert target.quiet().bad_messages == before + 2


def test_a_frame_that_comes_byte_by_byte_or_never_ends_costs_nobody_else_anything(
    target: Target,
) -> None:
    slow = target.pusher(Plane.CONTROL)
    never = [target.pusher(plane) for plane in Plane for _ in range(20)]
    before = resident_bytes(target.before.pid)
    for push in never:
        push.sendall(LENGTH.pack(SEALED_BYTES_MAX) + b"x" * 1000)
    for byte in framed(b"no frame"):
        target.check()
        slow.sendall(bytes([byte]))
    target.until_counted(1)
    assert resident_bytes(target.before.pid) - before < 20 << 20  # what is not sent is not held


def test_more_connections_than_are_held_keep_nobody_out(target: Target) -> None:
    with ExitStack() as held:
        for number in range(CONNECTIONS_MAX + 100):
            held.enter_context(connected(sockets.path(target.address, Plane.CONTROL)))
            if number % 200 == 0:
                target.check()
        descriptors = len(os.listdir(f"/proc/{target.before.pid}/fd"))
        assert descriptors < CONNECTIONS_MAX + 300
        target.check()
        with Client(CLUSTER, node=target.before.alias, environ=target.cluster.environ) as client:
            assert client.ask(m.GetNode()).pid == target.before.pid
    target.check()


def test_hundreds_of_connections_that_say_nothing_keep_nobody_out(target: Target) -> None:
    with ExitStack() as held:
        for number in range(300):
            raw = held.enter_context(socket.socket(socket.AF_UNIX))
            raw.settimeout(1)
            with suppress(OSError):
                raw.connect(every_socket(target)[number % 3])
        target.check()
        with Client(CLUSTER, node=target.before.alias, environ=target.cluster.environ) as client:
            assert client.ask(m.GetNode()).pid == target.before.pid
    target.check()


def test_who_connects_to_the_zygote_and_says_nothing_or_nonsense_does_not_stop_it(
    target: Target,
) -> None:
    zygote = target.cluster.supervisor.specs[0].zygote
    with ExitStack() as held:
        for number in range(5):
            raw = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            raw.connect(zygote)
            if number % 2:
                raw.send(target.random.randbytes(500))
        program = ".cells 1\nLOAD 0\nEMIT\nHALT\n"
        assert target.client.parallel_for(program, 0, 10) == list(range(10))  # forks a worker


# -- values of any type ---------------------------------------------------------------------------


def kinds() -> list[type]:
    return [kind for kind in get_args(m.VOCABULARY) if kind not in OBEYED]


def text(random: Random, longest: int = 40) -> str:
    return "".join(random.choice("aK-C0 /\n\0é:☃") for _ in range(random.randrange(longest)))


INTEGERS = (0, 1, -1, 2, 7, 63, 1 << 20, (1 << 31) - 1, (1 << 53), (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e9, 1e300, -1e300, float("inf"), float("nan"), 5e-324)


def value(kind: Any, random: Random) -> Any:
    """A value of a type, valid by its own bounds and otherwise as odd as can be."""
    return made(inspect.type_info(kind), random, 0)


def made(info: Any, random: Random, depth: int) -> Any:
    match info:
        case inspect.StructType():
            fields = {f.name: made(f.type, random, depth + 1) for f in info.fields}
            return info.cls(**fields)
        case inspect.UnionType():
            return made(random.choice(info.types), random, depth)
        case inspect.IntType():
            low = info.ge if info.ge is not None else -(1 << 63)
            high = info.le if info.le is not None else (info.lt or 1 << 63) - 1
            fit = [each for each in INTEGERS if low <= each <= high]
            return random.choice([*fit, random.randint(int(low), int(high))])
        case inspect.FloatType():
            low = info.ge if info.ge is not None else info.gt
            fit = [
                each
                for each in FLOATS
                if (low is None or each >= low) and (info.le is None or each <= info.le)
            ]
            return random.choice(fit)
        case inspect.StrType():
            return text(random, min(40, (info.max_length or 40) + 1))
        case inspect.BytesType():
            return random.randbytes(random.randrange(min(200, (info.max_length or 200) + 1)))
        case inspect.VarTupleType() | inspect.ListType():
            most = min(4, info.max_length if info.max_length is not None else 4)
            count = random.randrange(most + 1) if depth < 6 else 0
            found = [made(info.item_type, random, depth + 1) for _ in range(count)]
            return found if isinstance(info, inspect.ListType) else tuple(found)
        case inspect.TupleType():
            return tuple(made(each, random, depth + 1) for each in info.item_types)
        case inspect.NamedTupleType():
            return info.cls(*(made(each.type, random, depth + 1) for each in info.fields))
        case inspect.DictType():
            return {}
        case inspect.LiteralType():
            return random.choice(info.values)
        case inspect.EnumType():
            return random.choice(list(info.cls))
        case inspect.BoolType():
            return random.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.RawType():
            return msgspec.Raw(b"\xc0")
        case inspect.CustomType():
            return info.cls(text(random))
    raise AssertionError(f"no values of {info} are made yet")
