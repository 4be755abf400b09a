"""The map: nodes where their features put them, in two dimensions, drawn in characters; pure.

Where: principal components of the *different* kinds of nodes there are (so that the hundredth of a
kind, or its death, moves nothing), turned so that what weighs most grows to the right, and
upwards.
Each node then takes the free place nearest to its point, in order of alias; no two overlap.
How: a disc of braille dots; its area grows with capacity, it fills from below with load; what is
not ready differs by shape, so that nothing depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manifold.shells.console.messages import Node

AXES = ("compute", "speed of a core", "memory", "gpu")
GPU_OCTAVES = 2.0  # having one counts as much as four times the memory
ALIGNED = 1e-9
RADIUS_MAX, RADIUS_MIN = 7, 2  # dots; a cell is 2 by 4
# How large discs are, how labels are (2: whole, 1: their end, 0: none), and how full the map may be
# at most: where there is room discs grow, where there is little labels go first.
LEVELS = (
    (2.4, 2, 0.2), (1.9, 2, 0.22), (1.4, 2, 0.25), (1.0, 2, 0.5), (0.85, 2, 0.5), (0.85, 1, 0.5),
    (0.7, 1, 0.5), (0.7, 0, 0.5), (0.5, 0, 0.5), (0.3, 0, 1.0),
)  # fmt: skip
MARGIN_X, MARGIN_Y = 3, 1
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass(frozen=True, slots=True)
class Spot:
    """A node on the map, in cells: its disc's box, its label under it."""

    kid: str
    x: int
    y: int
    width: int
    height: int  # of the disc
    radius: int  # in dots
    label: str

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True, slots=True)
class Chart:
    """Where every node is. `right` and `up` say what grows that way."""

    width: int = 0
    height: int = 0
    spots: Mapping[str, Spot] = field(default_factory=dict)
    right: str = ""
    up: str = ""
    unplaced: int = 0

    def at(self, x: int, y: int) -> str:
        """The node at a cell; empty where none is."""
        for spot in self.spots.values():
            tall = spot.height + bool(spot.label)
            if spot.x <= x < spot.x + spot.width and spot.y <= y < spot.y + tall:
                return spot.kid
        return ""


def features(node: Node) -> tuple[float, float, float, float]:
    """Octaves of capacity, of a core's speed and of memory, and whether there is a GPU."""
    compute = max(node.compute, 1e-3)
    return (
        math.log2(max(1, node.cores) * compute), math.log2(compute),
        math.log2(max(node.memory_bytes, 1 << 20)), GPU_OCTAVES * node.gpu,
    )  # fmt: skip


def points(nodes: Sequence[Node]) -> tuple[dict[str, tuple[float, float]], str, str]:
    """Each node's place in the unit square (right, up), and what the two axes are."""
    if not nodes:
        return {}, "", ""
    kinds = np.array(sorted({features(node) for node in nodes}))
    middle = kinds.mean(axis=0)
    _, sizes, ways = np.linalg.svd(kinds - middle, full_matrices=True)
    first, second = ways[0], ways[1]
    first, second = _turned(first), _turned(second)
    flat = len(sizes) < 2 or sizes[1] < ALIGNED
    places = {}
    for node in nodes:
        apart = np.array(features(node)) - middle
        places[node.kid] = (float(apart @ first), 0.0 if flat else float(apart @ second))
    right = AXES[int(np.argmax(np.abs(first)))] if sizes[0] > ALIGNED else ""
    up = "" if flat else AXES[int(np.argmax(np.abs(second)))]
    return _normalised(places), right, up if up != right else ""


def _turned(way: Any) -> Any:
    """So that what weighs most in it grows; a way has no direction of its own."""
    return -way if way[int(np.argmax(np.abs(way)))] < 0 else way


