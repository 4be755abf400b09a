"""The console's pure parts: what is known, figures, terminal output, map, history, recordings."""

from __future__ import annotations

import copy
import itertools
import random
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from manifold.kernel.errors import Refused
from manifold.kernel.geode.messages import LoadReport
from manifold.kernel.messages import NodeInfo, Process
from manifold.kernel.scheduler.messages import JobStatus
from manifold.shells.console import messages as e
from manifold.shells.console.backlog import Backlog, backwards
from manifold.shells.console.completing import Completer
from manifold.shells.console.entering import changes
from manifold.shells.console.feed import merged
from manifold.shells.console.figures import age, amount, area, bar, size, spark
from manifold.shells.console.history import ENTRIES_MAX, History
from manifold.shells.console.mapping import chart, disc, points
from manifold.shells.console.model import Model, Observation
from manifold.shells.console.recording import BadRecording, Player, Recorder, read
from manifold.shells.console.terminal import Terminal, lines_of
from manifold.shells.console.theme import PALETTES, plain, wrapped
from manifold.shells.console.view import Column, fitted, marked
from manifold.vm.kid import Kid

NOW_MS = 1_800_000_000_000


def info(alias: str, *, state: str = "ready", busy: int = 0, pid: int = 1) -> NodeInfo:
    load = LoadReport(slots=4, free_slots=4 - busy) if pid else None
    return NodeInfo(
        Kid(f"K-{alias}"), alias, "rpi4", state, pid, 1, "", 4, 0.5, 1 << 30, False, 3, 5_000.0,
        "none", (1, 2), load,
    )  # fmt: skip


def job(name: str = "J-1", *, state: str = "running", done: int = 0) -> JobStatus:
    return JobStatus(name, state, "P", "collatz", Kid("K-a"), done, 100, 1_000.0, 4, 0)  # type: ignore[arg-type]


def process(node: str, shard: int) -> Process:
    return Process(node, 0, 10, "J-1", shard, 1, 0, 8, 100.0, "collatz", "running")


def some_looks(seed: int, count: int = 30) -> list[Observation]:
    chance = random.Random(seed)
    looks = []
    for _ in range(count):
        nodes = tuple(
            info(alias, busy=chance.randint(0, 4), state=chance.choice(("ready", "suspect")))
            for alias in "abcd" if chance.random() < 0.9
        )  # fmt: skip
        jobs = tuple(
            job(f"J-{n}", done=chance.randint(0, 100)) for n in range(chance.randint(0, 3))
        )
        runs = tuple(process(chance.choice("abcd"), n) for n in range(chance.randint(0, 5)))
        looks.append(Observation(nodes, jobs, runs, ("d",) if chance.random() < 0.2 else ()))
    return looks


@pytest.mark.parametrize("seed", range(20))
def test_a_model_that_applies_the_events_of_another_ends_up_equal_to_it(seed: int) -> None:
    """M1: this is what makes a replay show what was seen."""
    seen, replayed = Model(), Model()
    for number, look in enumerate(some_looks(seed)):
        for event in seen.observe(look, NOW_MS + 1000 * number):
            replayed.apply(event)
    assert replayed == seen


def test_what_has_not_changed_makes_no_event() -> None:
    model = Model()
    look = Observation((info("a"),), (job(),), (process("a", 0),))
    model.observe(look, NOW_MS)
    assert [type(each) for each in model.observe(look, NOW_MS + 1000)] == [e.Looked]


def test_what_is_known_stays_when_the_cluster_is_lost_and_only_ages() -> None:
    model = Model()
    model.observe(Observation((info("a", busy=2),), (job(),), ()), NOW_MS)
    model.apply(e.Lost(NOW_MS + 5_000, "gone"))
    assert [node.alias for node in model.nodes.values()] == ["a"]
    assert model.age_ms(NOW_MS + 12_000) == 12_000


def test_a_node_that_is_silent_keeps_what_it_said() -> None:
    model = Model()
    model.observe(Observation((info("a", busy=3),), (), ()), NOW_MS)
    model.observe(Observation((info("a", state="suspect", pid=0),), (), ()), NOW_MS + 1000)
    node = model.find("a")
    assert node is not None
    assert (node.state, node.pid, model.loads[node.kid].busy) == ("suspect", 1, 3)


