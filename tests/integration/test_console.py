"""The console over real clusters: driven by keys and clicks, and read from its screen."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from manifold.kernel import places
from manifold.shells.console.app import Console
from manifold.shells.console.pager import Pager
from manifold.shells.console.theme import plain

ROOT = Path(__file__).parents[2]
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # by a terminal
LOOK_S = 0.05
WAIT_S = 40.0  # the machine may be busy with other tests
Driven = Callable[[Any], Awaitable[None]]


def screen(app: Console) -> str:
    """Every character of the screen."""
    rows = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in row) for row in rows)


def printed(app: Console) -> str:
    """What the shell has printed."""
    return "\n".join(plain(line) for line in app.shell.output.lines)


async def until(pilot: Pilot[Any], condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, with a deadline."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{what}; the screen is\n{screen(pilot.app)}")  # type: ignore[arg-type]
        await pilot.pause(LOOK_S)


async def enter(pilot: Pilot[Any], line: str) -> None:
    """Type a line, key by key, and wait until it has ended."""
    app = pilot.app
    assert isinstance(app, Console)
    names = {" ": "space", "-": "minus", "/": "slash", "|": "vertical_line", ":": "colon"}
    await pilot.press(*(names.get(key, key) for key in line), "enter")
    await until(pilot, lambda: app.entering.running is None, f"{line} ends")


def drive(
    environ: dict[str, str], steps: Driven, size: tuple[int, int] = (100, 30), **options: Any
) -> None:
    """Run a console of the environment's cluster, and the steps in it."""

    async def run() -> None:
        app = Console(environ["MANIFOLD_CLUSTER"], environ, **options)
        async with app.run_test(size=size) as pilot:
            await steps(pilot)

    asyncio.run(run())


async def attached(pilot: Pilot[Any], nodes: int) -> Console:
    app = pilot.app
    assert isinstance(app, Console)
    await until(pilot, lambda: app.model.count("ready") == nodes, "the console sees every node")
    await until(pilot, lambda: "is yours" in printed(app), "the boot messages are complete")
    return app


def test_it_boots_with_facts_and_runs_verbs_pipes_and_the_pager(manifold_clusters: Any) -> None:
    cluster = manifold_clusters(3)

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 3)
        await until(pilot, lambda: "nodes: 3 of 3 ready" in screen(app), "the facts are seen")
        assert f"cluster {cluster.name}" in screen(app)
        await enter(pilot, "status")
        assert "3 of 3 nodes ready" in printed(app)
        await enter(pilot, "node ls | grep ready | wc -l")
        assert printed(app).splitlines()[-1].strip() == "3"
        await enter(pilot, "node ls | less")
        assert isinstance(app.screen, Pager)
        await until(pilot, lambda: "ALIAS" in screen(app), "the pager shows the table")
        await pilot.press("q")
        assert not isinstance(app.screen, Pager)

    drive(cluster.environ, steps)


def test_wrong_verbs_suggest_the_nearest_and_wrong_arguments_show_the_usage(
    manifold_clusters: Any,
) -> None:
    cluster = manifold_clusters(1)

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 1)
        await enter(pilot, "statsu")
        assert "Did you mean `status`?" in printed(app)
        await enter(pilot, "kill")
        assert "Usage: manifold kill [OPTIONS] JOB" in printed(app)
        assert "exit 2" in printed(app)
        await enter(pilot, "ls | grep '")
        assert "has no second one" in printed(app)
        await enter(pilot, "console")
        assert "makes no sense in the console" in printed(app)
        assert "Traceback" not in printed(app)

    drive(cluster.environ, steps)


def test_a_jobs_name_that_writes_the_clipboard_is_seen_and_never_obeyed(
    manifold_clusters: Any, tmp_path: Path
) -> None:
    cluster = manifold_clusters(1)
    program = tmp_path / "a\x1b]52;c;aGk=\x07\x9b31m\u202e.ent"
    program.write_bytes((ROOT / "examples" / "collatz.ent").read_bytes())
    seen = r"a\x1b]52;c;aGk=\x07\x9b31m\u202e.ent"

    def manifold(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "manifold", *arguments], env=cluster.environ,
            capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert not OBEYED.search(said), repr(said)
        return said

    manifold("run", str(program), "--range", "1:100", "--why")
    job = json.loads(manifold("jobs", "--all", "--json"))[0]["job"]
    assert seen in manifold("jobs", "--all")
    assert seen in manifold("ls", "-l", "/jobs")
    assert seen in manifold("cat", f"/jobs/{job}/status")
    assert job in manifold("why", job)
    assert r"clip\x1b]52;c;aGk=\x07" in manifold("cat", "/nodes/clip\x1b]52;c;aGk=\x07/cpu")

    value = "said\x1b]52;c;aGk=\x07"
    manifold("set", "motd", value)
    piped = subprocess.run(
        [sys.executable, "-m", "manifold", "cat", "motd"], env=cluster.environ,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert piped.stdout == f"{value}\n"  # a pipe has it as it is

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 1)
        await pilot.press("f4")
        await until(pilot, lambda: seen[:9] in screen(app), "the name is seen")
        assert not OBEYED.search(screen(app))
        await pilot.press("f2")
        await enter(pilot, "ls -l /jobs")
        await until(pilot, lambda: seen in screen(app), "the name is printed")
        await enter(pilot, "cat motd")
        await until(pilot, lambda: r"said\x1b]52;c;aGk=\x07" in screen(app), "a value is printed")
        assert not OBEYED.search(screen(app))

    drive(cluster.environ, steps, size=(160, 30))


