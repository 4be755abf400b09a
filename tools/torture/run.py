"""`manifold torture nexus`: a private cluster, clients of registers, a nemesis, a verdict.

Interface: `torture(options, say)` runs everything and returns a `Report`; `say` is given lines for
people while it goes on. Whatever happens, Ctrl-C included, no process and no file of it is left,
but for the history of a key that was found wrong, which is written where `options.folder` says.
Course: start nodes with disks that lose what was not synced; wait until Nexus answers at each;
start clients, in processes of their own; let the nemesis carry out its plan; heal; within HEALED_S
every node must have read and written every hot key and its part of the cold ones; judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from manifold.tools.torture.plan import plan
from manifold.tools.torture.registers import Registers
from manifold.tools.torture.report import Options, Report
from manifold.tools.torture.stage import Scene, staged

CLIENTS_PER_NODE = 2
CLIENTS_END_S = 15.0  # a client ends with its operation: TRIES_MAX of PATIENCE_MS


async def torture(options: Options, say: Callable[[str], None]) -> Report:
    """See the module."""
    report = Report(options.seed, options.seconds, options.nodes, options.voters)
    scene = Scene(options.nodes, options.voters, keep=options.keep)
    async with staged(scene, report, say) as stage:
        await stage.up()
        registers = Registers(stage, options.seed, CLIENTS_PER_NODE)
        await registers.start()
        begun_ms = stage.now_ms()
        steps = plan(options.seed, options.seconds, options.nodes, options.voters)
        await stage.attack(steps, begun_ms)
        await stage.heal(steps[-1])
        await registers.settle()
        await asyncio.to_thread(stage.end_clients, CLIENTS_END_S)
        await registers.read_all()
        registers.collect(begun_ms, options.folder / f"torture-nexus-{options.seed}.jsonl")
        stage.check_ends()
    return report
