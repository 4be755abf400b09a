"""Traces of jobs, received as a collector receives them: OTLP over HTTP, from every process."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from manifold.kernel import traces
from manifold.shells.sdk import Client, tracing
from manifold.tools.emulator.testing import TestCluster

otlp = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2",
    reason="the extra is missing: pip install 'manifold-os[otel]'",
)

Start = Callable[..., TestCluster]
ROOT = Path(__file__).parents[2]
COLLATZ = ROOT / "examples" / "collatz.ent"
TRAP = ROOT / "examples" / "trap.ent"
WAIT_S = 40.0


@dataclass(frozen=True)
class Span:
    """What a collector keeps of one."""

    name: str
    trace: str
    number: str
    parent: str
    service: str
    node: str
    began_ns: int
    ended_ns: int
    error: str
    attributes: dict[str, Any]
    events: tuple[str, ...]


def _values(pairs: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in pairs}


def _spans(request: Any) -> Iterator[Span]:
    for resource in request.resource_spans:
        who = _values(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
                    who["service.name"], who.get("manifold.node", ""), span.start_time_unix_nano,
                    span.end_time_unix_nano, span.status.message, _values(span.attributes),
                    tuple(event.name for event in span.events),
                )  # fmt: skip


class Collector:
    """An OTLP/HTTP receiver on a port of its own."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                request = otlp.ExportTraceServiceRequest.FromString(body)
                with collector.changed:
                    if self.path == "/v1/traces":
                        collector.spans += _spans(request)
                    collector.changed.notify_all()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                """Tests are quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def wait(self, enough: Callable[[list[Span]], bool]) -> list[Span]:
        deadline_s = time.monotonic() + WAIT_S
        with self.changed:
            while not enough(self.spans):
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, sorted((s.service, s.node, s.name) for s in self.spans)
                self.changed.wait(left_s)
            return list(self.spans)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process has sent no traces yet; the test says in the environment where they go."""
    monkeypatch.setattr(tracing, "_ours", None)
    monkeypatch.setattr(tracing, "_missing", False)
    monkeypatch.setattr(tracing, "_refused", False)
    yield monkeypatch
    if tracing._ours is not None:
        traces.flush(tracing._ours, last=True)