def test_a_job_run_at_the_prompt_is_seen_in_the_jobs_pane_and_killed_by_a_key(
    manifold_clusters: Any,
) -> None:
    cluster = manifold_clusters(2)

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 2)
        app.shell.prompt.put("run examples/collatz.ent --range 1:300000000 --reduce sum")
        await pilot.press("enter", "f4")
        await until(pilot, lambda: "▶ running" in screen(app), "the job is in the pane")
        job = app.chosen_job()
        await pilot.press("enter")
        await until(pilot, lambda: "shards are on nodes" in screen(app), "its page shows shards")
        await pilot.press("escape", "x")
        await until(pilot, lambda: f"kill {job}" in screen(app), "it asks")
        await pilot.press("y", "f2", "ctrl+c")  # the prompt's own line is in the way: stop it
        await until(pilot, lambda: app.model.jobs[job].state == "cancelled", "it is cancelled")
        await until(pilot, lambda: app.entering.running is None, "nothing runs")
        assert f"❯ kill {job}" in printed(app), "the verb behind the key is shown"
        await pilot.press("f4", "w")
        await until(pilot, lambda: "task J-" in screen(app), "`why` is in the pager")

    drive(cluster.environ, steps)


def test_ctrl_c_ends_the_line_that_runs_and_nothing_else(manifold_clusters: Any) -> None:
    cluster = manifold_clusters(1)

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 1)
        app.shell.prompt.put("logs -f")
        await pilot.press("enter")
        await until(pilot, lambda: "INFO" in printed(app), "the log is followed")
        await pilot.press("ctrl+c")
        await until(pilot, lambda: app.entering.running is None, "it has ended")
        assert "exit 130" in printed(app)
        await enter(pilot, "status")
        assert "1 of 1 nodes ready" in printed(app)

    drive(cluster.environ, steps)


def test_a_node_that_dies_is_seen_and_comes_back(manifold_clusters: Any) -> None:
    cluster = manifold_clusters(3)

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 3)
        victim = next(a for a in cluster.aliases if a != app.model.attached.node)  # type: ignore[union-attr]
        await pilot.press("f3")
        cluster.pause(victim)
        await until(pilot, lambda: "✕ dead" in screen(app) or "? suspect" in screen(app), "seen")
        cluster.resume(victim)
        await until(pilot, lambda: app.model.count("ready") == 3, "it is well again")
        first = app.model.attached.node  # type: ignore[union-attr]
        cluster.kill(first)  # the one that we are attached to
        await until(
            pilot,
            lambda: f"node {first} has started again" in printed(app),
            "the console goes on without it, and tells of its second start",
        )

    drive(cluster.environ, steps)


def test_without_a_cluster_it_says_how_to_start_one_and_attaches_when_it_is_up(
    manifold_environment: dict[str, str],
) -> None:
    async def steps(pilot: Pilot[Any]) -> None:
        app = pilot.app
        assert isinstance(app, Console)
        await until(pilot, lambda: "is not running here" in printed(app), "it says so")
        assert "up --nodes 4 --detach" in printed(app)
        await enter(pilot, "up --nodes 2 --detach")
        await until(pilot, lambda: app.model.count("ready") == 2, "it is attached")
        await pilot.press("f3")
        await pilot.press("f2")
        await enter(pilot, "down --yes")
        await until(pilot, lambda: app.model.lost is not None, "it sees that it has gone")
        await pilot.press("f3")
        await until(pilot, lambda: "LOST" in screen(app), "the banner says so")
        assert "rpi" in screen(app) or "server" in screen(app), "what is known stays"
        await pilot.press("f2")
        await enter(pilot, "up --nodes 2 --detach")
        await until(pilot, lambda: app.model.lost is None, "it comes back by itself")
        await until(pilot, lambda: "attached again" in printed(app), "and tells")
        await enter(pilot, "down --yes")

    drive(manifold_environment, steps, size=(80, 24))


def test_a_read_only_console_refuses_what_changes_anything(manifold_clusters: Any) -> None:
    cluster = manifold_clusters(1)

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 1)
        await enter(pilot, "set x 1")
        assert "this console only looks" in printed(app)
        await enter(pilot, "ls / | set x 1")
        assert printed(app).count("this console only looks") == 2
        await enter(pilot, "get --help")
        assert "Usage: manifold get" in printed(app)
        await enter(pilot, "node ls")
        assert "ALIAS" in printed(app)

    drive(cluster.environ, steps, read_only=True)


