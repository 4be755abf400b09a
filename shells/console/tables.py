"""What the panes show of a model: rows of nodes and jobs, and pages of one of them; pure."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from manifold.shells.console import messages as e
from manifold.shells.console.figures import age, amount, area, bar, coarse, plural, size, spark
from manifold.shells.console.model import Model
from manifold.shells.console.theme import Line, Span
from manifold.shells.console.view import Column, Row

GLYPHS = {
    "ready": ("●", "ok"),
    "suspect": ("?", "warn"),
    "dead": ("✕", "bad"),
    "left": ("○", "dim"),
}
JOB_GLYPHS = {
    "running": ("▶", "accent"), "done": ("✓", "ok"), "failed": ("✕", "bad"),
    "cancelled": ("■", "dim"), "queued": ("◌", "warn"),
}  # fmt: skip
SPARK_WIDTH = 12

NODE_COLUMNS = (
    Column("alias", "node", 12, rank=99, grows=True, letter="a"),
    Column("class", "class", 7, rank=45, letter="c"),
    Column("state", "state", 9, rank=98, letter="s"),
    Column("busy", "busy", 12, rank=97, letter="b"),
    Column("load", "load", SPARK_WIDTH, rank=90, letter="l"),
    Column("queue", "queue", 5, right=True, rank=80, letter="u"),
    Column("memory", "mem", 5, right=True, rank=40, letter="m"),
    Column("speed", "gas/s", 5, right=True, rank=3, letter="p"),
    Column("sees", "sees", 4, right=True, rank=2),
    Column("work", "proc", 4, right=True, rank=1),
    Column("up", "up", 5, right=True, rank=50, letter="t"),
)
JOB_COLUMNS = (
    Column("job", "job", 18, rank=99, letter="i"),
    Column("state", "state", 11, rank=98, letter="s"),
    Column("done", "done", 16, rank=97, letter="d"),
    Column("rate", "rate", SPARK_WIDTH, rank=20),
    Column("total", "indices", 7, right=True, rank=10, letter="n"),
    Column("shards", "shards", 6, right=True, rank=30, letter="h"),
    Column("retries", "retry", 5, right=True, rank=25, letter="r"),
    Column("time", "time", 6, right=True, rank=60, letter="t"),
    Column("owner", "owner", 12, rank=9, letter="o"),
    Column("what", "what", 8, rank=70, grows=True, letter="w"),
)


def glyph(table: dict[str, tuple[str, str]], state: str) -> Line:
    mark, style = table.get(state, ("·", "dim"))
    return ((f"{mark} ", style), (state, style if state not in ("ready", "done") else ""))


def load_style(share: float) -> str:
    """A node that is busy altogether is well: it is what it is there for."""
    return "ok" if share >= 1 else "accent" if share > 0 else "faint"


def busy_cell(busy: int, slots: int, width: int = 12) -> Line:
    """`████▌    5/8`: the bar, and the slots in words."""
    words = f"{busy}/{slots}"
    room = width - len(words) - 1
    full, rest = bar(busy / slots if slots else 0.0, room)
    words_style = "" if busy else "dim"
    share = busy / slots if slots else 0.0
    return ((full, load_style(share)), (rest, "faint"), (f" {words}", words_style))


# -- nodes ----------------------------------------------------------------------------------------


def node_rows(model: Model, now_ms: int) -> list[tuple[str, Row]]:
    """A row of cells for each node, by its KID."""
    return [(node.kid, _node_row(model, node, now_ms)) for node in model.nodes.values()]


def _node_row(model: Model, node: e.Node, now_ms: int) -> Row:
    load = model.loads.get(node.kid, e.Load())
    ready = node.state == "ready"
    name = "" if ready else "dim"
    me = model.attached is not None and model.attached.node == node.alias and not model.lost
    history = model.busy.get(node.kid, ())
    return {
        "alias": ((node.alias, f"{name} bold".strip() if me else name),),
        "class": ((node.node_class, "dim"),),
        "state": glyph(GLYPHS, node.state),
        "busy": busy_cell(load.busy, node.cores) if ready else ((f"{node.cores} slots", "faint"),),
        "load": ((spark(list(history), SPARK_WIDTH), load_style(model.share(node.kid))),),
        "queue": ((amount(load.queued_gas) if load.queued_gas else "·", _quiet(load.queued_gas)),),
        "memory": ((size(node.memory_bytes), "dim"),),
        "speed": ((amount(load.gas_per_s) if load.gas_per_s else "·", _quiet(load.gas_per_s)),),
        "sees": ((str(node.alive or "·"), "dim"),),
        "work": ((str(load.workers or "·"), _quiet(load.workers)),),
        "up": ((coarse(now_ms - node.started_ms) if node.started_ms and ready else "·", "dim"),),
    }


def _quiet(value: float) -> str:
    return "" if value else "faint"


def node_sort(model: Model, column: str) -> Callable[[str], Any]:
    """What to sort KIDs by."""
    nodes, loads = model.nodes, model.loads
    none = e.Load()
    by: dict[str, Callable[[e.Node], Any]] = {
        "class": lambda n: n.node_class, "state": lambda n: n.state,
        "busy": lambda n: loads.get(n.kid, none).busy, "load": lambda n: model.share(n.kid),
        "queue": lambda n: loads.get(n.kid, none).queued_gas, "memory": lambda n: n.memory_bytes,
        "speed": lambda n: loads.get(n.kid, none).gas_per_s, "up": lambda n: -n.started_ms,
        "sees": lambda n: n.alive, "work": lambda n: loads.get(n.kid, none).workers,
    }  # fmt: skip
    key: Callable[[e.Node], Any] = by.get(column, _alias)
    return lambda kid: key(nodes[kid])


def _alias(node: e.Node) -> str:
    return node.alias


def node_page(model: Model, kid: str, now_ms: int, width: int) -> list[Line]:
    """Everything that is known of a node."""
    node = model.nodes.get(kid)
    if node is None:
        return [(("The node is not known any more.", "dim"),)]
    load = model.loads.get(kid, e.Load())
    runs = model.runs.get(node.alias, ())
    history = list(model.busy.get(kid, ()))
    spark_width = max(10, min(60, width - 14))
    lines: list[Line] = [
        ((node.alias, "bold"), (f"  {node.node_class}  ", "dim"), *glyph(GLYPHS, node.state)),
        (),
        _fact("id", node.kid),
        _fact("slots", f"{load.busy} busy of {node.cores}, {node.compute:g} core each"
              + (f", {node.throttle}" if node.throttle not in ("", "none") else "")),
        (*_label("load"), (spark(history, spark_width).lstrip(), load_style(model.share(kid)))),
        _fact("queue", f"{amount(load.queued_gas)} gas" if load.queued_gas else "empty"),
        _fact("speed", f"{amount(load.gas_per_s)} gas/s a slot" if load.gas_per_s else "unknown"),
        _fact("memory", size(node.memory_bytes)
              + (f", {size(load.free_memory_bytes)} free" if load.free_memory_bytes >= 0 else "")),
        _fact("sees", f"{node.alive} nodes alive"),
        _fact("process", f"{node.pid}, boot {node.boot}, {plural(load.workers, 'worker')}"),
        _fact("up", age(now_ms - node.started_ms) if node.started_ms else "unknown"),
    ]  # fmt: skip
    if node.labels:
        lines.append(_fact("labels", "  ".join(node.labels)))
    if node.gpu:
        lines.append(_fact("gpu", "yes"))
    if node.bad_messages:
        lines.append((*_label("bad"), (f"{node.bad_messages} messages refused", "warn")))
    lines += [(), ((f"runs {plural(len(runs), 'shard')}" if runs else "runs nothing", "head"),)]
    lines += [_run_line(run, now_ms) for run in runs[:64]]
    logged = [line for alias, line in model.logs if alias == node.alias][-200:]
    lines += [(), (("its log", "head"),)]
    lines += [log_line("", line) for line in logged] or [(("nothing yet", "faint"),)]
    return lines


def _label(name: str) -> Line:
    return ((f"  {name:<10}", "dim"),)


def _fact(name: str, value: str) -> Line:
    return (*_label(name), (value, ""))


def _run_line(run: e.Run, now_ms: int) -> Line:
    where = f"slot {run.slot}" if run.slot >= 0 else "waits "
    since = age(now_ms - run.since_ms) if run.since_ms else ""
    return (
        (f"  {where:<8}", "" if run.slot >= 0 else "warn"),
        (f"{run.job}/{run.shard:<4}", "accent"),
        (f" blocks {run.first}..{run.last}  {since:>6}  ", "dim"), (run.what, ""),
    )  # fmt: skip


def cluster_chart(model: Model, width: int, height: int) -> list[Line]:
    """The history of the whole cluster's load, as an area under its title."""
    busy, slots = model.slots()
    queued = sum(load.queued_gas for load in model.loads.values())
    waits = f"  {amount(queued)} gas queued" if queued else ""
    title: Line = (
        (" cluster", "head"), (f"  {busy} of {plural(slots, 'slot')} busy{waits}", "dim"),
    )  # fmt: skip
    rows = area(model.total_busy(), width - 2, height - 1)
    return [title, *(((f" {row}", "accent"),) for row in rows)]


