"""The bar above, the banner of a lost cluster, and the keys below; pure."""

from __future__ import annotations

from manifold.shells.console.figures import age, spark
from manifold.shells.console.model import Model
from manifold.shells.console.ribbon import Part
from manifold.shells.console.theme import Line

PANES = ("shell", "nodes", "jobs", "map", "log")
STALE_MS = 5_000  # a look a second or two, and an answer that took its time
TOLD_MAX = 60


def status_bar(
    model: Model, pane: str, width: int, *, read_only: bool
) -> tuple[list[Part], list[Part]]:
    """Panes at the left, how the cluster is at the right."""
    left: list[Part] = []
    for number, name in enumerate(PANES, 1):
        style = "tab" if name == pane else "dim"
        left.append((((f" {number} {name} ", style),), f"app.pane('{name}')"))
    ready, all_ = model.count("ready"), len(model.nodes)
    busy, slots = model.slots()
    running = len(model.running())
    right: list[Part] = []
    if read_only:
        right.append(((("looks only  ", "warn"),), ""))
    if model.lost is None and model.attached is not None:
        if width > 110:
            right.append((((f"{model.attached.cluster}:{model.attached.node}  ", "dim"),), ""))
        history = spark(model.total_busy(), 16 if width > 100 else 8)
        right.append((((history, "accent"), ("  ", "")), ""))
        right.append(
            (((f"{busy}", "accent bold" if busy else "dim"), (f"/{slots} busy  ", "dim")), "")
        )
        jobs = ((str(running), "accent bold" if running else "dim"), (" running  ", "dim"))
        right.append((jobs, "app.pane('jobs')"))
        well = ready == all_
        style = "ok" if well else "warn bold"
        right.append((((f"● {ready}" if well else f"▲ {ready}", style), (f"/{all_} nodes ", "dim")),
                      "app.pane('nodes')"))  # fmt: skip
    elif model.lost is not None:
        right.append(((("✕ no cluster ", "bad bold"),), ""))
    else:
        right.append(((("connecting ", "dim"),), ""))
    return left, right


def banner(model: Model, now_ms: int) -> Line:
    """What stands above everything while what is shown is old."""
    if model.lost is not None:
        if not model.looked_ms:
            return ((" ✕ ", "alarm"), (f" {model.lost.why} ", "bad"), (model.lost.next, "dim"))
        old = age(model.age_ms(now_ms))
        return (
            (" ✕ LOST ", "alarm"), (f" {model.lost.why}", "bad"),
            (f"  as of {old} ago; tries again by itself", "dim"),
        )  # fmt: skip
    if model.looked_ms and model.age_ms(now_ms) > STALE_MS:
        return (
            (" ! OLD ", "caution"), (f" as of {age(model.age_ms(now_ms))} ago", "warn"),
            ("  nobody answers at present", "dim"),
        )  # fmt: skip
    if model.silent:
        names = ", ".join(model.silent[:4]) + (" …" if len(model.silent) > 4 else "")
        return ((" ! ", "caution"), (f" no answer from {names}", "warn"))
    return ()


KEYS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "shell": (("Tab", "complete, next pane", "app.turn(1)"), ("↑", "history", ""),
              ("^R", "search", ""), ("^P", "palette", "app.command_palette"),
              ("F1", "help", "app.help"), ("^Q", "leave", "app.quit")),
    "nodes": (("⏎", "open", ""), ("i", "inspect", "app.inspect"), ("l", "log", "app.node_log"),
              ("p", "ps", "app.node_ps"), ("/", "filter", ""), ("A-Z", "sort", ""),
              ("?", "help", "app.help")),
    "jobs": (("⏎", "shards", ""), ("w", "why", "app.why"), ("x", "kill", "app.kill"),
             ("/", "filter", ""), ("A-Z", "sort", ""), ("?", "help", "app.help")),
    "map": (("arrows", "walk", ""), ("⏎", "open", ""), ("?", "help", "app.help")),
    "log": (("f", "follow", ""), ("/", "filter", ""), ("PgUp", "older", ""), ("w", "wrap", ""),
            ("y", "copy", ""), ("?", "help", "app.help")),
}  # fmt: skip
OPENED = (("esc", "back", ""), ("i", "inspect", "app.inspect"), ("y", "copy", ""),
          ("?", "help", "app.help"))  # fmt: skip
BUSY = (("^C", "stop it", "app.copy_or_interrupt"), ("F3", "nodes", "app.pane('nodes')"),
        ("F4", "jobs", "app.pane('jobs')"), ("F1", "help", "app.help"))  # fmt: skip


def keys_of(
    pane: str, told: str, *, busy: bool, opened: bool, read_only: bool
) -> tuple[list[Part], list[Part]]:
    """The keys of a pane, and the verb that the last one ran."""
    keys = BUSY if busy and pane == "shell" else KEYS[pane]
    if opened and pane == "nodes":
        keys = OPENED
    elif opened:
        keys = (("esc", "back", ""), *KEYS["jobs"][1:3], *KEYS["jobs"][-1:])
    if read_only:
        keys = tuple(key for key in keys if key[2] != "app.kill")
    left: list[Part] = [
        (((f" {key}", "key"), (f" {label} ", "dim")), action) for key, label, action in keys
    ]
    shown = told if len(told) <= TOLD_MAX else told[: TOLD_MAX - 1] + "…"
    return left, [(((f"{shown} ", "dim"),), "")] if told and pane != "shell" else []
