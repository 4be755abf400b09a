"""Control flow: from a graph of blocks to `block`, `loop`, `if` and `br`.

Interface: `emit(graph, out)` writes every block through `out`, as structured code or, for a graph
that has no structured form or nests too deep, as a dispatch loop.
Source: Ramsey, "Beyond Relooper: recursive translation of unstructured control flow to structured
control flow" (ICFP 2022), figures 4 and 5. Difference: an explicit stack of work instead of
recursion, because programs may be deeper than Python's stack.
The dispatch loop is a binary tree of comparisons on the number of the next block, so it nests only
log2(blocks) deep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from manifold.vm.valid.graph import Graph

NESTING_MAX = 400  # blocks and loops inside each other; beyond, the dispatch loop takes over

Task = str | Callable[[], None]


class Writer(Protocol):
    """Who writes instructions."""

    def line(self, text: str) -> None:
        """Appends one line of text."""

    def block(self, at: int, short: str) -> bool | None:
        """Writes block `at`; None if it ends in no condition.

        Else it leaves an i32, and the block's jump is taken if that is true (or false, as it says).
        `short` is the label to branch to when its gas runs out; "" has it find more right there.
        """

    def refill(self, at: int) -> None:
        """Finds more gas for the loop whose header is block `at`, and goes there again."""

    def choose(self, yes: int | None, no: int | None, after: int) -> bool:
        """Writes a branch whose two sides meet in `after` without branching, if that is cheap.

        The i32 on the WebAssembly stack says which side's effects hold; None is an empty side.
        """


def emit(graph: Graph, out: Writer) -> bool:
    """Writes all blocks of `graph`, each path ending in a branch out of the function's body.

    True if that took a dispatch loop, which needs the i32 local `$pc`.
    """
    if graph.irreducible or _nesting(graph) > NESTING_MAX:
        dispatched(graph, out)
        return True
    structured(graph, out)
    return False


def _merges(graph: Graph) -> list[bool]:
    """Blocks that several forward edges reach: each becomes the end of a `block`."""
    return [
        sum(source < at for source in block.predecessors) > 1
        for at, block in enumerate(graph.blocks)
    ]


def _children(graph: Graph, merges: list[bool]) -> list[list[int]]:
    """For each block, the merge blocks that it immediately dominates, in order."""
    found: list[list[int]] = [[] for _ in graph.blocks]
    for at in range(1, len(graph.blocks)):
        if merges[at]:
            found[graph.dominator[at]].append(at)
    return found


def _nesting(graph: Graph) -> int:
    """How deep the structured form nests."""
    children = _children(graph, _merges(graph))
    depth = [0] * len(graph.blocks)
    for at in range(len(graph.blocks)):
        above = graph.dominator[at]
        inside = depth[above] if at else 0
        depth[at] = inside + len(children[at]) + 2 * (at in graph.parent) + 1
    return max(depth)


def structured(graph: Graph, out: Writer) -> None:
    """Ramsey's translation of a reducible graph.

    A loop finds more gas behind its body and then starts its header again. Were the call of the
    host in the header, with the way through the loop leading on from it, then the engine would
    have every value of the loop in memory there, to be loaded again in each round.
    """
    merges = _merges(graph)
    children = _children(graph, merges)
    work: list[Task] = []

    def later(tasks: list[Task]) -> None:
        work.extend(reversed(tasks))

    def tree(at: int) -> None:
        is_loop = at in graph.parent
        tasks: list[Task] = [f"loop $l{at}", f"block $g{at}"] if is_loop else []
        tasks += [f"block $b{each}" for each in reversed(children[at])]
        tasks.append(lambda: code(at))
        for each in children[at]:
            tasks += ["end", lambda each=each: tree(each)]  # type: ignore[misc]
        if is_loop:
            tasks += ["end", lambda: out.refill(at), "end"]
        later(tasks)

    def jump(at: int, to: int) -> str | None:
        """The label to branch to; None if the code of `to` belongs right here."""
        if to <= at:
            return f"$l{to}"
        return f"$b{to}" if merges[to] else None

    def go(at: int, to: int) -> Task:
        label = jump(at, to)
        return f"br {label}" if label else lambda: tree(to)

    def code(at: int) -> None:
        successors = graph.blocks[at].successors
        sense = out.block(at, f"$g{at}" if at in graph.parent else "")
        if sense is None:
            later([go(at, to) for to in successors])
            return
        yes, no = successors if sense else reversed(successors)
        taken, otherwise = jump(at, yes), jump(at, no)
        sides = _diamond(graph, yes, no, at)
        if sides is not None and out.choose(*sides):
            later([go(at, sides[2])])
        elif taken:
            later([f"br_if {taken}", go(at, no)])
        elif otherwise:
            later(["i32.eqz", f"br_if {otherwise}", go(at, yes)])
        else:
            later(["if", go(at, yes), "else", go(at, no), "end"])

    tree(0)
    while work:
        task = work.pop()
        if isinstance(task, str):
            out.line(task)
        else:
            task()


def _diamond(graph: Graph, yes: int, no: int, at: int) -> tuple[int | None, int | None, int] | None:
    """The two sides and the meeting point, if block `at` chooses between straight pieces.

    The meeting point must come later (it is no loop's header reached by a back edge from here).
    """

    def side(to: int) -> int | None:
        """Where the lone block `to` goes on, if it is a side."""
        block = graph.blocks[to]
        is_side = len(block.predecessors) == 1 and to > at and len(block.successors) == 1
        return block.successors[0] if is_side and block.successors[0] > to else None

    if yes == no:
        return None
    after_yes, after_no = side(yes), side(no)
    if after_yes is not None and after_yes == after_no:
        return yes, no, after_yes
    if after_yes == no and no > at:
        return yes, None, no
    if after_no == yes and yes > at:
        return None, no, yes
    return None


def dispatched(graph: Graph, out: Writer) -> None:
    """A loop that finds the next block by its number, in `$pc`."""

    def go(to: int) -> None:
        out.line(f"i32.const {to} local.set $pc br $dispatch")

    def leaf(at: int) -> None:
        successors = graph.blocks[at].successors
        sense = out.block(at, "")
        if sense is not None:
            yes, no = successors if sense else reversed(successors)
            out.line(f"if i32.const {yes} local.set $pc br $dispatch end")
            go(no)
        elif successors:
            go(successors[0])

    def search(low: int, high: int) -> None:
        """The blocks `[low, high)`; recursion is at most 16 deep (64 Ki blocks)."""
        if high - low == 1:
            leaf(low)
            return
        middle = (low + high) // 2
        out.line(f"local.get $pc i32.const {middle} i32.lt_u if")
        search(low, middle)
        out.line("else")
        search(middle, high)
        out.line("end")

    out.line("i32.const 0 local.set $pc loop $dispatch")
    search(0, len(graph.blocks))
    out.line("end")
