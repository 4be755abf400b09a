"""`manifold nexus`: who votes, changing it with real processes, and what is on the disks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from manifold.shells.cli.main import run
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
WAIT_S = 20.0


def until(what: Callable[[], bool], why: str) -> None:
    quiet = threading.Event()
    deadline_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline_s, why
        quiet.wait(0.05)


class Shell:
    """Runs `manifold` on a cluster."""

    def __init__(self, cluster: TestCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "manifold", *arguments], env=dict(self.cluster.environ),
            text=True, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """In this process, which saves its start: status and what it prints."""
        printed = io.StringIO()
        with (
            patch.dict(os.environ, self.cluster.environ),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            status = run(list(arguments))
        return status, printed.getvalue()

    def ok(self, *arguments: str) -> str:
        status, said = self(*arguments)
        assert status == 0, said
        return said

    def error(self, code: int, *arguments: str) -> dict[str, str]:
        status, said = self(*arguments, "--json")
        assert status == code, said
        error: dict[str, str] = json.loads(said)["error"]
        return error

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("nexus", "status", "--json"))
        return found

    def voters(self) -> list[str]:
        return sorted(row["alias"] for row in self.status()["voters"])

    def until(self, what: Callable[[dict[str, Any]], bool], why: str) -> None:
        until(lambda: what(self.status()), why)

    def agreed(self) -> list[str]:
        """The aliases of the voters, once there are some and all of them answer."""
        self.until(
            lambda each: each["known"] and all(row["votes"] for row in each["voters"]),
            "no voters come about",
        )
        return self.voters()


@pytest.fixture
def shell(manifold_clusters: Start, tmp_path: Path) -> Shell:
    """Of five nodes, three of which vote."""
    return Shell(manifold_clusters(5), tmp_path)


def other(shell: Shell) -> str:
    """A node that does not vote."""
    return next(alias for alias in shell.cluster.aliases if alias not in shell.agreed())


def test_status_shows_the_voters_and_how_they_are(shell: Shell) -> None:
    voters = shell.agreed()
    assert len(voters) == 3
    found = shell.status()
    assert (found["epoch"], found["majority"], found["changing"]) == (1, True, None)
    assert {row["state"] for row in found["voters"]} == {"alive"}
    lines = shell.ok("nexus", "status").splitlines()
    assert lines[0] == "epoch 1: 3 voters, a majority answers"
    assert lines[1].split() == ["VOTER", "ID", "STATE", "KEYS", "EPOCH", "NOTE"]
    assert sorted(line.split()[0] for line in lines[2:]) == voters
    assert shell.ok("nexus", "voters") == f"voters: {' '.join(voters)}  (epoch 1, quorum)\n"
    for each in voters[1:]:
        shell.cluster.pause(each)
    found = shell.status()
    assert found["majority"] is False
    assert sum(row["note"] == "no answer" for row in found["voters"]) == 2
    assert "no majority answers" in shell.ok("nexus", "status")
    shell.cluster.heal()
    shell.until(lambda each: each["majority"], "it does not heal")


def test_voters_are_added_removed_and_replaced(shell: Shell) -> None:
    voters, new = shell.agreed(), other(shell)
    shell.ok("set", "kept", "1")
    said = shell.ok("nexus", "voters", "add", new)
    assert f"voters: {' '.join(sorted([*voters, new]))}  (epoch 3, quorum)" in said
    assert "4 voters bear no more failures than 3: an odd number is better" in said
    assert "nothing to change" in shell.ok("nexus", "voters", "add", new)
    shell.ok("nexus", "voters", "remove", voters[0])
    assert shell.agreed() == sorted([*voters[1:], new])
    said = shell.ok("nexus", "voters", "replace", new, voters[0])
    assert "the change begins" in said and shell.agreed() == voters
    assert "nothing to change" in shell.ok("nexus", "voters", "replace", new, voters[0])
    assert shell.ok("get", "kept", "--value") == "1\n"
    assert shell.error(4, "nexus", "voters", "remove", "nobody")["code"] == "not_found"
    assert shell.error(4, "nexus", "voters", "replace", new, "nobody")["code"] == "not_found"


def test_nodes_may_be_named_by_the_beginning_of_their_id(shell: Shell) -> None:
    shell.agreed()
    row = shell.status()["voters"][0]
    shell.ok("nexus", "voters", "remove", row["id"][:12])
    assert row["alias"] not in shell.voters()


def test_a_dead_voter_is_replaced(shell: Shell) -> None:
    voters, new = shell.agreed(), other(shell)
    shell.ok("set", "kept", "1")
    shell.cluster.pause(voters[0])
    assert shell.ok("nexus", "voters", "replace", voters[0], new)
    shell.cluster.kill(voters[1])  # the majority is of the new ones by now
    assert shell.ok("get", "kept", "--value", "--timeout", "20") == "1\n"
    shell.cluster.heal()
    assert shell.agreed() == sorted([*voters[1:], new])


def test_a_change_whose_command_and_driver_are_killed_goes_on_when_it_is_run_again(
    shell: Shell,
) -> None:
    voters, new = shell.agreed(), other(shell)
    with shell.cluster.client() as client:
        for number in range(300):  # so that there is something to write again
            client.globals[f"many/{number}"] = number
    with shell.begin("nexus", "voters", "replace", voters[0], new) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it begins
        process.kill()
        killed = {alias: shell.cluster.pid(alias) for alias in shell.cluster.aliases}
        for pid in killed.values():  # one of them is the driver
            os.kill(pid, signal.SIGKILL)
    until(
        lambda: all(shell.cluster.pid(alias) not in (0, pid) for alias, pid in killed.items()),
        "they do not come back",
    )
    shell.cluster.wait_converged()
    shell.until(lambda each: bool(each["majority"]), "no majority comes back")
    shell.ok("nexus", "voters", "replace", voters[0], new)
    assert shell.agreed() == sorted([*voters[1:], new])
    with shell.cluster.client() as client:
        assert len(client.globals.names("many/")) == 300


def test_without_voters_everything_says_how_to_choose_them(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    shell = Shell(manifold_clusters(3, overrides={"nexus.voters": "off"}), tmp_path)
    assert "no voters are known" in shell.ok("nexus", "status")
    assert shell.status()["known"] is False
    error = shell.error(1, "get", "x", "--timeout", "0.3")
    assert error["code"] == "unavailable" and "manifold nexus init" in error["next"]
    assert "init" in shell.error(4, "nexus", "voters", "add", shell.cluster.aliases[0])["next"]
    first = shell.cluster.aliases[:2]
    said = shell.ok("nexus", "init", *first)
    assert f"voters: {' '.join(first)}  (epoch 1, quorum)" in said
    assert "2 voters bear no more failures than 1" in said
    assert "these vote already" in shell.ok("nexus", "init", *reversed(first))
    error = shell.error(4, "nexus", "init", *shell.cluster.aliases)
    assert "There are voters already" in error["message"]
    shell.ok("set", "x", "1")
    status, _ = shell("nexus", "init")
    assert status == 2


def test_a_voter_whose_disk_refuses_is_shown_with_its_reason(shell: Shell) -> None:
    voters = shell.agreed()
    limit = 4 << 20  # of any file of that process: its records reach it first
    resource.prlimit(shell.cluster.pid(voters[0]), resource.RLIMIT_FSIZE, (limit, limit))
    with shell.cluster.client(voters[1]) as client:
        for number in range(200):  # half of them are for this voter
            client.globals[f"large/{number % 16}"] = bytes([number]) * 60_000
        shell.until(
            lambda each: any(row["stopped"] for row in each["voters"]), "the disk refuses nothing"
        )
        client.globals["goes-on"] = 1
    row = next(row for row in shell.status()["voters"] if row["stopped"])
    assert row["alias"] == voters[0] and row["note"].startswith("stopped: ")
    assert "stopped: " in shell.ok("nexus", "status")


def test_verify_reads_what_is_on_the_disks_while_the_cluster_runs(
    shell: Shell, tmp_path: Path
) -> None:
    voters = shell.agreed()
    with shell.cluster.client() as client:
        for number in range(50):
            client.globals[f"v/{number}"] = "x" * 1000
    lines = shell.ok("nexus", "verify").splitlines()
    assert lines[0].split()[0] == "NODE" and all(each.endswith("sound") for each in lines[1:])
    reports = json.loads(shell.ok("nexus", "verify", "--json"))
    assert set(voters) <= {each["node"] for each in reports}
    voter = next(each for each in reports if each["node"] == voters[0])
    assert voter["sound"] and voter["records"] > 50
    copy = tmp_path / "copy"
    shutil.copytree(voter["folder"], copy)
    assert json.loads(shell.ok("nexus", "verify", str(copy), "--json"))[0]["sound"]
    data = bytearray((copy / "records").read_bytes())
    data[len(data.rstrip(b"\0")) // 2] ^= 1
    (copy / "records").write_bytes(data)
    status, said = shell("nexus", "verify", str(copy))
    assert status == 1
    assert "damaged" in said and "join again as a new one" in said
    assert shell.error(4, "nexus", "verify", str(tmp_path / "none"))["code"] == "not_found"


def test_where_nobody_keeps_records_verify_says_so(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    shell = Shell(manifold_clusters(1, overrides={"nexus.voters": "off"}), tmp_path)
    assert shell.error(4, "nexus", "verify")["code"] == "not_found"
