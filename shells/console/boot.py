"""What the console prints as it starts: an operating system's boot messages, from real facts; pure.

Interface: `lines(model, …)` after each event gives the lines that can be said by now, each once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from manifold.shells.console import messages as e
from manifold.shells.console.figures import age, plural, size
from manifold.shells.console.model import Model
from manifold.shells.console.theme import Line


@dataclass(slots=True)
class Boot:
    """`host` is said of the machine that the console runs on."""

    version: str
    host: str
    _said: set[str] = field(default_factory=set)
    _waits: str = ""

    def first(self) -> list[Line]:
        """Before anything is known of a cluster."""
        return [
            ((" manifold ", "tab"), (f" {self.version}", "bold"), (f"  {self.host}", "dim")),
            (),
        ]

    def lines(self, model: Model, now_ms: int) -> list[Line]:
        """What can be said by now and was not said before."""
        found: list[Line] = []
        if model.lost is not None:
            if self._waits != model.lost.why:
                self._waits = model.lost.why
                found.append(_mark("wait", "warn", model.lost.why))
                if model.lost.next and not model.nodes:
                    found.append(_next(model.lost.next))
            return found
        if model.attached is None:
            return found
        again, self._waits = bool(self._waits and self._said), ""
        if again:
            self._said -= {"attached", "nodes"}
        attached = model.attached
        if self._once("attached"):
            text = "attached again to" if again else "attached to"
            node = f"{text} {attached.node}"
            found.append(_mark(" ok ", "ok", f"cluster {attached.cluster}: {node}"))
        if model.looked_ms and self._once("nodes"):
            found += self._nodes(model)
        if model.agreement is not None and self._once("agreement"):
            voters = model.agreement.voters
            names = ", ".join(voters[:3]) + (f" and {len(voters) - 3} more" if voters[3:] else "")
            text = f"agreement: epoch {model.agreement.epoch}, {plural(len(voters), 'voter')}"
            found.append(_mark(" ok ", "ok", text, names))
        if model.agreement is not None and model.looked_ms and self._once("jobs"):
            running = len(model.running())
            text = f"jobs: {running} running" if running else "jobs: none runs"
            known = len(model.jobs) - running
            found.append(_mark(" ok ", "ok", text, f"{known} ended" if known else ""))
            started = [n.started_ms for n in model.nodes.values() if n.started_ms]
            up = f", up {age(now_ms - min(started))}" if started else ""
            found += [
                _mark("ready", "accent", f"{attached.cluster} is yours{up}"),
                (("          help lists what there is to say; ", "dim"), ("F1", "key"),
                 (" the keys; ", "dim"), ("Tab", "key"), (" completes", "dim")),
                (),
            ]  # fmt: skip
        return found

    def _nodes(self, model: Model) -> list[Line]:
        ready = model.count("ready")
        kinds = Counter(node.node_class for node in model.nodes.values())
        classes = ", ".join(f"{count} {name}" for name, count in kinds.items())
        well = ready == len(model.nodes)
        _, slots = model.slots()
        memory = sum(n.memory_bytes for n in model.nodes.values() if n.state == "ready")
        lines = [
            _mark(" ok " if well else "warn", "ok" if well else "warn",
                  f"nodes: {ready} of {len(model.nodes)} ready", classes),
            _mark(" ok ", "ok", f"capacity: {plural(slots, 'slot')}, {size(memory)} of memory"),
        ]  # fmt: skip
        return lines

    def _once(self, what: str) -> bool:
        if what in self._said:
            return False
        self._said.add(what)
        return True


def changed(model: Model, event: e.Event) -> Line | None:
    """A line for what an operator wants to be told of as it happens; None for the rest."""
    if isinstance(event, e.NodeIs):
        node, known = event.node, model.nodes.get(event.node.kid)
        if known is None:
            return _mark("node", "accent", f"{node.alias} has joined") if model.looked_ms else None
        if known.state != node.state:
            style = {"ready": "ok", "suspect": "warn"}.get(node.state, "bad")
            word = {"ready": " ok ", "suspect": "warn"}.get(node.state, "fail")
            return _mark(word, style, f"node {node.alias} is {node.state}", f"was {known.state}")
        if known.boot != node.boot:
            return _mark(" ok ", "ok", f"node {node.alias} has started again", f"boot {node.boot}")
    if isinstance(event, e.NodeGone):
        known = model.nodes.get(event.kid)
        return _mark("node", "dim", f"{known.alias if known else event.kid[:10]} has left")
    return None


def _mark(word: str, style: str, text: str, more: str = "") -> Line:
    tail = ((f"  {more}", "dim"),) if more else ()
    return (("[", "faint"), (f"{word:^6}", style), ("] ", "faint"), (text, ""), *tail)


def _next(text: str) -> Line:
    return (("         ", ""), (text, "accent"))
