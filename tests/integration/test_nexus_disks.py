"""Voters whose disk is full, read-only, damaged or torn, or whose clock goes back a day.

Each time the same must hold: the voter says what is wrong, gives no wrong answer, and the rest of
the cluster goes on. Disks are filled and made read-only by mounting a small one where that is
allowed, and by limits that need no privilege.
"""

from __future__ import annotations

import ast
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest

from manifold.kernel import nexus, places
from manifold.kernel.config import load
from manifold.kernel.errors import ManifoldError
from manifold.kernel.nexus import storage
from manifold.kernel.nexus import storage_frames as frames
from manifold.kernel.nexus.messages import (
    CONFIG_KEY,
    KEY_PREFIX,
    Acquire,
    Answer,
    ClientChange,
    Operate,
)
from manifold.kernel.nexus.values import Add, Get, Lease, Put
from manifold.shells.sdk.client import Client
from manifold.tools.emulator.testing import TestCluster

PATIENCE_S = 30.0
FAST = {
    "membership.probe": "100ms", "membership.ack": "50ms", "membership.gossip": "50ms",
    "nexus.voters": "3",
}  # fmt: skip
CLASSES = "classes:\n  n: {count: 3, cores: 1, memory: 512MiB, latency: 0ms}\n"
DAY_S = 86_400
BIG = 60_000


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