def test_a_job_that_nobody_told_of_is_kept_while_somebody_is_silent() -> None:
    model = Model()
    model.observe(Observation((), (job(),), ()), NOW_MS)
    model.observe(Observation((), (), (), silent=("a",)), NOW_MS + 1000)
    assert "J-1" in model.jobs
    model.observe(Observation((), (), ()), NOW_MS + 2000)
    assert "J-1" not in model.jobs


def test_a_shard_that_is_elsewhere_has_moved() -> None:
    model = Model()
    model.observe(Observation((), (job(),), (process("a", 7),)), NOW_MS)
    events = model.observe(Observation((), (job(),), (process("b", 7),)), NOW_MS + 1000)
    moved = [each for each in events if isinstance(each, e.Moved)]
    assert [(each.source, each.to, each.shard) for each in moved] == [("a", "b", 7)]


# -- figures --------------------------------------------------------------------------------------


@given(some.floats(0, 1e18))
def test_figures_are_never_wider_than_their_column(value: float) -> None:
    assert len(amount(value)) <= 5
    assert len(size(value)) <= 6
    assert len(age(min(value, 1e11))) <= 8


@given(some.lists(some.floats(0, 1), max_size=300), some.integers(0, 80), some.integers(1, 9))
def test_bars_and_sparklines_fill_their_width(shares: list[float], width: int, rows: int) -> None:
    assert len(spark(shares, width)) == width
    assert all(len(row) == width for row in area(shares, width, rows))
    for share in shares[:5]:
        assert len("".join(bar(share, width))) == width


# -- terminal -------------------------------------------------------------------------------------


def test_a_progress_bar_is_one_line_that_is_written_over() -> None:
    terminal = Terminal()
    assert terminal.feed("\r[##..] 50%\x1b[K") == []
    terminal.feed("\r[####] 100%\x1b[K")
    assert plain(terminal.current) == "[####] 100%"
    assert terminal.feed("\r\x1b[Kdone\n") == [(("done", ""),)]


def test_colours_become_names_and_other_sequences_are_left_out() -> None:
    (line,) = lines_of(
        "\x1b[1m\x1b[31mbad\x1b[0m \x1b]0;title\x07\x1b[?25lgood\x1b[38;5;9m!\x1b[0m"
    )
    assert line == (("bad", "bad bold"), (" good!", ""))


@given(some.text(alphabet="ab\x1b[0;31mK\r\n\t\b", max_size=200), some.integers(1, 20))
def test_output_is_read_alike_however_it_is_cut(text: str, length: int) -> None:
    whole, parts = Terminal(), Terminal()
    lines = whole.feed(text)
    pieces = [text[at : at + length] for at in range(0, len(text), length)]
    assert [line for piece in pieces for line in parts.feed(piece)] == lines
    assert parts.current == whole.current


@given(some.text(alphabet="abc ", max_size=80), some.integers(1, 30))
def test_wrapping_loses_nothing(text: str, width: int) -> None:
    rows = wrapped(((text[:7], "ok"), (text[7:], "bad")), width)
    assert "".join(map(plain, rows)) == text
    assert all(len(plain(row)) <= width for row in rows)


def test_what_is_found_is_marked() -> None:
    line = marked((("one two ", ""), ("TWO", "ok")), "two", "match")
    assert line == (("one ", ""), ("two", "match"), (" ", ""), ("TWO", "ok match"))


# -- columns and colours --------------------------------------------------------------------------


@given(some.integers(1, 250))
def test_columns_that_do_not_fit_are_left_out_by_rank(width: int) -> None:
    columns = [Column(str(n), "", 8, rank=n, grows=n == 5) for n in range(6)]
    fit = fitted(columns, width)
    assert len(fit) == 1 or sum(w + 2 for _, w in fit) <= width
    assert [c.rank for c, _ in fit] == list(range(6 - len(fit), 6))


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("name", PALETTES)
def test_text_is_legible_on_every_ground(name: str) -> None:
    """WCAG 2.1, contrast (minimum): 4.5 for text; 3 for what is only a hint."""
    palette = PALETTES[name]
    for ground in (palette.ground, palette.panel, palette.select):
        for word in ("text", "dim", "accent", "ok", "warn", "bad", "other"):
            one, two = sorted((_luminance(getattr(palette, word)), _luminance(ground)))
            assert (two + 0.05) / (one + 0.05) >= (3.5 if word == "dim" else 4.0), (word, ground)


