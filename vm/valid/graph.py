"""Control-flow graphs: basic blocks, dominators, loops.

Interface: `explore(program, entry)` finds the blocks that control reaches from one entry;
`shape(graph)` adds dominators and the loop nest, or says that the graph is irreducible.
Sources: Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm" (2001), figure 3; loop
nesting after Havlak, "Nesting of Reducible and Irreducible Loops" (1997), reducible case only.
Invariants:
  G1  `blocks` stand in reverse postorder, the entry first;
  G2  in a reducible graph every edge to a block at or before its source goes to a dominator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from manifold.vm.errors import InvalidProgram
from manifold.vm.syntax.isa import Immediate
from manifold.vm.syntax.program import Program

DOMINATOR_STEPS_MAX = 4_000_000  # about a second; the algorithm is quadratic on hostile graphs
LOOP_DEPTH_MAX = 64  # deeper nests are treated as irreducible: correct, but slower code


@dataclass(slots=True)
class Block:
    """A straight run of instructions `[start, end)`; `successors` are ordinals of blocks."""

    start: int
    end: int
    successors: tuple[int, ...] = ()
    predecessors: list[int] = field(default_factory=list)
    types: str = ""  # what is on the stack on entry, bottom first; set by the verifier


@dataclass(slots=True)
class Graph:
    """The blocks of one function in reverse postorder, and their shape."""

    entry: int
    blocks: list[Block]
    irreducible: bool = False
    dominator: list[int] = field(default_factory=list)  # immediate; the entry's is itself
    loop: list[int] = field(default_factory=list)  # innermost loop's header, or -1
    parent: dict[int, int] = field(default_factory=dict)  # header -> header around it, or -1


def explore(program: Program, entry: int) -> Graph:
    """The graph of what `entry` reaches. Refuses falling off the end."""
    leaders = _reach(program, entry)
    ends: dict[int, int] = {}
    for start in sorted(leaders):
        at = start
        while True:
            spec = program.instructions[at].spec
            at += 1
            if spec.ends or spec.immediate is Immediate.LABEL or at in leaders:
                break
        ends[start] = at
    return _ordered(program, entry, ends)


def _reach(program: Program, entry: int) -> set[int]:
    """The instructions that start blocks, of all that control reaches."""
    leaders, work = {entry}, [entry]
    seen: set[int] = set()
    while work:
        at = work.pop()
        while at not in seen:
            if at >= len(program.instructions):
                raise _falls_off(program)
            seen.add(at)
            each = program.instructions[at]
            if each.spec.immediate is Immediate.LABEL:
                target = int(each.operand or 0)
                leaders.add(target)
                work.append(target)
                if not each.spec.ends:
                    leaders.add(at + 1)
            if each.spec.ends:
                break
            at += 1
    return leaders


def _falls_off(program: Program) -> InvalidProgram:
    last = program.instructions[-1]
    return InvalidProgram(
        f"{program.filename or 'program'}, line {last.line}: control can run past the last "
        f"instruction, {program.text_of(len(program.instructions) - 1)}.",
        "End with HALT, RET or JMP, and let no label stand behind the last instruction.",
        line=last.line,
        instruction=program.text_of(len(program.instructions) - 1),
    )


def _after(program: Program, end: int) -> tuple[int, ...]:
    """Where control goes after the instruction before `end`."""
    last = program.instructions[end - 1]
    if last.spec.immediate is Immediate.LABEL:
        target = int(last.operand or 0)
        return (target,) if last.spec.ends else (target, end)
    return () if last.spec.ends else (end,)


def _ordered(program: Program, entry: int, ends: dict[int, int]) -> Graph:
    """Numbers the blocks in reverse postorder (an explicit stack: programs may be deep)."""
    order: list[int] = []
    entered = {entry}
    stack = [(entry, iter(_after(program, ends[entry])))]
    while stack:
        start, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            order.append(start)
            stack.pop()
        elif following not in entered:
            entered.add(following)
            stack.append((following, iter(_after(program, ends[following]))))
    order.reverse()
    ordinal = {start: at for at, start in enumerate(order)}
    blocks = [Block(start, ends[start]) for start in order]
    for at, block in enumerate(blocks):
        block.successors = tuple(ordinal[to] for to in _after(program, block.end))
        for to in block.successors:
            blocks[to].predecessors.append(at)
    return Graph(entry, blocks)


def shape(graph: Graph) -> None:
    """Finds dominators and loops; sets `irreducible` where structured code cannot be had."""
    if not _dominators(graph) or not _is_reducible(graph) or not _loops(graph):
        graph.irreducible = True
        graph.loop = [-1] * len(graph.blocks)
        graph.parent = {}


def _dominators(graph: Graph) -> bool:
    """False when it takes too long."""
    blocks, steps = graph.blocks, 0
    dominator = [-1] * len(blocks)
    dominator[0] = 0
    changed = True
    while changed:
        changed = False
        for at in range(1, len(blocks)):
            new = -1
            for source in blocks[at].predecessors:
                if dominator[source] < 0:
                    continue
                if new < 0:
                    new = source
                    continue
                left, right = source, new
                while left != right:
                    steps += 1
                    if left > right:
                        left = dominator[left]
                    else:
                        right = dominator[right]
                new = left
            if dominator[at] != new:
                dominator[at] = new
                changed = True
            if steps > DOMINATOR_STEPS_MAX:
                return False
    graph.dominator = dominator
    return True


def _is_reducible(graph: Graph) -> bool:
    """G2, by intervals of a walk over the dominator tree."""
    enter, leave = _intervals(graph)
    return all(
        enter[to] <= enter[at] and leave[at] <= leave[to]
        for at, block in enumerate(graph.blocks)
        for to in block.successors
        if to <= at
    )


def _intervals(graph: Graph) -> tuple[list[int], list[int]]:
    """`a` dominates `b` exactly if b's interval lies within a's."""
    count = len(graph.blocks)
    size = [1] * count
    for at in range(count - 1, 0, -1):  # children come after parents in reverse postorder
        size[graph.dominator[at]] += size[at]
    enter, used = [0] * count, [1] * count
    for at in range(1, count):
        above = graph.dominator[at]
        enter[at] = enter[above] + used[above]
        used[above] += size[at]
    return enter, [start + width for start, width in zip(enter, size, strict=True)]


def _loops(graph: Graph) -> bool:
    """The innermost loop of every block; False if loops nest too deep."""
    count = len(graph.blocks)
    loop, parent = [-1] * count, {}
    outer = list(range(count))  # union-find: a block stands for the outermost loop found around it

    def find(at: int) -> int:
        while outer[at] != at:
            outer[at] = outer[outer[at]]
            at = outer[at]
        return at

    for header in range(count - 1, -1, -1):  # inner headers come later, so they are found first
        sources = [s for s in graph.blocks[header].predecessors if s >= header]
        if not sources:
            continue
        parent[header] = -1
        body, work = set(), [find(s) for s in sources]
        while work:
            at = work.pop()
            if at == header or at in body:
                continue
            body.add(at)
            work.extend(find(s) for s in graph.blocks[at].predecessors)
        for at in sorted(body):
            outer[at] = header
            if at in parent:
                parent[at] = header
            else:
                loop[at] = header
        loop[header] = header
    graph.loop, graph.parent = loop, parent
    return max((_depth(parent, header) for header in parent), default=0) <= LOOP_DEPTH_MAX


def _depth(parent: dict[int, int], header: int) -> int:
    depth = 0
    while header >= 0 and depth <= LOOP_DEPTH_MAX:
        header = parent[header]
        depth += 1
    return depth
