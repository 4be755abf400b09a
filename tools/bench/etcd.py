"""A cluster of etcd on this host: real processes of Debian's etcd-server, in a folder of its own.

Interface: `with etcd_cluster(folder) as cluster`: three members that have elected a leader, with
the settings etcd comes with; only their logs are short. `members` in order; `kill` one, `restart`
it. Everything ends with the block: a member that does not end by itself is killed, and one that
outlives this process is not possible (it is told to die with its parent).
Invariants: T1 ports are free until the members have them, and no other process gets one: each is
held by a bound socket of ours that does not listen, which on Linux leaves it to whoever asks for
it by number with SO_REUSEADDR, as Go does, and to nobody who asks for any free one.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from manifold.kernel.errors import ManifoldError
from manifold.tools.bench.etcd_client import connect
from manifold.tools.bench.harness import Absent

HOST = "127.0.0.1"
MEMBERS = 3
HEALTHY_S = 30.0  # it takes 0.7 s on a quiet machine
END_S = 5.0
POLL_S = 0.02
LOG_BYTES_SHOWN = 400
PR_SET_PDEATHSIG = 1

T = TypeVar("T")


class Member:
    """One process; `port` is where clients connect."""

    def __init__(self, name: str, folder: Path, port: int, peer_port: int) -> None:
        self.name, self.folder, self.port, self.peer_port = name, folder, port, peer_port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def peer_url(self) -> str:
        return f"http://{HOST}:{self.peer_port}"

    def command(self, program: str, members: Sequence[Member], options: Sequence[str]) -> list[str]:
        client_url = f"http://{HOST}:{self.port}"
        return [
            program, "--name", self.name, "--data-dir", str(self.folder / "data"),
            "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
            "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
            "--initial-cluster", ",".join(f"{each.name}={each.peer_url}" for each in members),
            "--initial-cluster-state", "new", "--initial-cluster-token", self.folder.parent.name,
            "--logger", "zap", "--log-level", "error", *options,
        ]  # fmt: skip


class Cluster:
    """See the module."""

    def __init__(self, program: str, members: list[Member], options: Sequence[str]) -> None:
        self.members = members
        self._program, self._options = program, options

    def start(self, member: Member) -> None:
        member.folder.mkdir(exist_ok=True)
        environ = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with (member.folder / "log").open("ab") as log:
            member.process = subprocess.Popen(
                member.command(self._program, self.members, self._options),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ,
                cwd=member.folder, preexec_fn=_die_with(os.getpid()),
            )  # fmt: skip

    def kill(self, member: Member) -> None:
        """SIGKILL, and the end of the process."""
        assert member.process is not None
        member.process.kill()
        member.process.wait()

    def wait_healthy(self) -> None:
        """Until every member names the same leader."""
        _alone(self._healthy())

    async def _healthy(self) -> None:
        ends = time.monotonic() + HEALTHY_S
        while await self._leader() is None:
            for member in self.members:
                if member.process is not None and member.process.poll() is not None:
                    raise Absent(f"etcd ended with {member.process.returncode}: {_log(member)}")
            if time.monotonic() > ends:
                raise Absent(f"etcd has no leader after {HEALTHY_S:g} s: {_log(self.members[0])}")
            await asyncio.sleep(POLL_S)

    def leader(self) -> Member | None:
        """Whom all members that run hold for the leader."""
        return _alone(self._leader())

    async def _leader(self) -> Member | None:
        alive = [member for member in self.members if member.runs]
        found = await asyncio.gather(*(_status(member) for member in alive))
        told = [each for each in found if each is not None]
        leaders = {leader for _, leader in told}
        if len(told) < len(alive) or len(leaders) != 1:
            return None
        return next(
            (member for member, (own, _) in zip(alive, told, strict=True) if own in leaders), None
        )

    def close(self) -> None:
        running = [each.process for each in self.members if each.process is not None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        ends = time.monotonic() + END_S
        for process in running:
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _status(member: Member) -> tuple[int, int] | None:
    try:
        connection = await connect(HOST, member.port)
    except ManifoldError:
        return None
    try:
        return await asyncio.wait_for(connection.leader(), 1.0)
    except (ManifoldError, TimeoutError):
        return None
    finally:
        connection.close()


def _alone(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop of its own, whatever loop this thread has."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def _log(member: Member) -> str:
    text = (member.folder / "log").read_text(errors="replace")
    return text[-LOG_BYTES_SHOWN:].strip() or "it said nothing"


def _die_with(parent: int) -> Callable[[], None]:
    """In the child before it becomes etcd: end when the thread that started it ends."""
    library = ctypes.CDLL(None)

    def prepare() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Ports of this host that nobody else is given while the block lasts (T1)."""
    with ExitStack() as held:
        ports = []
        for _ in range(count):
            holder = held.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((HOST, 0))
            ports.append(holder.getsockname()[1])
        yield ports


def program() -> str:
    """Where etcd is; `Absent` where it is not."""
    found = shutil.which("etcd")
    if found is None:
        raise Absent("etcd is not here.", "Install it: apt-get install etcd-server.")
    return found


def version() -> str:
    """As it says itself."""
    done = subprocess.run([program(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.partition("\n")[0].rpartition(" ")[2]


@contextmanager
def etcd_cluster(
    folder: Path, members: int = MEMBERS, options: Sequence[str] = ()
) -> Iterator[Cluster]:
    """A cluster that has a leader; its files are in `folder`, which is the caller's."""
    found = program()
    folder.mkdir(parents=True, exist_ok=True)
    with held_ports(2 * members) as ports:
        made = [
            Member(f"m{number}", folder / f"m{number}", ports[2 * number], ports[2 * number + 1])
            for number in range(members)
        ]
        cluster = Cluster(found, made, options)
        try:
            for member in made:
                cluster.start(member)
            cluster.wait_healthy()
            yield cluster
        finally:
            cluster.close()
