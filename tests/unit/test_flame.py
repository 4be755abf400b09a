"""The flame graph: one file that any browser shows, with widths that mean something."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import pytest

from manifold.shells.verbs.flame import NARROW_PX, busy, flame_graph, hot

SVG = "{http://www.w3.org/2000/svg}"
STACKS = [
    ("MainThread;kernel.a.f;kernel.a.g", 30),
    ("MainThread;kernel.a.f", 10),
    ("MainThread;json.dumps", 40),
    ("disk;kernel.b.h", 20),
]


def boxes(svg: str) -> dict[str, tuple[float, float, float, str]]:
    """Name to x, y, width and what its title says beneath the name."""
    found = {}
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None and rect is not None and title.text
        name, _, share = title.text.partition("\n")
        x, y, width = (float(rect.attrib[each]) for each in ("x", "y", "width"))
        found[name] = (x, y, width, share)
    return found


def test_widths_are_shares_and_what_is_called_stands_on_its_caller() -> None:
    found = boxes(flame_graph("t", "s", STACKS, 100))
    whole = found["all that was done"][2]
    for name, count in (("MainThread", 80), ("kernel.a.f", 40), ("kernel.a.g", 30), ("disk", 20)):
        assert found[name][2] / whole == pytest.approx(count / 100, abs=1e-4)
    caller, called = found["kernel.a.f"], found["kernel.a.g"]
    assert called[1] < caller[1]
    assert caller[0] <= called[0] and called[0] + called[2] <= caller[0] + caller[2] + 0.02
    assert called[3] == "30 of 100 samples, 30.0 % of the time"


def test_frames_of_one_row_do_not_overlap() -> None:
    rows: dict[float, list[tuple[float, float]]] = {}
    for x, y, width, _ in boxes(flame_graph("t", "s", STACKS, 100)).values():
        rows.setdefault(y, []).append((x, x + width))
    for spans in rows.values():
        spans.sort()
        assert all(one[1] <= other[0] + 0.02 for one, other in itertools.pairwise(spans))


def test_the_file_asks_for_nothing_from_elsewhere_and_has_no_script() -> None:
    svg = flame_graph("t", "s", STACKS, 100)
    assert "prefers-color-scheme: dark" in svg
    for word in ("<script", "href", "url(", "@import", "onload"):
        assert word not in svg
    assert svg.count("http") == 1  # the name of the language


def test_names_cannot_break_out_of_their_place() -> None:
    evil = "</title><script>alert(1)</script>&\"'"
    svg = flame_graph(evil, evil, [(f"MainThread;{evil}", 5)], 5)
    assert "<script" not in svg
    assert evil in boxes(svg)


def test_a_very_deep_stack_and_very_many_functions_are_drawn() -> None:
    deep = ";".join(["MainThread", *(f"f{i}" for i in range(2000))])
    assert len(boxes(flame_graph("t", "s", [(deep, 1)], 1))) == 2002
    wide = [(f"MainThread;f{i}", 1) for i in range(20_000)]
    svg = flame_graph("t", "s", wide, 20_000)
    assert all(box[2] >= NARROW_PX for box in boxes(svg).values())
    assert len(svg) < 100_000  # what nobody can see is left out


def test_nothing_at_all_is_a_picture_as_well() -> None:
    assert boxes(flame_graph("t", "s", [], 0)) == {}


def test_what_only_waits_is_left_out_unless_it_holds_up_the_loop() -> None:
    held_up = ("MainThread;kernel.a.sync;(waits)", 3)
    stacks = [("MainThread;(event loop)", 90), ("disk;kernel.b.h;(waits)", 99), held_up]
    assert busy(stacks) == [held_up]
    assert hot(busy(stacks), 100)[0][:2] == ("kernel.a.sync (waits)", 0.03)


def test_the_hot_ones_are_by_self_time_and_recursion_counts_once() -> None:
    found = hot([("MainThread;f;g;f", 4), ("MainThread;f;g", 6)], 20)
    assert found == [("g", 0.3, 0.5), ("f", 0.2, 0.5)]