# -- jobs -----------------------------------------------------------------------------------------


def job_rows(model: Model, now_ms: int) -> list[tuple[str, Row]]:
    """A row of cells for each job, by its id."""
    return [(job.job, _job_row(model, job, now_ms)) for job in model.jobs.values()]


def job_age_ms(model: Model, job: e.Job, now_ms: int) -> int:
    """How long it runs, or ran; what is known may be old."""
    if job.state != "running":
        return model.progress.get(job.job, e.Progress()).elapsed_ms
    return max(0, (model.looked_ms if model.lost else now_ms) - job.started_ms)


def _job_row(model: Model, job: e.Job, now_ms: int) -> Row:
    progress = model.progress.get(job.job, e.Progress())
    runs = job.state == "running"
    rates = list(model.rates.get(job.job, ()))
    share = progress.done / job.total if job.total else 0.0
    full, rest = bar(share, 11)
    style = "accent" if runs else JOB_GLYPHS.get(job.state, ("", "dim"))[1]
    return {
        "job": ((job.job, "" if runs else "dim"),),
        "state": glyph(JOB_GLYPHS, job.state),
        "done": ((full, style), (rest, "faint"),
                 (f" {int(share * 100):3}%", "" if runs else "dim")),
        "rate": ((spark(rates, SPARK_WIDTH, max(rates, default=0.0)), style if runs else "dim"),),
        "total": ((amount(job.total), "dim"),),
        "shards": ((str(progress.shards or "·"), _quiet(progress.shards)),),
        "retries": ((str(progress.retries or "·"), "warn" if progress.retries else "faint"),),
        "time": ((age(job_age_ms(model, job, now_ms)), "dim"),),
        "owner": ((model.name(job.owner), "dim"),),
        "what": ((job.name.rpartition("/")[2] or job.program[:10], ""),),
    }  # fmt: skip


