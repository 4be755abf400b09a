"""`make demo`: what Manifold does, in about twenty seconds, on this machine, leaving nothing.

Sixteen nodes of four classes come up; a million Collatz lengths are summed, while two of the nodes
are killed; then it is shown where the shards ran and why one of them ran there.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from manifold.kernel.config import load
from manifold.kernel.errors import NotFound
from manifold.shells.sdk import Client, Future
from manifold.shells.verbs.common import ProgressBar, human_ms, print_table
from manifold.tools.emulator.testing import TestCluster
from manifold.tools.emulator.verbs import throttle_notice
from manifold.vm.version import VERSION

NODES = 16
LO, HI = 1, 1_000_000
EXPECTED = 131434272
EXAMPLE = Path(__file__).parents[1] / "examples" / "collatz.ent"
KILLS = 2
# What to try next: a test runs exactly these lines.
TRY = (
    "import manifold",
    "m = manifold.connect(up=4)",
    "print(sum(m.map(lambda n: n * n, range(1000))))",
)


def say(text: str = "") -> None:
    print(text, flush=True)


def main() -> int:
    """Run the demo; 1 where the sum is wrong or anything is left behind."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mf-demo-", ignore_cleanup_errors=True) as folder:
        environ = os.environ | {
            "MANIFOLD_STATE_HOME": f"{folder}/state",
            "MANIFOLD_RUNTIME_DIR": f"{folder}/run",
            "MANIFOLD_CLUSTER": "demo",
        }
        kinds = Counter(kind.name for _, kind in load(None, {}, {}).spread(NODES))
        say(f"manifold {VERSION}: booting {NODES} nodes, one process each")
        booted = time.monotonic()
        cluster = TestCluster(NODES, environ)
        try:
            seconds = time.monotonic() - booted
            classes = ", ".join(f"{count} {name}" for name, count in kinds.items())
            say(f"  every node sees {NODES} alive after {seconds:.2f} s: {classes}")
            say(f"  {throttle_notice(cluster.supervisor)}")
            right = _work(cluster)
        finally:
            cluster.close()  # raises where a process, socket or group is left
    say(f"\nall {NODES} nodes have ended; no process, socket or file is left "
        f"({time.monotonic() - began:.0f} s in total)")  # fmt: skip
    say("\nnext:  .venv/bin/manifold up --nodes 16 --detach")
    say("       .venv/bin/manifold run examples/mandelbrot.ent --range 0:40 --json")
    say("       .venv/bin/manifold console")
    say("       .venv/bin/manifold node ls;  .venv/bin/manifold down")
    say("\nor paste three lines into .venv/bin/python:\n")
    say("\n".join(f"    {line}" for line in TRY))
    return 0 if right else 1


def _work(cluster: TestCluster) -> bool:
    client = cluster.client("server-01")
    say(f"\n$ manifold run examples/collatz.ent --range {LO}:{HI} --reduce sum")
    future = client.job(EXAMPLE, LO, HI, reduce="sum", name="examples/collatz.ent")
    bar = ProgressBar()
    _kill_two(cluster, client, future)
    result = client.wait(future, bar)
    bar.clear()
    status = future.status
    assert status is not None, "a job that is done has been heard of"
    say(f"{result}")
    verdict = "the exact sum" if result == EXPECTED else f"WRONG: {EXPECTED} is the sum"
    say(f"  {verdict} of the steps of {status.total:,} numbers in {human_ms(status.elapsed_ms)}; "
        f"{status.shards} shards, {status.retries} repeated")  # fmt: skip
    _where(client, future)
    return bool(result == EXPECTED)


def _kill_two(cluster: TestCluster, client: Client, future: Future) -> None:
    """Kill two nodes that hold shards of the job, as soon as they do, whatever its speed."""
    spared = {client.node}  # the owner: its death is another story
    while len(spared) <= KILLS and not future.done():
        try:
            live = client.status(future.job).live
        except NotFound:  # the submission is still on its way
            continue
        for shard in live:
            if shard.node and shard.node not in spared and len(spared) <= KILLS:
                spared.add(shard.node)
                pid = cluster.kill(shard.node)
                say(f"  killed {shard.node} (SIGKILL, pid {pid}); its work goes to the others")


def _where(client: Client, future: Future) -> None:
    decisions = client.why(future.job)
    placed: Counter[str] = Counter()
    classes: dict[str, str] = {}
    for decision in decisions:
        winner = decision.candidate(decision.winner)
        if winner is not None:
            placed[winner.alias] += 1
            classes[winner.alias] = winner.node_class
    say("\nwhere the shards ran:")
    rows = [(alias, classes[alias], count) for alias, count in sorted(placed.items())]
    print_table(["node", "class", "shards"], rows)
    shown = max(decisions, key=lambda decision: decision.work_gas)
    say(f"\n$ manifold why {shown.task.partition('.')[0]}")
    text = shown.text().splitlines()
    say("\n".join([*text[:12], *([f"  … {len(text) - 12} more"] if len(text) > 12 else [])]))


if __name__ == "__main__":
    sys.exit(main())