def _normalised(places: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    found: list[dict[str, float]] = []
    for axis in (0, 1):
        values = [place[axis] for place in places.values()]
        low, span = min(values), max(values) - min(values)
        found.append({
            kid: (place[axis] - low) / span if span > ALIGNED else 0.5
            for kid, place in places.items()
        })  # fmt: skip
    return {kid: (found[0][kid], found[1][kid]) for kid in places}


def chart(nodes: Sequence[Node], width: int, height: int) -> Chart:
    """Every node in its place; the most legible level at which all of them fit."""
    if width < 4 or height < 2 or not nodes:
        return Chart(width, height, unplaced=len(nodes))
    where, right, up = points(nodes)
    ordered = sorted(nodes, key=lambda node: (node.alias, node.kid))
    best = Chart(width, height, {}, right, up, len(nodes))
    for scale, label, full in LEVELS:
        boxes = [_box(node, nodes, scale, label) for node in ordered]
        if sum((b[0] + 1) * (b[1] + b[2]) for b in boxes) > full * width * height:
            continue
        spots = _placed(ordered, boxes, where, width, height)
        missing = len(nodes) - len(spots)
        if missing < best.unplaced:
            best = Chart(width, height, spots, right, up, missing)
        if not missing:
            break
    return best


def _box(
    node: Node, nodes: Sequence[Node], scale: float, label: int
) -> tuple[int, int, int, int, str]:
    """Width and height of the disc's box in cells, rows of the label, radius, the label."""
    most = max(max(1, n.cores) * n.compute for n in nodes)
    share = math.sqrt(max(1, node.cores) * node.compute / most)
    radius = max(RADIUS_MIN, round(RADIUS_MAX * scale * share))
    text = node.alias if label == 2 else node.alias.rpartition("-")[2] if label else ""
    cells = -(-(2 * radius + 1) // 2)
    return max(cells, len(text)), -(-(2 * radius + 1) // 4), bool(text), radius, text


def _placed(
    nodes: Sequence[Node],
    boxes: Sequence[tuple[int, int, int, int, str]],
    where: Mapping[str, tuple[float, float]],
    width: int,
    height: int,
) -> dict[str, Spot]:
    taken = [0] * height  # a bit for each cell of a row
    spots = {}
    for node, (wide, tall, rows, radius, label) in zip(nodes, boxes, strict=True):
        right, up = where[node.kid]
        room_x, room_y = width - wide, height - tall - rows
        if room_x < 0 or room_y < 0:
            continue
        x = round(min(MARGIN_X, room_x // 2) + right * max(0, room_x - 2 * MARGIN_X))
        y = round(min(MARGIN_Y, room_y // 2) + (1 - up) * max(0, room_y - 2 * MARGIN_Y))
        found = _free(taken, x, y, wide, tall + rows, room_x, room_y)
        if found is None:
            continue
        x, y = found
        mask = ((1 << (wide + 1)) - 1) << x  # and a blank at the right
        for row in range(y, y + tall + rows):
            taken[row] |= mask
        spots[node.kid] = Spot(node.kid, x, y, wide, tall, radius, label)
    return spots


def _free(
    taken: Sequence[int], x: int, y: int, wide: int, tall: int, room_x: int, room_y: int
) -> tuple[int, int] | None:
    """The free place nearest to (x, y); a row counts as two columns, as it looks."""
    mask = (1 << (wide + 1)) - 1
    best: tuple[int, int, int] | None = None
    for row in sorted(range(room_y + 1), key=lambda r: (abs(r - y), r)):
        away = 4 * (row - y) ** 2
        if best is not None and away >= best[0]:
            break
        together = 0
        for each in taken[row : row + tall]:
            together |= each
        for column in sorted(range(room_x + 1), key=lambda c: (abs(c - x), c)):
            cost = away + (column - x) ** 2
            if best is not None and cost >= best[0]:
                break
            if not together >> column & mask:
                best = (cost, column, row)
                break
    return None if best is None else (best[1], best[2])


# -- drawing --------------------------------------------------------------------------------------


def disc(spot: Spot, load: float, state: str) -> list[str]:
    """The rows of a node's disc, of `spot.width` cells."""
    cells = -(-(2 * spot.radius + 1) // 2)
    bits = [[0] * cells for _ in range(spot.height)]
    radius = spot.radius
    level = radius - 2 * radius * max(0.0, min(1.0, load))  # fills from below, as a glass
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            away = math.hypot(dx, dy)
            edge = abs(away - radius) < 0.5
            if state == "dead":
                on = abs(abs(dx) - abs(dy)) < 1 and away <= radius
            elif state in ("suspect", "left"):
                on = edge and (dx + dy) % 3 == 0
            else:
                on = edge or (away < radius and dy > level and load > 0)
            if on:
                column, row = (dx + radius) // 2, (dy + radius) // 4
                bits[row][column] |= BRAILLE[(dy + radius) % 4][(dx + radius) % 2]
    before = (spot.width - cells) // 2
    return [
        " " * before + "".join(chr(0x2800 + each) if each else " " for each in row)
        + " " * (spot.width - cells - before)
        for row in bits
    ]  # fmt: skip
