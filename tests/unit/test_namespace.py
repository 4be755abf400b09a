"""The table of the namespace, its words and its documents, without a cluster."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError, NotFound, Unavailable
from manifold.shells.namespace import document
from manifold.shells.namespace.entries import missing, parts_of, path_of
from manifold.shells.namespace.following import LOST_S, Follower
from manifold.shells.namespace.mounts import ValueTree
from manifold.shells.namespace.table import ROWS, flat, text_of
from manifold.shells.namespace.tables import TABLES, named, process_dict, worker_id
from manifold.shells.verbs.export import write_csv
from manifold.vm.kid import kid_of

PAGE = Path(__file__).parents[2] / "docs" / "namespace.md"
names = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=8)


# -- the table ------------------------------------------------------------------------------------


def test_every_row_comes_after_its_folder_and_says_what_it_is() -> None:
    seen = {"/"}
    for row in ROWS[1:]:
        assert row.text
        assert row.pattern not in seen
        assert path_of(row.parts[:-1]) in seen, row.pattern
        seen.add(row.pattern)


def test_every_row_can_be_read_listed_or_followed() -> None:
    for row in ROWS:
        inside = [each for each in ROWS if each.parts[:-1] == row.parts and each is not row]
        assert (row.read is not None) == (row.kind == "file"), row.pattern
        if row.kind == "folder":
            assert inside or row.mount is not None, row.pattern
        if any(each.parts[-1].isupper() for each in inside):
            assert row.names is not None, row.pattern


def test_the_page_has_the_tables_of_the_code() -> None:
    page = PAGE.read_text()
    for text in (
        document.paths_text(), document.tables_text(), document.filters_text(),
        document.examples_text(),
    ):  # fmt: skip
        assert text.rstrip() in page, "python -m manifold.shells.namespace.document prints it"


# -- words ----------------------------------------------------------------------------------------


@given(st.lists(names))
def test_a_path_is_its_parts(parts: list[str]) -> None:
    assert parts_of(path_of(parts)) == tuple(parts)
    assert parts_of(path_of(parts) + "/") == tuple(parts)


def test_a_path_begins_with_a_slash() -> None:
    with pytest.raises(ManifoldError, match="is no path"):
        parts_of("nodes")


def test_what_is_missing_is_told_with_the_nearest_name() -> None:
    error = missing(("nodes", "rpi4-1", "cpu"), 1, ["rpi4-01", "server-01"])
    assert error.message == "There is no /nodes/rpi4-1."
    assert error.next_step == "Did you mean /nodes/rpi4-01? `manifold ls /nodes` lists it."
    assert missing(("x",), 0, ["nodes"]).next_step == "`manifold ls /` lists it."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (True, "true"), (3, "3"), (0.1, "0.1"), ("a b", "a b"), ([], ""),
        ([1, None, [2, 3]], "1\n-\n2 3"),
        ({"a": 1, "b": {"c": None, "d": [1, 2]}, "e": "x\ny"}, "a: 1\nb.c: -\nb.d: 1 2\ne: x y"),
    ],
)  # fmt: skip
def test_values_are_plain_lines(value: Any, text: str) -> None:
    assert text_of(value) == text


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(names, values, min_size=1, max_size=4))
def test_everything_that_a_tree_of_values_lists_can_be_read(value: Any) -> None:
    tree = ValueTree(lambda source, outer: value)
    source: Any = None

    def walk(rest: tuple[str, ...]) -> None:
        found = tree.entries(source, (), rest)
        assert found is not None
        assert len({entry.name for entry in found}) == len(found)
        for entry in found:
            inner = (*rest, entry.name)
            if entry.kind == "folder":
                walk(inner)
                with pytest.raises(KeyError):
                    tree.value(source, (), inner)
            else:
                assert tree.entries(source, (), inner) is None
                tree.value(source, (), inner)

    walk(())
    with pytest.raises(KeyError):
        tree.value(source, (), ("no such/name",))


# -- processes ------------------------------------------------------------------------------------


def node(alias: str, boot: int, workers: tuple[int, ...]) -> m.NodeInfo:
    return m.NodeInfo(
        kid_of(alias.encode()), alias, "server", "ready", 1, boot, "", 2, 1.0, 0, False, 1, 0.0,
        "none", workers,
    )  # fmt: skip


def process(alias: str, slot: int, pid: int, shard: int) -> m.Process:
    state = "running" if pid else "waiting"
    return m.Process(alias, slot, pid, "J-0", shard, 1, 0, 1, 5.0, "p", state)


def test_a_process_keeps_its_id_while_it_lives_and_idle_workers_have_one() -> None:
    nodes = (node("a", 1, (10, 11)), node("b", 1, (10,)))
    busy = named(nodes, m.Processes((process("a", 0, 10, 3), process("b", -1, 0, 4))))
    idle = named(nodes, m.Processes(()))
    assert len(busy) == 4 and len(idle) == 3
    assert set(idle) < set(busy)
    worker = worker_id(nodes[0].kid, 1, 10)
    assert busy[worker].shard == 3 and idle[worker].state == "idle"
    assert process_dict(worker, idle[worker])["job"] is None
    assert worker_id(nodes[0].kid, 2, 10) not in busy
    assert all(len(each) == 14 and each.startswith("K-") for each in busy)


# -- what is followed -----------------------------------------------------------------------------


class Turns:
    """A `Stop` after so many turns, and a clock that goes on with each."""

    def __init__(self, turns: int) -> None:
        self.left = turns
        self.now_s = 0.0

    def wait(self, timeout: float) -> bool:
        self.left -= 1
        self.now_s += timeout
        return self.left < 0


def follow(*found: Any) -> list[str]:
    """What is told of a file that holds these one after the other."""
    turns = iter(found)

    def read() -> tuple[object, str]:
        value = next(turns)
        if isinstance(value, Exception):
            raise value
        return value, text_of(value)

    client: Any = None
    return [text for _, text in Follower(client, Turns(len(found) - 1)).file(read)]


def test_only_changes_are_told() -> None:
    assert follow(1, 1, 2, 2, 2, 1) == ["1", "2", "1"]
    assert follow([1], [1, 2]) == ["1", "1\n2"]


def test_of_a_status_the_keys_that_changed_are_told_and_clocks_with_others_alone() -> None:
    first = {"state": "ready", "uptime_ms": 1, "load": {"slots": 1, "t_mono_ms": 0}}
    later = {"state": "ready", "uptime_ms": 2, "load": {"slots": 1, "t_mono_ms": 5}}
    other = {"state": "dead", "uptime_ms": 3, "load": {"slots": 1, "t_mono_ms": 5}}
    assert follow(first, later, later, other) == [text_of(first), "state: dead\nuptime_ms: 3"]
    assert [key for key, _ in flat(first)] == ["state", "uptime_ms", "load.slots", "load.t_mono_ms"]


def test_a_node_that_is_gone_for_a_moment_is_waited_for() -> None:
    gone = Unavailable("a does not answer.")
    assert follow(1, gone, gone, 2) == ["1", "2"]
    with pytest.raises(Unavailable):
        follow(gone)
    with pytest.raises(NotFound):
        follow(1, NotFound("There is no a."))


def test_a_node_that_stays_away_ends_what_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(1000)
    monkeypatch.setattr("time.monotonic", lambda: turns.now_s)
    answers = iter([(1, "1")])

    def read() -> tuple[object, str]:
        for answer in answers:
            return answer
        raise Unavailable("a does not answer.")

    client: Any = None
    with pytest.raises(Unavailable):
        list(Follower(client, turns).file(read))
    assert LOST_S < turns.now_s < 2 * LOST_S


def test_of_a_folder_names_come_and_go() -> None:
    turns = iter([["a", "b"], ["b"], ["b", "c"]])
    client: Any = None
    told = Follower(client, Turns(2)).folder(lambda: next(turns))
    assert [text for _, text in told] == ["+ a", "+ b", "- a", "+ c"]


# -- tables ---------------------------------------------------------------------------------------

cells = st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers()), st.booleans())


@given(st.lists(st.fixed_dictionaries({"a": cells, "b": st.fixed_dictionaries({"c": cells})})))
def test_csv_has_a_header_and_as_many_cells_in_each_line(rows: list[dict[str, Any]]) -> None:
    file = io.StringIO(newline="")
    write_csv(file, ("a", "b.c", "b.d"), rows)
    header, *lines = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert header == ["a", "b.c", "b.d"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line[2] == ""
        if isinstance(row["b"]["c"], str):
            assert line[1] == row["b"]["c"]


def test_csv_has_cells_as_they_are_and_the_page_says_so_of_formulas() -> None:
    file = io.StringIO()
    write_csv(file, ["name"], [{"name": f"{first}1+1"} for first in "=+-@"])
    assert file.getvalue().splitlines()[1:] == ["=1+1", "+1+1", "-1+1", "@1+1"]
    assert "CSV has cells that begin with `=`, `+`, `-`" in PAGE.read_text()


def test_every_table_has_columns_that_are_named_once() -> None:
    assert list(TABLES) == ["nodes", "jobs", "processes", "globals", "voters", "log"]
    for table in TABLES.values():
        assert len(set(table.columns)) == len(table.columns) > 1
