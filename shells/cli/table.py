"""The table of verbs: name -> where it is defined and what it says in `manifold --help`.

A verb is defined once, as a click command; its module is imported when the verb is used, which
keeps `manifold ps` fast. Verbs of a higher floor (tools, images) are named here and live there.
"""

from __future__ import annotations

# Group of verbs, for the help page: verb -> (module:attribute, one line)
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "cluster": {
        "up": ("manifold.tools.emulator.verbs:up", "Start a cluster on this machine."),
        "down": ("manifold.tools.emulator.verbs:down", "End it; nothing is left behind."),
        "status": ("manifold.shells.verbs.cluster:status", "How the cluster is."),
        "agent": ("manifold.tools.emulator.verbs:agent", "Run one node in the foreground."),
        "net": ("manifold.tools.emulator.net:net", "Links: ls, slow, cut, partition, heal."),
        "node": ("manifold.tools.emulator.node_verbs:node", "Who is there; add, remove, hurt."),
    },
    "work": {
        "run": ("manifold.shells.verbs.run:run", "Run a program, a script or a WASI command."),
        "jobs": ("manifold.shells.verbs.work:jobs", "Jobs that run or ran."),
        "ps": ("manifold.shells.verbs.work:ps", "What every worker computes now."),
        "kill": ("manifold.shells.verbs.work:kill", "Cancel a job."),
        "why": ("manifold.shells.verbs.work:why", "Why a job's shards went where they went."),
    },
    "state": {
        "get": ("manifold.shells.verbs.globals:get", "What a global holds."),
        "set": ("manifold.shells.verbs.globals:set_", "Set a global."),
        "cas": ("manifold.shells.verbs.globals:cas", "Set it if it holds what is expected."),
        "add": ("manifold.shells.verbs.globals:add", "Add to a number."),
        "del": ("manifold.shells.verbs.globals:del_", "Delete a global."),
        "watch": ("manifold.shells.verbs.tree:watch", "A line for each change."),
        "ls": ("manifold.shells.verbs.tree:ls", "What is in a folder; names and values."),
        "cat": ("manifold.shells.verbs.tree:cat", "Print anything of the namespace."),
        "nexus": ("manifold.shells.verbs.nexus:nexus", "Who agrees: status, voters, verify."),
    },
    "programs": {
        "asm": ("manifold.shells.verbs.programs:asm", "Assemble and verify a program."),
        "disasm": ("manifold.shells.verbs.programs:disasm", "Show a program's instructions."),
    },
    "observe": {
        "console": ("manifold.shells.verbs.console:console", "A prompt, and live panes."),
        "top": ("manifold.shells.verbs.console:top", "The console, on the nodes."),
        "web": ("manifold.shells.web.verbs:web", "The console in a browser, behind a token."),
        "record": ("manifold.shells.verbs.console:record", "Record what happens, for replay."),
        "replay": ("manifold.shells.verbs.console:replay", "Show a recording in the console."),
        "logs": ("manifold.shells.verbs.observe:logs", "Logs of every node, in order of time."),
        "metrics": (
            "manifold.shells.verbs.metrics:metrics",
            "A node's metrics; all scrape targets.",
        ),
        "profile": ("manifold.shells.verbs.profile:profile", "A flame graph of a node at work."),
        "tail": ("manifold.shells.verbs.tree:tail", "The last lines of a log, and what comes."),
        "export": ("manifold.shells.verbs.export:export", "A whole table, as CSV or JSON."),
        "sim": ("manifold.tools.simulator.verbs:sim", "Simulate a cluster from a seed."),
        "torture": ("manifold.tools.torture.verbs:verb", "Hurt a cluster, and judge what it says."),
        "bench": ("manifold.tools.bench.verbs:bench", "Measure, against peers and limits."),
        "completion": ("manifold.shells.verbs.shell:completion", "Completion for your shell."),
        "version": ("manifold.shells.verbs.shell:version", "Versions of what runs here."),
    },
}
VERBS: dict[str, tuple[str, str]] = {
    name: entry for group in GROUPS.values() for name, entry in group.items()
}