# -- the map --------------------------------------------------------------------------------------


def kinds(count: int) -> list[e.Node]:
    return [
        e.Node(f"K-{n}", f"n-{n:02}", f"k{n % 4}", "ready", cores=1 + n % 4,
               compute=0.25 * (1 + n % 4), memory_bytes=1 << (28 + n % 4), gpu=n % 4 == 2)
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("room", [(78, 18), (200, 55), (30, 6)])
def test_no_two_nodes_overlap_and_as_many_as_possible_are_placed(
    count: int, room: tuple[int, int]
) -> None:
    placed = chart(kinds(count), *room)
    for one, two in itertools.combinations(placed.spots.values(), 2):
        apart_x = one.x + one.width <= two.x or two.x + two.width <= one.x
        tall_one, tall_two = one.height + bool(one.label), two.height + bool(two.label)
        assert apart_x or one.y + tall_one <= two.y or two.y + tall_two <= one.y
    assert placed.unplaced == 0 or room == (30, 6)


def test_the_death_of_one_of_a_kind_moves_no_other() -> None:
    nodes = kinds(16)
    before, _, _ = points(nodes)
    after, _, _ = points(nodes[:-1])
    assert all(after[kid] == pytest.approx(before[kid]) for kid in after)
    assert chart(nodes, 80, 20) == chart(list(reversed(nodes)), 80, 20)


def test_states_differ_by_shape() -> None:
    spot = next(iter(chart(kinds(1), 60, 20).spots.values()))
    drawn = [disc(spot, load, state) for load, state in (
        (0.0, "ready"), (0.5, "ready"), (1.0, "ready"), (0.0, "suspect"), (0.0, "dead"),
    )]  # fmt: skip
    assert len({tuple(each) for each in drawn}) == len(drawn)
    assert all(len(row) == spot.width for each in drawn for row in each)


# -- history, completion --------------------------------------------------------------------------


def test_history_goes_on_across_runs_bounded_and_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "console_history"
    first = History(path)
    for number in range(2 * ENTRIES_MAX + 5):
        first.add(f"line {number}")
    first.add(" not kept: it begins with a blank")
    second = History(path)
    assert second.entries[-1] == f"line {2 * ENTRIES_MAX + 4}"
    assert len(second.entries) == ENTRIES_MAX
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text().splitlines()) <= 2 * ENTRIES_MAX


def test_up_and_down_walk_through_entries_with_the_same_beginning() -> None:
    history = History(None)
    for line in ("node ls", "status", "node inspect a"):
        history.add(line)
    assert history.older("no", "no") == "node inspect a"
    assert history.older("node inspect a", "no") == "node ls"
    assert history.older("node ls", "no") is None
    assert history.newer("node ls", "no") == "node inspect a"
    assert history.newer("node inspect a", "no") == "no"
    assert history.search("stat") == (1, "status")
    assert history.suggest("node i") == "node inspect a"


def test_a_history_that_cannot_be_written_says_so_and_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "history")
    history.add("status")
    assert history.entries == ["status"] and "not kept" in history.trouble


def test_completion_knows_verbs_options_nodes_jobs_and_files(tmp_path: Path) -> None:
    (tmp_path / "prog.ent").write_text("")
    completer = Completer(nodes=lambda: ["rpi4-01", "rpi5-01"], jobs=lambda: ["J-1", "J-2"])
    assert completer.complete("stat").candidates == ("status",)
    assert completer.complete("node in").candidates == ("inspect",)
    assert completer.complete("node inspect rpi4").candidates == ("rpi4-01",)
    assert completer.complete("kill J").candidates == ("J-1", "J-2")
    assert completer.complete("jobs --a").candidates == ("--all",)
    assert completer.complete("logs --node rpi5").candidates == ("rpi5-01",)
    assert f"{tmp_path}/prog.ent" in completer.complete(f"run {tmp_path}/p").candidates
    assert completer.complete("nonsense x").candidates == ()