def test_completion_offers_verbs_nodes_and_files(manifold_clusters: Any) -> None:
    cluster = manifold_clusters(2)
    alias = cluster.aliases[0]

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 2)
        prompt = app.shell.prompt
        prompt.put("stat")
        await pilot.press("tab")
        await until(pilot, lambda: prompt.value == "status ", "the verb is completed")
        prompt.put(f"node inspect {alias[:-1]}")
        await pilot.press("tab")
        await until(pilot, lambda: alias in prompt.value, "the alias is completed")
        prompt.put("run examples/coll")
        await pilot.press("tab")
        await until(pilot, lambda: "examples/collatz" in prompt.value, "the file is completed")
        prompt.put("n")
        await pilot.press("tab", "tab")
        await until(
            pilot, lambda: prompt.value in ("net", "node", "nexus"), "the menu is walked through"
        )

    drive(cluster.environ, steps)


def test_a_click_chooses_a_row_and_a_click_on_a_title_sorts(manifold_clusters: Any) -> None:
    cluster = manifold_clusters(3)

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 3)
        await pilot.press("f3")
        table = app.nodes.table
        await until(pilot, lambda: len(table.keys) == 3, "the rows are there")
        await pilot.click("#nodes-table", offset=(4, 2))
        assert table.chosen == table.keys[1]
        before = table.keys
        await pilot.click("#nodes-table", offset=(2, 0))
        await pilot.click("#nodes-table", offset=(2, 0))
        await until(pilot, lambda: table.keys == before[::-1], "sorted the other way round")
        await pilot.click("#bar", offset=(22, 0))
        assert app.pane == "jobs"

    drive(cluster.environ, steps)


@pytest.mark.parametrize("plainly", [False, True])
def test_resizing_never_breaks_it(manifold_clusters: Any, plainly: bool) -> None:
    cluster = manifold_clusters(2)
    environ = dict(cluster.environ) | ({"NO_COLOR": "1"} if plainly else {})

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 2)
        for key in ("f2", "f3", "f4", "f5", "f6", "f1"):
            await pilot.press(key)
            for size in ((40, 10), (250, 70), (20, 5), (80, 24)):
                await pilot.resize_terminal(*size)
                await pilot.pause()
                assert screen(app).strip(), f"{key} at {size} shows something"

    drive(environ, steps)


def test_what_is_recorded_can_be_replayed_also_after_a_kill(
    manifold_clusters: Any, tmp_path: Path
) -> None:
    cluster = manifold_clusters(2)
    file = tmp_path / "session.jsonl"
    command = [sys.executable, "-m", "manifold", "record", str(file)]
    with subprocess.Popen(command, env=cluster.environ, stderr=subprocess.PIPE) as recording:
        with cluster.client() as client:
            client.parallel_for("examples/collatz.ent", 1, 200_000, reduce="sum")
        deadline_s = time.monotonic() + WAIT_S
        while not file.exists() or b"k.job" not in file.read_bytes():
            assert time.monotonic() < deadline_s, "the job is in the recording"
            threading_wait(LOOK_S)
        os.kill(recording.pid, signal.SIGKILL)
    with file.open("ab") as half:
        half.write(b'{"type":"k.loo')  # as a kill in the middle of a line leaves it
    told = subprocess.run(
        [sys.executable, "-m", "manifold", "replay", "--json", str(file)],
        env=cluster.environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert cluster.name in told.stdout


def threading_wait(seconds: float) -> None:
    import threading

    threading.Event().wait(seconds)


def test_the_log_scrolls_back_beyond_what_is_in_memory_and_follows_again(
    manifold_clusters: Any,
) -> None:
    cluster = manifold_clusters(1)
    alias = cluster.aliases[0]
    first = "2001-01-01T00:00:00.000Z INFO     node: the first line of all"
    folder = places.state_dir(cluster.name, alias, cluster.environ)
    older = [
        f"2001-01-01T00:00:{n // 100:02}.{n % 100:03}Z INFO     node: {n}" for n in range(1, 4000)
    ]
    (folder / "node.log.1").write_text("\n".join([first, *older]) + "\n")

    async def steps(pilot: Pilot[Any]) -> None:
        app = await attached(pilot, 1)
        await pilot.press("f6")
        await until(pilot, lambda: "following" in screen(app) and "boot 1" in screen(app), "lines")
        for _ in range(6):
            await pilot.press("home")
            await pilot.pause(LOOK_S)
        await until(pilot, lambda: "from the first" in screen(app), "everything was read")
        await pilot.press("home")
        await until(pilot, lambda: "the first line of all" in screen(app), "the oldest is seen")
        await pilot.press("f")
        await until(pilot, lambda: "following" in screen(app), "it follows again")
        assert "the first line of all" not in screen(app)
        await pilot.press("slash", *"boot", "enter")
        await until(pilot, lambda: "with 'boot'" in screen(app), "the filter is shown")

    drive(cluster.environ, steps)
