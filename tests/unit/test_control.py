"""The control socket of a supervisor: any bytes get an answer, and none of them stops it."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel import places
from manifold.kernel.errors import Maybe, NoCluster, NotFound, PeerError
from manifold.kernel.hyperbus.messages import Failure
from manifold.tools.emulator import control
from manifold.tools.emulator import messages as m

PATIENCE_S = 20.0
CLUSTER = "c"


class Recorder:
    """Does nothing, and says what was asked."""

    def __init__(self) -> None:
        self.asked: list[m.Request] = []
        self.waits = asyncio.Event()
        self.begun = threading.Event()

    async def carry_out(self, request: m.Request) -> m.Changed:
        self.asked.append(request)
        match request:
            case m.StartNode():
                raise NotFound("There is no such node.", "Look.")
            case m.ResumeNode():
                self.begun.set()
                await self.waits.wait()
        return m.Changed(("rpi4-01",), 7)


class Place:
    """A control that is served on a thread, and how to reach it."""

    def __init__(self, folder: Path) -> None:
        self.environ = {"MANIFOLD_STATE_HOME": f"{folder}/s", "MANIFOLD_RUNTIME_DIR": f"{folder}/r"}
        places.runtime_dir(CLUSTER, self.environ)
        self.path = control.socket_path(CLUSTER, self.environ)
        self.recorder = Recorder()
        self.loop = asyncio.new_event_loop()
        self.control = control.Control(self.recorder, self.path)
        self.loop.run_until_complete(self.control.serve())
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def ask(self, request: m.Request) -> m.Changed:
        return control.ask(CLUSTER, self.environ, request)

    def raw(self, data: bytes) -> bytes:
        """Send bytes and nothing more; everything that comes back."""
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(PATIENCE_S)
            end.connect(str(self.path))
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)
            found = b""
            while more := end.recv(65_536):
                found += more
            return found

    def close(self) -> None:
        async def end() -> None:
            self.control.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(PATIENCE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="mf-") as folder:
        here = Place(Path(folder))
        yield here
        here.close()


def failure(answer: bytes) -> Failure:
    (size,) = control.LENGTH.unpack(answer[:4])
    assert len(answer) == 4 + size
    return msgspec.msgpack.decode(answer[4:], type=Failure)


def test_a_request_is_carried_out_and_answered(place: Place) -> None:
    wish = m.RemoveNodes(("rpi4-01", "rpi4-02"), True)
    assert place.ask(wish) == m.Changed(("rpi4-01",), 7)
    assert place.recorder.asked[-1] == wish


def test_what_is_refused_is_raised_where_it_was_asked(place: Place) -> None:
    with pytest.raises(NotFound, match="no such node"):
        place.ask(m.StartNode("rpi4-01"))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_get_a_failure_and_the_next_request_is_served(place: Place, data: bytes) -> None:
    framed = control.LENGTH.pack(len(data)) + data
    try:
        control.decoded(data)
    except PeerError:
        assert failure(place.raw(framed)).code == "peer"
    assert failure(place.raw(data[:3])).code == "peer"
    assert place.ask(m.AddNodes()).nodes == 7


def test_a_request_that_is_too_large_is_not_read(place: Place) -> None:
    answer = failure(place.raw(control.LENGTH.pack(control.REQUEST_BYTES_MAX + 1)))
    assert "at most" in answer.message


@given(st.sampled_from([m.AddNodes("", 0), m.AddNodes("x" * 25), m.RemoveNodes(()),
                        m.SlowNode("a", 0.0), m.SlowNode("a", 2.0), m.KillNode("")]))  # fmt: skip
def test_what_is_out_of_bounds_does_not_decode(request: m.Request) -> None:
    with pytest.raises(PeerError):
        control.decoded(msgspec.msgpack.encode(request))


def test_what_was_begun_goes_on_when_nobody_waits_for_it(place: Place) -> None:
    place.recorder.begun.clear()
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(place.path))
        end.sendall(control.framed(m.ResumeNode("rpi4-01")))
        assert place.recorder.begun.wait(PATIENCE_S)
    place.loop.call_soon_threadsafe(place.recorder.waits.set)
    assert place.ask(m.AddNodes()).nodes == 7


def test_where_nobody_supervises_that_is_said(tmp_path: Path) -> None:
    environ = {"MANIFOLD_STATE_HOME": f"{tmp_path}/s", "MANIFOLD_RUNTIME_DIR": "/tmp/mf-nobody"}
    with pytest.raises(NoCluster, match="Nobody supervises"):
        control.ask(CLUSTER, environ, m.AddNodes())


def test_a_supervisor_that_ends_before_it_answers_leaves_doubt() -> None:
    with tempfile.TemporaryDirectory(prefix="mf-") as folder:
        here = Place(Path(folder))
        found: list[BaseException] = []

        def ask() -> None:
            try:
                here.ask(m.ResumeNode("rpi4-01"))
            except Maybe as error:
                found.append(error)

        asker = threading.Thread(target=ask)
        asker.start()
        assert here.recorder.begun.wait(PATIENCE_S)
        here.close()
        asker.join(PATIENCE_S)
        assert len(found) == 1
        assert not os.path.exists(here.path)