def test_a_console_that_looks_knows_what_changes() -> None:
    assert changes(["kill", "J-1"]) and changes(["nexus", "init", "a"])
    assert changes(["a-verb-of-tomorrow"]) and changes(["node", "drain", "a"])
    assert not changes(["node", "ls", "--json"]) and not changes(["kill", "--help"])


# -- logs and recordings --------------------------------------------------------------------------


def stamped(second: int, text: str) -> str:
    return f"2026-01-01T00:00:{second:02}.000Z INFO     node: {text}"


def test_logs_are_merged_by_time_and_continued_lines_stay_together() -> None:
    one = [("a", stamped(1, "x")), ("a", "    more of x"), ("a", stamped(3, "z"))]
    two = [("b", stamped(2, "y"))]
    assert [line[-1] for _, line in merged([one, two])] == ["x", "x", "y", "z"]


def test_older_lines_are_read_from_the_files_backwards_in_pieces(tmp_path: Path) -> None:
    environ = {"MANIFOLD_STATE_HOME": str(tmp_path)}
    for alias, begin in (("a", 0), ("b", 1)):
        folder = tmp_path / "c" / alias
        folder.mkdir(parents=True)
        lines = [stamped(second, f"{alias}{second}") for second in range(begin, 60, 2)]
        (folder / "node.log.1").write_text("\n".join(lines[:10]) + "\n")
        (folder / "node.log").write_text("\n".join(lines[10:]) + "\n")
    backlog = Backlog("c", environ, stamped(50, "")[:24], frozenset())
    found = []
    while piece := backlog.older(7):
        found = piece + found
    assert [line for _, line in found] == [
        stamped(second, f"{'ab'[second % 2]}{second}") for second in range(51)
    ]


def test_a_file_of_any_size_is_read_backwards_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [f"{number} " + "x" * (number % 300) for number in range(5_000)]
    path.write_text("\n".join(lines))
    assert list(backwards(path)) == lines[::-1]


def recorded(tmp_path: Path, count: int = 10) -> Path:
    path = tmp_path / "session.jsonl"
    recorder = Recorder(path, "c", 0)
    model = Model()
    for number, look in enumerate(some_looks(1, count)):
        recorder.write(model.observe(look, number * 1000))
    recorder.close()
    return path


def test_a_recording_is_read_as_it_was_written_and_a_torn_last_line_is_left_out(
    tmp_path: Path,
) -> None:
    path = recorded(tmp_path)
    header, events = read(path)
    assert header.cluster == "c"
    for cut in (1, 7, 20):
        data = path.read_bytes()
        path.write_bytes(data[:-cut])
        assert read(path)[1] == events[:-1]
        path.write_bytes(data)


def test_what_is_no_recording_is_refused_by_line(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"type":"nonsense"}\n', *lines[3:]]))
    with pytest.raises(BadRecording, match="line 4"):
        read(path)
    path.write_text("hello\n")
    with pytest.raises(BadRecording, match="no recording"):
        read(path)
    path.write_text('{"manifold":"recording","version":99}\n')
    with pytest.raises(BadRecording, match="version 99"):
        read(path)
    with pytest.raises(BadRecording, match="cannot be read"):
        read(tmp_path / "missing")


def test_a_recording_is_not_written_over_unless_asked(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    with pytest.raises(Refused):
        Recorder(path, "c", 0)
    Recorder(path, "c", 0, force=True).close()


def test_a_replay_can_stand_step_and_go_back(tmp_path: Path) -> None:
    player = Player(*read(recorded(tmp_path)))
    player.seek(5_000)
    there = copy.deepcopy(player.model)
    player.seek(player.end_ms)
    assert player.ended
    player.seek(5_000)
    assert player.model == there
    player.paused = True
    assert player.advance(10_000) == []
    assert isinstance(player.step()[-1], e.Looked) and player.now_ms == 6_000
    player.paused, player.speed = False, 2.0
    player.advance(1_000)
    assert player.now_ms == 8_000
