"""A cluster that is looked at: metrics over the bus and over HTTP, Prometheus, profiles."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from manifold.kernel.errors import Busy, ManifoldError, Unavailable
from manifold.kernel.observe.families import DEFINITIONS
from manifold.kernel.observe.messages import NODE_TEXT_BYTES, Metrics
from manifold.shells.sdk import Client
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
ROOT = Path(__file__).parents[2]
COLLATZ = ROOT / "examples" / "collatz.ent"
WAIT_S = 30.0
# A host that lacks it leaves this one out, and nothing else.
OPTIONAL = {"manifold_process_storage_written_bytes"}


def eventually(look: Callable[[], Any], what: str) -> Any:
    """What `look` returns, once it is true."""
    deadline_s = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < deadline_s, what
    return found


def manifold(cluster: TestCluster, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "manifold", *arguments], env=dict(cluster.environ), cwd=folder,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fetched(address: str, path: str = "/metrics", accept: str = "") -> tuple[str, str]:
    """Content type and body."""
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", path, headers={"Accept": accept} if accept else {})
    answer = connection.getresponse()
    assert answer.status == 200
    body = answer.read().decode()
    connection.close()
    return answer.headers["Content-Type"], body


def value(found: Metrics, name: str, **labels: str) -> float:
    """One sample of a node's families."""
    (sample,) = [
        sample
        for family in found.families
        for sample in family.samples
        if family.sample_name(sample) == name and dict(sample.labels) == labels
    ]
    return sample.value


