"""What is asked of the supervisor of a cluster from another process, and how it answers.

Interface rules: one request and one answer on a connection to the control socket (`control.py`);
what was not done is answered by a `Failure`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from manifold.kernel import labels
from manifold.kernel.hyperbus.messages import Failure
from manifold.kernel.limits import ALIAS_CHARS_MAX, CLASS_NAME_CHARS_MAX, NODES_MAX

SETTLE_S = 30.0  # until others vote: some ms, and on a host that is overloaded seconds
SETTLE_S_MAX = 240.0  # with draining less than control.ANSWER_S, after which nobody listens

Alias = Annotated[str, Meta(min_length=1, max_length=ALIAS_CHARS_MAX)]
LABEL_CHARS_MAX = labels.KEY_CHARS_MAX + 1 + labels.VALUE_CHARS_MAX
Label = Annotated[str, Meta(min_length=1, max_length=LABEL_CHARS_MAX)]
Labels = Annotated[tuple[Label, ...], Meta(max_length=labels.LABELS_MAX)]
Aliases = Annotated[tuple[Alias, ...], Meta(max_length=NODES_MAX)]


class AddNodes(msgspec.Struct, frozen=True, array_like=True, tag="e.add"):
    """`count` nodes of class `kind`; "" is the first of the configuration. They have `labels`
    beside those of the class."""

    kind: Annotated[str, Meta(max_length=CLASS_NAME_CHARS_MAX)] = ""
    count: Annotated[int, Meta(ge=1, le=NODES_MAX)] = 1
    labels: Labels = ()


class RemoveNodes(msgspec.Struct, frozen=True, array_like=True, tag="e.remove"):
    """They leave well. `force`: also where nobody can vote in their place.

    `timeout_s`: how long it is tried to have others vote.
    """

    aliases: Annotated[Aliases, Meta(min_length=1)]
    force: bool = False
    timeout_s: Annotated[float, Meta(gt=0, le=SETTLE_S_MAX)] = SETTLE_S


class KillNode(msgspec.Struct, frozen=True, array_like=True, tag="e.kill"):
    """SIGKILL; it is started again unless it is to stay down."""

    alias: Alias
    stay_down: bool = False
    force: bool = False


class StartNode(msgspec.Struct, frozen=True, array_like=True, tag="e.start"):
    alias: Alias


class PauseNode(msgspec.Struct, frozen=True, array_like=True, tag="e.pause"):
    alias: Alias
    force: bool = False


class ResumeNode(msgspec.Struct, frozen=True, array_like=True, tag="e.resume"):
    alias: Alias


class SlowNode(msgspec.Struct, frozen=True, array_like=True, tag="e.slow"):
    """To a part of the compute share of its class."""

    alias: Alias
    to: Annotated[float, Meta(gt=0, le=1)]


class Changed(msgspec.Struct, frozen=True, array_like=True, tag="e.changed"):
    """It was done, to these; `nodes` are there now."""

    aliases: Aliases
    nodes: int


Request = AddNodes | RemoveNodes | KillNode | StartNode | PauseNode | ResumeNode | SlowNode
Answer = Changed | Failure
