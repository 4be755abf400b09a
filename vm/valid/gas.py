"""The gas plan: how much is charged, and where. The same plan in both back ends.

Interface: `plan(program, graph) -> Plan`, `clearing(program) -> int`.
Rules (docs/entangle.md, "Gas"):
  - a function charges `entry` when it starts (the main program: at every index, with `clearing`);
  - a loop charges at its header, at every arrival, the costliest path through its own body; what
    belongs to an inner loop is charged by the inner header;
  - an irreducible function charges every block when it is entered, and nothing at its entry.
So between two charges a program never does more than it has paid for, and loops always pay.
"""

from __future__ import annotations

from dataclasses import dataclass

from manifold.vm.syntax.program import Program
from manifold.vm.valid.graph import Block, Graph

ARRAY_BYTES_PER_GAS = 64  # clearing memory runs at tens of bytes a nanosecond


@dataclass(frozen=True, slots=True)
class Plan:
    """`headers` maps the first instruction of a charging block to its charge."""

    entry: int
    headers: dict[int, int]


def plan(program: Program, graph: Graph) -> Plan:
    """The plan of one function."""
    costs = [_cost(program, block) for block in graph.blocks]
    if graph.irreducible:
        return Plan(0, {b.start: c for b, c in zip(graph.blocks, costs, strict=True)})
    longest = _longest(graph, costs)
    entry, headers = 0, dict.fromkeys(graph.parent, 0)
    for at, cost in enumerate(longest):
        header = graph.loop[at]
        if header < 0:
            entry = max(entry, cost)
        else:
            headers[header] = max(headers[header], cost)
    return Plan(entry, {graph.blocks[at].start: cost for at, cost in headers.items()})


def clearing(program: Program) -> int:
    """What an index pays before it starts, for clearing the arrays that the program writes."""
    return sum(
        -(-8 * program.arrays[each].length // ARRAY_BYTES_PER_GAS)
        for each in written_arrays(program)
    )


def written_arrays(program: Program) -> list[int]:
    """The arrays that some instruction writes."""
    code = program.instructions
    return sorted({int(each.operand or 0) for each in code if each.spec.name == "STOREI"})


def _cost(program: Program, block: Block) -> int:
    return sum(each.spec.gas for each in program.instructions[block.start : block.end])


def _longest(graph: Graph, costs: list[int]) -> list[int]:
    """Each block's costliest path from the header of its innermost loop, itself included.

    One pass in reverse postorder. `outside[h]` is what had been spent in the loop around h when h
    was reached; a path that leaves the loop of h goes on from there, the loop itself costing
    nothing to the outside.
    """
    longest = [0] * len(costs)
    outside = dict.fromkeys(graph.parent, 0)

    def spent(at: int, around: int) -> int:
        """What a path ending in block `at` has cost the loop `around`."""
        header = graph.loop[at]
        if header == around:
            return longest[at]
        while header >= 0 and graph.parent[header] != around:
            header = graph.parent[header]
        return outside[header]

    for at, block in enumerate(graph.blocks):
        forward = [source for source in block.predecessors if source < at]
        if at in outside:
            around = graph.parent[at]
            outside[at] = max((spent(source, around) for source in forward), default=0)
            longest[at] = costs[at]
        else:
            around = graph.loop[at]
            longest[at] = costs[at] + max((spent(s, around) for s in forward), default=0)
    return longest
