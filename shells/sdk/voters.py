"""Who votes on what the cluster agrees on, and how they are: asked once, for all faces of it.

Interface: `look` asks our node who votes and each voter how it is; `summary` and `rows_of` put it
in plain words for JSON and tables.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manifold.kernel import labels as labelling
from manifold.kernel import messages as m
from manifold.kernel.errors import NotFound
from manifold.kernel.nexus.messages import GetNexus, NexusInfo
from manifold.vm.kid import Kid, short

ASK_MS = 1500.0  # how long a voter has to tell how it is
KID_DIGITS_MIN = 6  # of a KID that is cut short
STATES = {"ready": "alive"}


@dataclass(frozen=True, slots=True)
class Voters:
    """What is known of who votes: the newest configuration that anybody told of, and who told."""

    info: NexusInfo
    nodes: dict[str, m.NodeInfo]
    told: dict[str, NexusInfo]

    @property
    def all(self) -> list[str]:
        """Those that vote, and those that are about to, or not to any more."""
        return list(dict.fromkeys((*self.info.old, *self.info.voters)))

    def name(self, kid: str) -> str:
        node = self.nodes.get(kid)
        return node.alias if node is not None else short(Kid(kid))

    def names(self, kids: Sequence[str]) -> str:
        return " ".join(sorted(self.name(kid) for kid in kids)) or "none"

    def state(self, kid: str) -> str:
        node = self.nodes.get(kid)
        return "unknown" if node is None else STATES.get(node.state, node.state)

    def majority(self) -> bool:
        """Whether as many answered as every agreement needs."""
        return self._quorum(self._answering)

    def groups(self, kid: str) -> dict[str, str]:
        """What the node says of what fails together with it: its site, its rack, who owns it."""
        node = self.nodes.get(kid)
        told = node.labels if node is not None else ()
        found = {key: labelling.value(told, key) for key in labelling.GROUPS}
        return {key: value for key, value in found.items() if value}

    def at_risk(self) -> list[dict[str, Any]]:
        """The groups without which no majority of those that answer now would be left: `group`,
        such as `site=a`, and the aliases of its `voters`. A rack is one of its site."""
        if not self.majority():
            return []
        found: dict[str, list[str]] = {}
        for kid in self.all:
            for name in _groups(self.groups(kid)):
                found.setdefault(name, []).append(kid)
        return [
            {"group": name, "voters": sorted(map(self.name, kids))}
            for name, kids in found.items()
            if not self._quorum(self._answering - set(kids))
        ]

    @property
    def _answering(self) -> set[str]:
        return {kid for kid, each in self.told.items() if each.votes and not each.stopped}

    def _quorum(self, kids: set[str]) -> bool:
        sets = [each for each in (self.info.old, self.info.voters) if each]
        return bool(sets) and all(2 * len(kids & set(each)) > len(each) for each in sets)

    def find(self, name: str) -> Kid:
        """A node by alias, by KID, or by the beginning of one."""
        for kid, node in self.nodes.items():
            if name in (kid, node.alias):
                return Kid(kid)
        known = {*self.nodes, *self.all}
        near = [kid for kid in known if kid.startswith(name) and len(name) >= 2 + KID_DIGITS_MIN]
        if len(near) != 1:
            raise NotFound(f"There is no node {name!r}.", "`manifold node ls` lists them.")
        return Kid(near[0])


def _groups(told: dict[str, str]) -> list[str]:
    """`site=a`, `site=a rack=r1`, `org=x`: a rack of the same name elsewhere is another one."""
    found = {key: f"{key}={value}" for key, value in told.items()}
    if "rack" in found and "site" in found:
        found["rack"] = f"{found['site']} {found['rack']}"
    return list(found.values())


async def looked(client: Any) -> Voters:
    """Ask our node who votes, and each voter how it is."""
    info = await client.calls_of_globals.registers.nexus()
    nodes = {node.kid: node for node in await client.ask_nodes()}
    told: dict[str, NexusInfo] = {}
    for _ in range(3):  # who votes may tell of a newer configuration than our node knows
        kids = [kid for kid in dict.fromkeys((*info.old, *info.voters)) if kid not in told]
        asked = [kid for kid in kids if kid in nodes and nodes[kid].state in ("ready", "suspect")]
        answers = await asyncio.gather(
            *(client.connection.request(GetNexus(), ASK_MS, destination=kid) for kid in asked),
            return_exceptions=True,
        )
        for kid, answer in zip(asked, answers, strict=True):
            if isinstance(answer, NexusInfo):
                told[kid] = answer
        newest = max([info, *told.values()], key=lambda each: (each.known, each.count))
        if newest.count == info.count:
            break
        info = newest
    return Voters(info, nodes, told)


def look(client: Any) -> Voters:
    """As `looked`, waited for."""
    found: Voters = client.connection.call(looked(client))
    return found


def summary(found: Voters) -> dict[str, Any]:
    """What there is to say of all of them."""
    info = found.info
    return {
        "known": info.known,
        "epoch": info.count,
        "majority": found.majority(),
        "changing": {"from": sorted(map(found.name, info.old))} if info.old else None,
        "at_risk": found.at_risk(),
    }


def rows_of(found: Voters) -> list[dict[str, Any]]:
    """One for each that votes, is about to, or is not to any more."""
    return [_row(found, kid) for kid in found.all]


def _row(found: Voters, kid: str) -> dict[str, Any]:
    told = found.told.get(kid)
    return {
        "alias": found.name(kid),
        "id": kid,
        "state": found.state(kid),
        "votes": told.votes if told is not None else None,
        "keys": told.keys if told is not None else None,
        "epoch": told.count if told is not None else None,
        "stopped": told.why or "its disk refused a record" if told and told.stopped else "",
        "note": _note(found, kid, told),
        "groups": found.groups(kid),
    }


def _note(found: Voters, kid: str, told: NexusInfo | None) -> str:
    if told is None:
        return "no answer"
    if told.stopped:
        return f"stopped: {told.why or 'its disk refused a record'}"
    if not told.votes:
        return "does not vote: it has lost its records; remove it, then add it"
    if found.info.old:
        if kid not in found.info.voters:
            return "leaves"
        return "joins" if kid not in found.info.old else ""
    return ""