class Place:
    """Three nodes, all of which vote; they can be taken down, and come back with their disks."""

    def __init__(self, environ: dict[str, str], config: Path) -> None:
        self.environ, self.config = environ, config
        self.name = environ["MANIFOLD_CLUSTER"]
        self.cluster: TestCluster | None = None
        self.operations = 0

    def up(self, *, converge: bool = True) -> TestCluster:
        assert self.cluster is None, "it is up"
        self.cluster = TestCluster(
            3, self.environ, overrides=FAST, config=self.config, converge=converge
        )
        return self.cluster

    def down(self) -> None:
        if self.cluster is not None:
            self.cluster.close()
        self.cluster = None

    def aliases(self) -> list[str]:
        """Also while it is down."""
        return sorted(alias for alias, _ in load(self.config, {}, FAST).spread(3))

    def folder(self, alias: str) -> Path:
        return places.state_dir(self.name, alias, self.environ) / "nexus"

    def log(self, alias: str) -> str:
        assert self.cluster is not None, "it is up"
        return self.cluster.logs(alias)

    def operate(self, client: Client, key: str, change: ClientChange, ms: float = 3000.0) -> Answer:
        self.operations += 1
        answer = client.ask(Operate(f"{client.node}.{self.operations}", key, change, ms))
        assert isinstance(answer, Answer)
        return answer

    def done(self, client: Client, key: str, change: ClientChange) -> Answer:
        """It succeeds, sooner or later; refused and unavailable ones are asked again."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self.operate(client, key, change)
                if answer.status == "ok":
                    return answer
                said = answer.status
            except ManifoldError as error:
                said = str(error)
            assert time.monotonic() < deadline_s, f"{key} {change}: {said}"
            time.sleep(0.05)


@pytest.fixture
def place(manifold_environment: dict[str, str], tmp_path: Path) -> Iterator[Place]:
    config = tmp_path / "manifold.yaml"
    config.write_text(CLASSES)
    found = Place(manifold_environment, config)
    yield found
    found.down()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of its own at `folder`; a skip, which says so, where mounting is not allowed."""
    folder.mkdir(parents=True, mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        print(f"not shown here, mounting is not allowed: {done.stderr if done else 'not root'}")
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def write_all(place: Place, client: Client, count: int, first: int = 0) -> dict[str, bytes]:
    """Large values, each acknowledged."""
    written = {}
    for number in range(first, first + count):
        value = b"%d " % number + os.urandom(8) + b"x" * BIG
        place.done(client, f"globals/big/{number % 12}", Put(value))
        written[f"globals/big/{number % 12}"] = value
    return written


def check_all(place: Place, client: Client, written: dict[str, bytes]) -> None:
    for key, value in written.items():
        assert place.done(client, key, Get()).data == value


# -- full -----------------------------------------------------------------------------------------


def a_full_disk_is_survived(place: Place, alias: str, says: str, free: Callable[[], None]) -> None:
    """Writes go on without that voter, which says why it stops; once there is room it votes."""
    cluster = place.cluster
    assert cluster is not None
    client = cluster.client(next(each for each in cluster.aliases if each != alias))
    written = write_all(place, client, 30)
    until(lambda: says in place.log(alias), f"{alias} says {says!r}", 5.0)
    assert "nexus: this voter stops" in place.log(alias)
    written |= write_all(place, client, 6, 30)
    own = cluster.client(alias)  # the node itself goes on, without its vote
    check_all(place, own, written)
    assert place.done(own, "globals/count", Add(1)).data == 1
    free()
    cluster.kill(alias)
    other = next(each for each in cluster.aliases if each not in (alias, client.node))
    until(lambda: any(f"{alias} is back" in line for line in cluster.events), "it is back")
    cluster.pause(other)  # now its vote is needed
    check_all(place, client, written)
    assert place.done(client, "globals/count", Add(1)).data == 2
    cluster.resume(other)


def test_a_full_disk_stops_one_voter_and_nobody_else(place: Place) -> None:
    with ExitStack() as stack:
        alias = place.aliases()[1]
        folder = place.folder(alias)
        stack.enter_context(small_disk(folder, "400k"))
        stack.callback(place.down)  # before its disk goes
        place.up()
        a_full_disk_is_survived(
            place, alias, "No space left on device", lambda: remount(folder, "size=64m")
        )


def test_a_file_that_may_not_grow_stops_one_voter_and_nobody_else(place: Place) -> None:
    """The same without privileges: a limit of the process on the size of its files."""
    cluster = place.up()
    alias = cluster.aliases[2]
    limit = 400_000
    resource.prlimit(cluster.pid(alias), resource.RLIMIT_FSIZE, (limit, limit))
    a_full_disk_is_survived(place, alias, "File too large", lambda: None)


# -- read-only ------------------------------------------------------------------------------------


def read_only(folder: Path, stack: ExitStack) -> Callable[[], None]:
    """Make the folder read-only; what makes it writable again."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
        (folder / storage.FILE).chmod(0o400)
        stack.callback(folder.chmod, 0o700)
        return lambda: (folder.chmod(0o700), (folder / storage.FILE).chmod(0o600), None)[2]
    kept = folder.with_name("kept")
    folder.rename(kept)
    stack.enter_context(small_disk(folder, "16m"))
    for each in kept.iterdir():
        shutil.copy2(each, folder)
    remount(folder, "ro")
    return lambda: remount(folder, "rw")


def test_a_read_only_disk_is_named_and_the_others_go_on(place: Place) -> None:
    with ExitStack() as stack:
        cluster = place.up()
        first, second, third = cluster.aliases
        written = write_all(place, cluster.client(first), 3)
        place.down()
        writable = read_only(place.folder(third), stack)
        stack.callback(place.down)
        cluster = place.up(converge=False)
        until(lambda: any("does not come up" in line for line in cluster.events), "it says so")
        said = next(line for line in cluster.events if "does not come up" in line)
        assert third in said
        said += place.log(third)
        assert "Read-only file system" in said or "Permission denied" in said, said
        client = cluster.client(second)
        check_all(place, client, written)
        written |= write_all(place, client, 3, 3)
        writable()
        until(lambda: cluster.supervisor.nodes[third].ready is not None, "it comes up by itself")
        cluster.pause(first)
        check_all(place, client, written)
        cluster.resume(first)


# -- damaged --------------------------------------------------------------------------------------


def test_damage_in_the_middle_makes_a_voter_that_knows_nothing_and_does_not_vote(
    place: Place,
) -> None:
    cluster = place.up()
    first, second, third = cluster.aliases
    client = cluster.client(first)
    written = write_all(place, client, 4)
    place.done(client, "globals/count", Add(1))
    before = place.done(client, CONFIG_KEY, Get())
    place.down()

    path = place.folder(third) / storage.FILE
    data = bytearray(path.read_bytes())
    data[frames.scan(bytes(data)).end // 2] ^= 1
    path.write_bytes(data)
    report = storage.verify(place.folder(third))
    assert not report.sound
    assert "rejoin" in str(report) or "join again" in str(report)

    cluster = place.up(converge=False)
    cluster.pause(second)  # one voter that remembers and one that does not are no majority
    until(lambda: "joins the voters anew" in place.log(third), "it says what it has lost")
    assert "damaged" in place.log(third)
    until(lambda: any(place.folder(third).parent.glob("nexus.damaged-*")), "it is put aside")
    until(lambda: cluster.supervisor.nodes[first].ready is not None, f"{first} is up")
    client = cluster.client(first)
    assert place.operate(client, "globals/count", Add(1), 1500.0).status in ("unavailable", "maybe")
    assert place.operate(client, "globals/big/0", Get(), 1500.0).status == "unavailable"
    cluster.resume(second)
    check_all(place, client, written)
    assert place.done(client, "globals/count", Get()).data in (1, 2)

    until(lambda: "votes again, with a new disk" in place.log(third), "it joins by itself")
    after = place.done(client, CONFIG_KEY, Get())
    assert after.version > before.version
    cluster.pause(second)  # now it votes, and has learnt everything again
    check_all(place, client, written)
    place.done(client, "globals/count", Add(1))
    cluster.resume(second)


def test_a_torn_tail_is_dropped_and_nothing_acknowledged_is_lost(place: Place) -> None:
    cluster = place.up()
    alias = cluster.aliases[1]
    client = cluster.client(alias)
    written = write_all(place, client, 4)
    place.done(client, "globals/count", Add(7))
    place.down()

    path = place.folder(alias) / storage.FILE
    data = path.read_bytes()
    found = frames.scan(data)
    name = f"{KEY_PREFIX}globals/count".encode()
    assert name in found.records
    forged = frames.encode([(name, None), (b"x.k.globals/torn", b"y" * 3000)])
    batch = frames.frame(frames.BATCH, found.number, forged, found.salt)
    path.write_bytes(data[: found.end] + batch[:-700] + bytes(5000))
    report = storage.verify(path.parent)
    assert report.sound
    assert report.torn_bytes == len(batch) - 700

    cluster = place.up()
    assert "torn bytes end it" in place.log(alias)
    client = cluster.client(alias)
    cluster.pause(cluster.aliases[0])  # its vote counts
    check_all(place, client, written)
    assert place.done(client, "globals/count", Get()).data == 7
    cluster.resume(cluster.aliases[0])


# -- a clock that goes back -----------------------------------------------------------------------

SHIFTED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>
#include <stdlib.h>
#include <sys/time.h>
static int back(void) { char *p = getenv("BACK_FILE"); return p && access(p, F_OK) == 0; }
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(id, t);
    if (id == CLOCK_REALTIME && back()) t->tv_sec -= 86400;
    return done;
}
time_t time(time_t *out) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
int gettimeofday(struct timeval *v, void *zone) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    v->tv_sec = t.tv_sec; v->tv_usec = t.tv_nsec / 1000;
    return 0;
}
"""


def test_a_clock_set_back_a_day_upsets_neither_leases_nor_timeouts(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every node's wall clock is, while they run; what they log shows it."""
    compiler = shutil.which("cc")
    if compiler is None:
        print("not shown here: no C compiler, which the shifted clock needs")
        pytest.skip("no C compiler")
    (tmp_path / "back.c").write_text(SHIFTED)
    library = tmp_path / "back.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, tmp_path / "back.c", "-ldl"], check=True
    )
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("BACK_FILE", str(tmp_path / "back"))
    cluster = place.up()
    holder, other, third = cluster.aliases
    here, there = cluster.client(holder), cluster.client(other)
    held = here.ask(Acquire("leases/one", "one", 1500.0))
    assert held.status == "ok"
    place.done(here, "globals/count", Add(1))

    (tmp_path / "back").touch()  # a day goes back, everywhere at once
    cluster.kill(third)
    until(lambda: "boot 2" in place.log(third), "it starts again, with the day before")
    log = place.log(third).splitlines()
    first, last = (next(line for line in log if f"boot {boot} of" in line) for boot in (1, 2))
    assert last[:10] < first[:10], "the wall clock has gone back in the nodes"

    began_s = time.monotonic()
    answer = there.ask(Acquire("leases/one", "two", 1500.0, 4000.0))
    assert answer.status != "ok", "the holder has renewed it all the time"
    assert time.monotonic() - began_s < 8.0
    assert place.done(there, "globals/count", Add(1)).data == 2
    lease = place.done(there, "leases/one", Get()).data
    assert isinstance(lease, Lease)
    assert lease.holder == "one"

    cluster.pause(third)
    cluster.pause(holder)
    began_s = time.monotonic()
    assert place.operate(there, "globals/count", Add(1), 1000.0).status in ("unavailable", "maybe")
    assert 0.5 < time.monotonic() - began_s < 5.0, "a timeout is what it says"
    cluster.resume(third)
    answer = there.ask(Acquire("leases/one", "two", 1500.0, 8000.0))
    assert answer.status == "ok", "who does not renew it loses it after its time"
    assert answer.fence is not None
    assert held.fence is not None
    assert msgspec.to_builtins(answer.fence) > msgspec.to_builtins(held.fence)
    cluster.resume(holder)


def test_nothing_in_nexus_asks_what_time_of_day_it_is() -> None:
    """Its time is an argument, and its driver's is the loop's, which is monotonic."""
    folder = Path(nexus.__file__).parent
    allowed = ("self.loop.time", "time.perf_counter", "time.monotonic")
    wall = {"time_ns", "now", "utcnow", "today", "fromtimestamp", "CLOCK_REALTIME"}
    for path in [*folder.glob("*.py"), folder.parent / "node.py", folder.parent / "core.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            here = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                of_time = ast.unparse(node.value) == "time" or node.attr == "time"
                assert node.attr not in wall, here
                assert not of_time or ast.unparse(node) in allowed, here
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                assert "datetime" not in names, here
                assert getattr(node, "module", "") not in ("time", "datetime"), here