def job_sort(model: Model, column: str) -> Callable[[str], Any]:
    """What to sort job ids by; without a column running ones first, then the newest."""
    none = e.Progress()
    by: dict[str, Callable[[e.Job], Any]] = {
        "job": lambda j: j.job, "state": lambda j: j.state, "total": lambda j: j.total,
        "done": lambda j: model.progress.get(j.job, none).done / (j.total or 1),
        "shards": lambda j: model.progress.get(j.job, none).shards,
        "retries": lambda j: model.progress.get(j.job, none).retries,
        "time": lambda j: model.progress.get(j.job, none).elapsed_ms,
        "owner": lambda j: model.name(j.owner), "what": lambda j: j.name,
    }  # fmt: skip
    key: Callable[[e.Job], Any] = by.get(column, _newest)
    return lambda job: key(model.jobs[job])


def _newest(job: e.Job) -> tuple[bool, int, str]:
    return job.state != "running", -job.started_ms, job.job


def job_page(model: Model, job_id: str, now_ms: int, width: int) -> list[Line]:
    """Everything that is known of a job: its progress, and where its shards are."""
    job = model.jobs.get(job_id)
    if job is None:
        return [(("The job is not known any more.", "dim"),)]
    progress = model.progress.get(job_id, e.Progress())
    rates = list(model.rates.get(job_id, ()))
    share = progress.done / job.total if job.total else 0.0
    words = f" {share:.1%}  {progress.done:,} of {job.total:,}"
    full, rest = bar(share, max(6, min(50, width - 13 - len(words))))
    time_ms = job_age_ms(model, job, now_ms)
    lines: list[Line] = [
        ((job.job, "bold"), ("  ", ""), *glyph(JOB_GLYPHS, job.state)),
        (),
        _fact("what", job.name or job.program),
        (*_label("done"), (full, "accent" if job.state == "running" else "ok"),
         (rest, "faint"),
         (words, "")),
        _fact("time", age(time_ms) + _left(job, share, time_ms)),
        _fact("reduce", job.reduce),
        _fact("owner", model.name(job.owner)),
        _fact("shards", f"{progress.shards}, {progress.retries} tried again"),
    ]  # fmt: skip
    if rates:
        top = max(rates)
        wide = max(10, min(60, width - 30))
        lines.append((*_label("rate"), (spark(rates, wide, top).lstrip(), "accent"),
                      (f" {amount(rates[-1])}/s", "")))  # fmt: skip
    if job.error:
        cut_up = textwrap.wrap(job.error, max(20, width - 12)) or [""]
        lines.append((*_label("error"), (cut_up[0], "bad")))
        lines += [(*_label(""), (each, "bad")) for each in cut_up[1:]]
    shards = sorted(model.shards(job_id), key=lambda each: each[1].shard)
    lines += [(), ((f"{len(shards)} shards are on nodes" if shards else "no shard runs", "head"),)]
    for alias, run in shards[:512]:
        since = age(now_ms - run.since_ms) if run.since_ms else "waits"
        spans: list[Span] = [
            (f"  {run.shard:>5}  ", "accent"), (f"{alias:<14} ", ""),
            (f"try {run.attempt}  blocks {run.first}..{run.last}  {since}", "dim"),
        ]  # fmt: skip
        lines.append(tuple(spans))
    return lines


def _left(job: e.Job, share: float, time_ms: int) -> str:
    if job.state != "running" or share <= 0:
        return ""
    return f", about {age(time_ms * (1 - share) / share)} left"


# -- logs -----------------------------------------------------------------------------------------

LEVELS = {"WARNING": "warn", "ERROR": "bad", "CRITICAL": "bad", "DEBUG": "faint"}


def log_line(alias: str, line: str) -> Line:
    """A line of a log: its node, its time of day, its level by colour, what it says."""
    head = ((f"{alias:<12} ", "other"),) if alias else ()
    if line[23:24] != "Z":
        return (*head, ("             " + line, "dim"))
    level, _, rest = line[25:].partition(" ")
    style = LEVELS.get(level, "")
    mark = {"WARNING": "! ", "ERROR": "✕ ", "CRITICAL": "✕ "}.get(level, "  ")
    source, colon, text = rest.strip().partition(": ")
    source = source.removeprefix("manifold.")
    return (
        *head, (line[11:23] + " ", "dim"), (mark, style or "faint"), (f"{source}{colon}", "dim"),
        (text, style),
    )  # fmt: skip