@pytest.fixture
def collector(fresh: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Everything that is started from now on sends its spans there."""
    found = Collector()
    fresh.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.endpoint)
    fresh.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield found
    found.close()


def of(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def until(look: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not look():
        assert time.monotonic() < deadline_s


def complete(spans: list[Span]) -> bool:
    """Whether the spans of one whole job are there: those of its runners come when they like."""
    placed = {span.number for span in of(spans, "place")}
    ran = {span.parent for span in of(spans, "run")}
    return bool(of(spans, "submit") and of(spans, "job") and placed) and placed <= ran


def test_one_job_is_one_trace_from_its_client_over_its_owner_to_its_runners(
    manifold_clusters: Start, collector: Collector
) -> None:
    cluster = manifold_clusters(3)
    with Client(cluster.name, environ=cluster.environ) as client:
        owner = client.node
        future = client.job(COLLATZ, 1, 400_000, reduce="sum")
        future.result(60)
        decisions = client.why(future.job)
    spans = collector.wait(complete)
    (submit,), (job,), (reduce,) = (of(spans, name) for name in ("submit", "job", "reduce"))
    places, runs = of(spans, "place"), of(spans, "run")
    assert {span.trace for span in spans} == {submit.trace}
    assert submit.parent == ""
    assert (submit.service, job.service) == ("manifold-client", "manifold-node")
    assert job.parent == submit.number
    assert reduce.parent == job.number
    assert {place.parent for place in places} == {job.number}
    assert {run.parent for run in runs} == {place.number for place in places}
    assert {span.node for span in (job, reduce, *places)} == {owner}
    placed = {place.number: place for place in places}
    assert len(placed) == len(places) == len(decisions)
    for run in runs:
        place = placed[run.parent]
        assert run.node == place.attributes["manifold.to"]
        assert run.attributes["manifold.shard"] == place.attributes["manifold.shard"]
    assert len({run.node for run in runs}) > 1
    for span in spans:
        assert span.attributes["manifold.job"] == future.job
        assert span.began_ns <= span.ended_ns
        assert not span.error
    assert job.attributes["manifold.state"] == submit.attributes["manifold.state"] == "done"
    assert submit.began_ns <= job.began_ns <= reduce.began_ns <= job.ended_ns


def test_commands_and_the_nodes_they_start_send_their_spans(
    manifold_environment: dict[str, str], collector: Collector, tmp_path: Path
) -> None:
    environment = manifold_environment | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "60000",
    }  # fmt: skip

    def manifold(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "manifold", *arguments], env=environment, cwd=tmp_path,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    manifold("up", "--nodes", "2", "--detach")
    try:
        assert manifold("run", str(COLLATZ), "--range", "1:10", "--reduce", "max") == "19\n"
        (submit,) = collector.wait(lambda found: bool(of(found, "submit")))  # it has left by now
    finally:
        manifold("down", "--yes")
    spans = collector.wait(complete)  # what nodes had not sent yet they send before they end
    assert {span.trace for span in spans} == {submit.trace}
    assert {span.service for span in spans} == {"manifold-client", "manifold-node"}


def test_calls_are_traced_beneath_the_span_that_the_program_is_in(
    manifold_clusters: Start, collector: Collector
) -> None:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    cluster = manifold_clusters(2)
    outer = SpanContext(0xABC, 0xDEF, False, TraceFlags(TraceFlags.SAMPLED))
    with (
        Client(cluster.name, environ=cluster.environ) as client,
        trace.use_span(NonRecordingSpan(outer)),
    ):
        assert client.map(abs, [-1, -2]) == [1, 2]
    spans = collector.wait(complete)
    assert {int(span.trace, 16) for span in spans} == {0xABC}
    assert {int(span.parent, 16) for span in of(spans, "submit")} == {0xDEF}
    assert {span.attributes["manifold.kind"] for span in of(spans, "run")} == {"python"}


def test_what_failed_is_marked_with_why(manifold_clusters: Start, collector: Collector) -> None:
    cluster = manifold_clusters(2)
    with Client(cluster.name, environ=cluster.environ) as client:
        future = client.job(TRAP, 0, 1000)
        assert future.exception(60) is not None
    spans = collector.wait(lambda found: bool(of(found, "submit") and of(found, "job")))
    (submit,), (job,) = of(spans, "submit"), of(spans, "job")
    assert "division by zero" in submit.error
    assert job.error
    assert "trapped" in job.events
    faults = collector.wait(lambda found: any(run.error for run in of(found, "run")))
    assert any("division by zero" in run.error for run in of(faults, "run"))


def test_a_job_that_goes_on_without_its_client_is_no_failure_of_its_client(
    manifold_clusters: Start, collector: Collector
) -> None:
    cluster = manifold_clusters(1)
    with Client(cluster.name, environ=cluster.environ) as client:
        future = client.job(COLLATZ, 1, 1_500_000, reduce="sum", detach=True)
        until(lambda: future.status is not None)
    spans = collector.wait(lambda found: bool(of(found, "submit") and of(found, "job")))
    (submit,), (job,) = of(spans, "submit"), of(spans, "job")
    assert (submit.attributes["manifold.state"], submit.error) == ("detached", "")
    assert job.attributes["manifold.state"] == "done"
    assert job.parent == submit.number


def test_a_job_whose_owner_dies_goes_on_in_the_same_trace(
    manifold_clusters: Start, collector: Collector
) -> None:
    cluster = manifold_clusters(5)
    with Client(cluster.name, environ=cluster.environ) as client:
        owner = client.node
        slow = ".cells 1\nSLEEP 0.01\nLOAD 0\nEMIT\nHALT\n"
        future = client.job(slow, 0, 3000, reduce="sum")
        until(lambda: future.status is not None and future.status.done > 0)
        cluster.kill(owner)
        assert future.result(90) == 3000 * 2999 // 2
    spans = collector.wait(
        lambda found: any(job.attributes["manifold.job"] == future.job for job in of(found, "job"))
    )
    (submit,) = of(spans, "submit")
    later = [job for job in of(spans, "job") if job.parent == submit.number]
    assert later
    assert {job.trace for job in later} == {submit.trace}


def test_a_collector_that_is_not_there_costs_no_job_and_little_time(
    manifold_clusters: Start, fresh: pytest.MonkeyPatch
) -> None:
    fresh.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody
    cluster = manifold_clusters(2)
    with Client(cluster.name, environ=cluster.environ) as client:
        assert client.parallel_for(COLLATZ, 1, 10_000, reduce="max") == 261
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 8  # the SDK itself would try for ten seconds
    assert [cluster.supervisor.nodes[alias].restarts for alias in cluster.aliases] == [0, 0]


class Traced:
    """A submission whose span nobody keeps."""

    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"

    def end(self, state: str, why: str = "") -> None:
        assert state == "done"


def test_settings_that_opentelemetry_refuses_cost_no_job(
    manifold_clusters: Start, fresh: pytest.MonkeyPatch
) -> None:
    fresh.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    fresh.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    cluster = manifold_clusters(1)
    (alias,) = cluster.aliases
    with Client(cluster.name, environ=cluster.environ) as client:
        assert client.parallel_for(COLLATZ, 1, 10, reduce="max") == 19
        # As of a client whose settings are right:
        fresh.setattr(tracing, "begin", lambda *_: Traced())
        assert client.parallel_for(COLLATZ, 1, 10, reduce="max") == 19
        assert client.log(alias, contains="OpenTelemetry refuses its settings").lines
    assert cluster.supervisor.nodes[alias].restarts == 0


def test_a_variable_that_the_sdk_refuses_as_it_is_imported_costs_a_sentence_and_no_more(
    manifold_environment: dict[str, str], tmp_path: Path
) -> None:
    environment = manifold_environment | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "-3"
    }  # fmt: skip

    def manifold(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "manifold", *arguments], env=environment | variables,
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    job = ("run", str(COLLATZ), "--range", "1:10", "--reduce", "max")
    up = manifold("up", "--nodes", "1", "--detach")
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        refused = manifold(*job)
        assert (refused.returncode, refused.stdout) == (0, "19\n")
        why, job_line = refused.stderr.splitlines()
        assert re.match("no traces: OpenTelemetry refuses its settings: .*COUNT_LIMIT", why)
        assert job_line.startswith("J-")
        # A client whose settings are right is traced as far as it goes.
        assert manifold(*job, OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT="9").stdout == "19\n"
        said = manifold("logs", "--grep", "no traces").stdout
        assert said.count("OpenTelemetry refuses its settings") == 1
    finally:
        assert manifold("down", "--yes").returncode == 0


def test_a_collector_that_refuses_is_one_sentence_on_the_users_terminal(
    manifold_clusters: Start, fresh: pytest.MonkeyPatch
) -> None:
    fresh.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    cluster = manifold_clusters(1)
    script = (
        "import manifold, urllib3\n"
        "with manifold.connect() as m:\n"
        "    for _ in range(3):\n"
        f"        m.parallel_for({str(COLLATZ)!r}, 1, 10, reduce='max')\n"
        "        from manifold.shells.sdk import tracing\n"
        "        tracing.flush()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        env=dict(cluster.environ) | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "10",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"traces: .*\(said once\)\n", done.stderr)


@pytest.mark.parametrize("thread", ["OtelBatchSpanRecordProcessor", "MainThread"])
def test_what_the_program_logs_by_way_of_the_same_library_is_its_own(thread: str) -> None:
    script = (
        "import logging, threading, manifold.kernel.otel\n"
        "def warn(): logging.getLogger('urllib3.connectionpool').warning('refused')\n"
        "for _ in range(2):\n"
        f"    thread = threading.Thread(target=warn, name={thread!r})\n"
        "    thread.start(); thread.join()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    ours = "traces: refused (said once)\n"
    assert done.stderr == ("refused\n" * 2 if thread == "MainThread" else ours)


def test_a_provider_that_the_program_names_and_lacks_costs_no_job(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(1)
    script = (
        "import manifold, opentelemetry.trace\n"
        "with manifold.connect() as m:\n"
        f"    print(m.parallel_for({str(COLLATZ)!r}, 1, 10, reduce='max'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        env=dict(cluster.environ) | {"OTEL_PYTHON_TRACER_PROVIDER": "nobody"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "19\n"), done.stderr
    assert "OpenTelemetry refuses its settings" in done.stderr


def test_nothing_is_imported_where_nobody_wants_traces(
    manifold_clusters: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    cluster = manifold_clusters(1)
    script = (
        "import sys, manifold\n"
        f"with manifold.connect() as m: m.parallel_for({str(COLLATZ)!r}, 1, 10, reduce='max')\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=dict(cluster.environ), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    maps = Path(f"/proc/{cluster.pid(cluster.aliases[0])}/maps").read_text()
    assert "google/_upb" not in maps  # protobuf's library, which the exporter needs
