"""The command palette: the actions of the console, and its verbs, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from textual.command import DiscoveryHit, Hit, Hits, Provider

from manifold.shells.cli.table import VERBS


class Actions(Provider):
    """Panes and keys run; a verb is put on the prompt, to be completed and entered."""

    def _all(self) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        app: Any = self.app
        for pane in ("shell", "nodes", "jobs", "map", "log"):
            yield f"pane: {pane}", "Show it.", partial(app.action_pane, pane)
        yield "theme: dark or light", "Change it.", app.action_theme
        yield "keys", "All of them.", app.action_help
        job, node = app.chosen_job(), app.chosen_node()
        if job:
            yield f"why {job}", "Why its shards went where they went.", app.action_why
            yield f"kill {job}", "Cancel it.", app.action_kill
        if node:
            yield f"node inspect {node}", "What it says of itself.", app.action_inspect
            yield f"log of {node}", "Its log alone.", app.action_node_log
        for verb, (_, says) in VERBS.items():
            yield verb, says, partial(app.put_on_prompt, f"{verb} ")
        yield "leave", "End the console.", partial(app.exit, 0)

    async def discover(self) -> Hits:
        for name, says, run in self._all():
            yield DiscoveryHit(name, run, help=says)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for name, says, run in self._all():
            score = matcher.match(name)
            if score > 0:
                yield Hit(score, matcher.highlight(name), run, help=says)