def test_a_node_tells_every_metric_of_the_table(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    found = client.metrics("", "families")
    names = [family.name for family in found.families]
    assert set(DEFINITIONS) - set(names) <= OPTIONAL
    assert names == [name for name in DEFINITIONS if name in names]
    assert value(found, "manifold_members", state="alive") == 2
    assert value(found, "manifold_process_open_fds") > 10
    assert value(found, "manifold_process_cpu_seconds_total") > 0
    assert value(found, "manifold_process_resident_memory_bytes") > 1 << 20


def test_what_a_job_does_can_be_counted(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(2)
    client = cluster.client()
    future = client.job(COLLATZ, 1, 300_000, reduce="sum")
    future.result(60)
    shards = future.status.shards

    def counted() -> bool:
        owner = client.metrics("", "families")
        return value(owner, "manifold_scheduler_jobs_ended_total", state="done") == 1

    eventually(counted, "the end of the job was not counted")
    owner = client.metrics("", "families")
    assert value(owner, "manifold_scheduler_jobs_submitted_total") == 1
    assert value(owner, "manifold_scheduler_jobs_running") == 0
    assert value(owner, "manifold_scheduler_jobs_kept") == 1
    # A shard that found no room at first is assigned once more.
    assert value(owner, "manifold_scheduler_shards_total") >= shards - 1 > 0
    everywhere = [client.metrics(alias, "families") for alias in cluster.aliases]
    assert sum(value(each, "manifold_scheduler_runs_total") for each in everywhere) > 0
    assert sum(value(each, "manifold_workers", kind="program") for each in everywhere) > 0


def test_every_node_answers_over_http_and_over_the_bus_alike(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    cluster = manifold_clusters(3)
    targets = json.loads(manifold(cluster, tmp_path, "metrics", "--targets"))
    assert [each["labels"]["node"] for each in targets] == cluster.aliases
    addresses = {each["labels"]["node"]: each["targets"][0] for each in targets}
    assert len(set(addresses.values())) == 3
    for alias, address in addresses.items():
        content_type, text = fetched(address)
        assert content_type == "text/plain; version=0.0.4; charset=utf-8"
        assert f'alias="{alias}"' in text
        names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
        over_bus = manifold(cluster, tmp_path, "metrics", alias)
        assert re.findall(r"^# TYPE (\S+)", over_bus, re.MULTILINE) == names
        said = json.loads(manifold(cluster, tmp_path, "metrics", alias, "--json"))
        assert (said["node"], said["address"], len(said["metrics"])) == (alias, address, len(names))
        assert len(text.encode()) <= NODE_TEXT_BYTES
        content_type, text = fetched(address, accept="application/openmetrics-text")
        assert len(text.encode()) <= NODE_TEXT_BYTES
        assert content_type.startswith("application/openmetrics-text; version=1.0.0")
        assert text.endswith("\n# EOF\n")
        assert json.loads(fetched(address, "/healthz")[1])["node"] == alias


def test_targets_are_written_whole_and_have_bounded_labels(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    cluster = manifold_clusters(1)
    assert manifold(cluster, tmp_path, "metrics", "--targets", "-o", "targets.json") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["targets.json"]
    (found,) = json.loads((tmp_path / "targets.json").read_text())
    labels = found["labels"]
    assert set(labels) == {"node", "class", "kid", "cluster"}
    assert (labels["node"], labels["class"]) == ("rpi4-01", "rpi4")
    assert re.fullmatch(r"K-[0-9a-f]{8}", labels["kid"])
    assert labels["cluster"] == cluster.name


def test_a_node_that_is_started_again_serves_from_its_first_moment(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    cluster = manifold_clusters(2)
    client = cluster.client(cluster.aliases[0])
    other = next(alias for alias in cluster.aliases if alias != client.node)
    before = client.metrics(other, "families")
    cluster.kill(other)

    def back() -> Metrics | None:
        nodes = {node.alias: node for node in client.nodes()}
        again = nodes[other].boot > 1 and nodes[other].state == "ready" and nodes[other].pid
        return client.metrics(other, "families") if again else None

    after: Metrics = eventually(back, "the node did not come back")
    assert value(before, "manifold_node_boots_total") == 1
    assert value(after, "manifold_node_boots_total") == 2
    assert f'alias="{other}"' in fetched(after.address)[1]


def test_http_can_be_off_and_the_bus_still_tells(manifold_clusters: Start, tmp_path: Path) -> None:
    cluster = manifold_clusters(1, overrides={"metrics.http": "off"})
    found = cluster.client().metrics()
    assert found.address == ""
    assert "manifold_node_info" in found.text
    assert json.loads(manifold(cluster, tmp_path, "metrics", "--targets")) == []


def test_nodes_share_a_range_of_ports_and_go_on_where_none_is_free(
    manifold_clusters: Start,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster = manifold_clusters(3, overrides={"metrics.port": str(port)})
        ports = [int(node.metrics.rpartition(":")[2]) for node in cluster.client().nodes()]
    assert len(set(ports)) == 3
    assert all(port < each < port + 256 for each in ports)


def test_who_asks_too_often_is_given_what_was_gathered_just_before(
    manifold_clusters: Start,
) -> None:
    address = manifold_clusters(1).client().metrics().address

    def uptime() -> str:
        found = re.search(
            r"^manifold_node_uptime_seconds (\S+)$", fetched(address)[1], re.MULTILINE
        )
        assert found
        return found[1]

    first = uptime()
    eventually(lambda: uptime() == uptime(), "it is gathered anew each time")
    eventually(lambda: uptime() != first, "it is never gathered again")


def test_hostile_requests_to_a_real_node_end_nothing(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(1)
    client = cluster.client()
    (alias,) = cluster.aliases
    pid, address = cluster.pid(alias), client.metrics().address
    host, _, port = address.partition(":")
    with contextlib.ExitStack() as stack:
        for at in range(60):
            connection = stack.enter_context(socket.create_connection((host, int(port)), 10))
            with contextlib.suppress(OSError):
                connection.sendall(os.urandom(64) * at + b"\r\n\r\n" * (at % 2))
        assert "manifold_node_info" in fetched(address)[1]
    assert cluster.pid(alias) == pid
    found = client.metrics("", "families")
    assert value(found, "manifold_log_messages_total", level="critical") == 0
    assert value(found, "manifold_process_open_fds") < 200


def test_a_node_without_a_descriptor_left_tells_what_it_can_and_lives(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(1)
    client = cluster.client()
    (alias,) = cluster.aliases
    pid, address = cluster.pid(alias), client.metrics().address
    host, _, port = address.partition(":")

    with socket.create_connection((host, int(port)), 10) as connection:

        def taken() -> bool:
            own = connection.getsockname()
            return own in [each.raddr for each in psutil.Process(pid).net_connections("tcp4")]

        eventually(taken, "the connection is not taken")
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with connection.makefile("rb") as answer:
            text = answer.read().decode()
        names = {family.name for family in client.metrics("", "families").families}
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    for needs_none in ("manifold_node", "manifold_process_max_fds", "manifold_workers"):
        assert f"# TYPE {needs_none}" in text
        assert needs_none in names
    assert "manifold_process_max_fds 3\n" in text
    assert "manifold_process_open_fds" not in text
    assert "manifold_process_open_fds" not in names
    assert value(client.metrics("", "families"), "manifold_process_open_fds") > 10
    assert cluster.pid(alias) == pid


# -- Prometheus -----------------------------------------------------------------------------------


class Prometheus:
    """Debian's, on a port of its own, scraping what a file names."""

    def __init__(self, folder: Path) -> None:
        config = (ROOT / "tools/observe/prometheus.yaml").read_text()
        config = config.replace("scrape_interval: 5s", "scrape_interval: 500ms")
        assert "500ms" in config
        (folder / "prometheus.yaml").write_text(config)
        shutil.copy(ROOT / "tools/observe/alerts.yaml", folder)
        self.log = folder / "prometheus.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus", f"--config.file={folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0",
                ],
                stderr=log, stdout=log, cwd=folder,
            )  # fmt: skip

    @property
    def address(self) -> str:
        """Where it listens, once it says so."""

        def said() -> str:
            assert self.process.poll() is None, self.log.read_text()
            found = re.search(r'"Listening on" address=(\S+)', self.log.read_text())
            return found[1] if found else ""

        address: str = eventually(said, "Prometheus does not listen")
        return address

    def ask(self, path: str, **arguments: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found = json.loads(answer.read())
        assert found["status"] == "success", found
        return found["data"]

    def query(self, expression: str) -> dict[str, float]:
        """The value of each node."""
        result = self.ask("query", query=expression)["result"]
        return {row["metric"].get("node", ""): float(row["value"][1]) for row in result}

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is missing: apt-get install prometheus")
    server = Prometheus(tmp_path)
    yield server
    server.close()


def dashboard_queries() -> list[str]:
    """Of every panel, with all nodes chosen."""
    dashboard = json.loads((ROOT / "tools/observe/grafana-dashboard.json").read_text())
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            text = re.sub(r"\$(cluster|class|node)", ".*", target["expr"])
            found.append(text.replace("$__rate_interval", "4s"))
    return found


def test_prometheus_scrapes_every_node_and_every_query_of_the_dashboard_answers(
    manifold_clusters: Start, prometheus: Prometheus, tmp_path: Path
) -> None:
    cluster = manifold_clusters(3)
    manifold(cluster, tmp_path, "metrics", "--targets", "-o", str(tmp_path / "targets.json"))
    everybody = dict.fromkeys(cluster.aliases, 1.0)
    eventually(lambda: prometheus.query("up") == everybody, "not every node was scraped")
    assert prometheus.query('manifold_members{state="alive"}') == dict.fromkeys(everybody, 3.0)
    slots = {node.alias: float(node.cores) for node in cluster.client().nodes()}
    assert prometheus.query("manifold_scheduler_slots") == slots
    for query in dashboard_queries():
        eventually(
            lambda q=query: prometheus.ask("query", query=q)["result"], f"no answer: {query}"
        )
    types = prometheus.ask("metadata", metric="manifold_bus_frames_sent_total")
    types |= prometheus.ask("metadata", metric="manifold_bus_frames_sent")
    assert {each["type"] for rows in types.values() for each in rows} == {"counter"}
    health = {
        rule["name"]: rule["health"]
        for group in prometheus.ask("rules")["groups"]
        for rule in group["rules"]
    }
    assert len(health) > 10
    assert "err" not in health.values()


# -- profiles -------------------------------------------------------------------------------------


def busily(client: Client, until: threading.Event) -> None:
    while not until.is_set():
        client.map(abs, range(400), chunksize=1)


def test_a_profile_shows_what_a_busy_node_does_while_it_goes_on_serving(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    cluster = manifold_clusters(2)
    alias = cluster.aliases[0]
    worker = cluster.client(alias)
    until = threading.Event()
    load = threading.Thread(target=busily, args=(worker, until))
    load.start()
    try:
        said = manifold(cluster, tmp_path, "profile", alias, "--seconds", "3")
    finally:
        until.set()
        load.join()
    assert said.startswith("SELF %  TOTAL %  FUNCTION\n")
    svg = ET.parse(tmp_path / f"{alias}-profile.svg")
    titles = [each.text or "" for each in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("kernel.node.Node.") for title in titles)
    found = worker.metrics(alias, "families")
    assert value(found, "manifold_profiles_total") == 1


def test_profiles_are_relayed_folded_and_taken_one_at_a_time(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    cluster = manifold_clusters(2)
    here, there = cluster.aliases
    client = cluster.client(here)
    assert client.node == here
    found: list[Any] = []
    taken = threading.Thread(target=lambda: found.append(client.profile(there, 6.0, 50)))
    taken.start()
    eventually(lambda: client.log(there, contains="a profile of").lines, "it does not begin")
    with pytest.raises(Busy, match="A profile of this node is being taken"):
        client.profile(there, 1.0)
    assert client.metrics(there).alias == there  # it serves on
    taken.join()
    (profile,) = found
    assert profile.alias == there
    assert profile.seconds > 5.5  # longer than a relayed question may take otherwise
    assert 50 < profile.samples <= 301
    assert {stack.frames.partition(";")[0] for stack in profile.stacks} >= {"MainThread"}
    lines = manifold(
        cluster, tmp_path, "profile", there, "--seconds", "0.5", "--folded"
    ).splitlines()
    assert all(re.fullmatch(r"[^;]+(;[^;]+)* [0-9]+", line) for line in lines)
    as_json = json.loads(
        manifold(cluster, tmp_path, "profile", there, "--seconds", "0.5", "--json")
    )
    assert as_json["node"] == there
    assert sum(stack["count"] for stack in as_json["stacks"]) >= as_json["samples"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attached", [0, 1], ids=["to another", "to it"])
def test_who_profiles_a_node_that_ends_is_told_so_and_does_not_wait(
    manifold_clusters: Start, attached: int
) -> None:
    cluster = manifold_clusters(2)
    ends = cluster.aliases[1]
    client, other = cluster.client(cluster.aliases[attached]), cluster.client(cluster.aliases[0])
    found: list[ManifoldError] = []

    def ask() -> None:
        with pytest.raises(ManifoldError) as fault:
            client.profile(ends, 60.0)
        found.append(fault.value)

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: other.log(ends, contains="a profile of").lines, "it does not begin")
    cluster.kill(ends)
    thread.join(40)  # a profile of 60 s would say 70 s later that its fate is unknown
    assert not thread.is_alive()
    (error,) = found
    assert isinstance(error, Unavailable)
    assert error.message.startswith(f"{ends} ended, or fell silent, while it was")


def test_a_node_that_is_silent_is_said_to_be_silent(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(2)
    here, there = cluster.aliases
    client = cluster.client(here)
    cluster.pause(there)

    def dead() -> bool:
        return [node.state for node in client.nodes() if node.alias == there] == ["dead"]

    eventually(dead, "nobody notices")
    with pytest.raises(Unavailable, match=f"{there} is silent, and held for dead"):
        client.metrics(there)
    with pytest.raises(Unavailable, match=f"{there} is silent, and held for dead"):
        client.profile(there, 1.0)


def test_a_node_ends_in_time_while_a_profile_is_taken(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(1)
    client = cluster.client()
    asked = threading.Event()

    def ask() -> None:
        asked.set()
        with contextlib.suppress(ManifoldError):
            client.profile("", 60.0)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    asked.wait()
    begun_s = time.monotonic()
    cluster.close()
    assert time.monotonic() - begun_s < 20
