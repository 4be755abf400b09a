"""What a test asks for: `@pytest.mark.manifold(nodes=5, classes={...}, links=[...], seed=7)`.

Interface rules: `wish` turns the marker's arguments into a `Wish`; what makes no sense is a
`ConfigError` that says what to write. `write` makes the configuration file of a cluster; what it
says is checked by who reads it, as any other file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from manifold.kernel.config import PROFILES, load, profile_path
from manifold.kernel.errors import ConfigError
from manifold.kernel.nexus.configs import VOTERS_MAX

DEFAULT_NODES = 3
# Nodes that have a whole core each, as far as the host has them: a test is to end soon.
DEFAULT_CLASS, DEFAULT_KEYS = "node", {"cores": 1, "compute": 1}
FILE = "manifold.yaml"


@dataclass(frozen=True, slots=True)
class Wish:
    """`nodes` 0: as many as the classes count. `classes`: the section of that name in a
    configuration, a number in it being a count; `links`: that section, or its rules alone;
    `overrides`: single keys, such as `{"scheduler.grain": "5ms"}`; `config`: a file, or `profile`:
    one that is packaged, instead of classes and links; `netns`: nodes in network namespaces."""

    nodes: int = 0
    classes: Mapping[str, Any] = field(default_factory=dict)
    links: Any = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    config: Path | str | None = None
    profile: str = ""
    seed: int | None = None
    netns: bool = False


def wish(positional: tuple[Any, ...], named: Mapping[str, Any]) -> Wish:
    """Of the arguments of a marker."""
    known = [each.name for each in fields(Wish)]
    unknown = sorted(set(named) - set(known))
    if len(positional) > 1 or (positional and "nodes" in named):
        raise ConfigError("The manifold marker takes only `nodes` without a name.", _say(known))
    if unknown:
        raise ConfigError(f"The manifold marker has no argument {unknown[0]!r}.", _say(known))
    found = Wish(*positional, **named)
    _check(found)
    return found


def _say(known: list[str]) -> str:
    return f"It has {', '.join(known)}: @pytest.mark.manifold(nodes=5)."


def _check(found: Wish) -> None:
    if not isinstance(found.nodes, int) or isinstance(found.nodes, bool) or found.nodes < 0:
        raise ConfigError(f"nodes={found.nodes!r} is no number of nodes.", "Write nodes=5.")
    if not isinstance(found.classes, Mapping):
        raise ConfigError(
            "classes= wants a mapping from names to counts or keys.",
            'Write classes={"small": 3, "big": {"count": 1, "cores": 2}}.',
        )
    if not isinstance(found.overrides, Mapping):
        raise ConfigError(
            "overrides= wants a mapping from keys to values.",
            'Write overrides={"scheduler.grain": "5ms"}.',
        )
    if found.config is not None and (found.classes or found.links):
        raise ConfigError(
            "A file of config= has its own classes and links.", "Leave out one or the other."
        )
    if not isinstance(found.netns, bool):
        raise ConfigError(f"netns={found.netns!r} is neither True nor False.", "Write netns=True.")
    if found.profile and found.profile not in PROFILES:
        raise ConfigError(
            f"There is no profile {found.profile!r}.", f"There are {', '.join(PROFILES)}."
        )
    if found.profile and (found.classes or found.links or found.config is not None):
        raise ConfigError("A profile has its own classes and links.", "Leave out one or the other.")
    if found.seed is not None and (not isinstance(found.seed, int) or found.seed < 0):
        raise ConfigError(f"seed={found.seed!r} is no seed.", "Write a number from 0 on.")


def write(asked: Wish, folder: Path) -> Path:
    """The configuration file of a cluster as it was asked for."""
    if asked.config is not None:
        return Path(asked.config)
    if asked.profile:
        return profile_path(asked.profile)
    classes = asked.classes or {DEFAULT_CLASS: {"count": count(asked), **DEFAULT_KEYS}}
    document: dict[str, Any] = {
        "classes": {
            name: {"count": each} if isinstance(each, int) else dict(each)
            for name, each in classes.items()
        }
    }
    if asked.links:
        rules = isinstance(asked.links, list | tuple)
        document["links"] = {"rules": list(asked.links)} if rules else asked.links
    path = folder / FILE
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def overrides(asked: Wish) -> dict[str, str]:
    """Single keys. Where a test says nothing, all nodes vote, as far as that is an odd number and
    may be: who cuts a cluster in two expects the larger part to go on."""
    found = dict(asked.overrides)
    if asked.config is None:
        votes = min(count(asked), VOTERS_MAX)
        found.setdefault("nexus.voters", str(votes - (votes + 1) % 2))
    return found


def count(asked: Wish) -> int:
    """How many nodes: what is asked for, else what the classes count."""
    if asked.nodes:
        return asked.nodes
    if asked.profile:
        return load(profile_path(asked.profile), {}).nodes
    counts = [
        each if isinstance(each, int) else each.get("count", 1) for each in asked.classes.values()
    ]
    return sum(each for each in counts if isinstance(each, int)) or DEFAULT_NODES
