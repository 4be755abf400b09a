"""What is asked of a node that is looked at, and what it answers: metrics and profiles.

Interface rules: a `Family` is one metric with all its samples; its `name` has its unit and no
`_total`. Bounds: SAMPLES_MAX samples of a family; labels take values from small fixed sets, none
of them is a job, a client or a key. A profile has at most STACKS_MAX stacks.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from manifold.vm.kid import Kid

FAMILIES_MAX = 256  # five times what there is
SAMPLES_MAX = 256  # of one family; the largest, a histogram, has 12
NODE_TEXT_BYTES = 16 << 10  # what a node renders fits in: 10 KB, and numbers that grow
TEXT_BYTES_MAX = 1 << 20  # 256 families of 4 KiB; no less than NODE_TEXT_BYTES
PROFILE_S_MIN = 0.1
PROFILE_S_MAX = 60.0
PROFILE_HZ_MAX = 250  # a sample takes 140 us with a node's three threads: 3.5 % of a core
STACKS_MAX = 10_000  # distinct ones; at 64 frames of 40 characters 26 MB, under the largest message
STACK_CHARACTERS_MAX = 8192
# Words of a stack that name no function: the loop's thread, and the loop or a thread that waits.
MAIN = "MainThread"
LOOP = "(event loop)"
WAITS = "(waits)"

Label = tuple[str, str]
Form = Literal["text", "openmetrics", "families"]
Kind = Literal["gauge", "counter", "histogram", "info"]
_SUFFIXES = {"counter": "_total", "info": "_info"}


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One number. `suffix` follows the family's name: "", "_bucket", "_sum", "_count"."""

    value: float
    labels: tuple[Label, ...] = ()
    suffix: str = ""


class Family(msgspec.Struct, frozen=True, array_like=True):
    """One metric. `unit` is the last word of `name`, or "" where it counts things."""

    name: str
    kind: Kind
    unit: str
    help: str
    samples: Annotated[tuple[Sample, ...], Meta(max_length=SAMPLES_MAX)]

    def sample_name(self, sample: Sample) -> str:
        """What a sample is called in the text, and in queries."""
        return self.name + (sample.suffix or _SUFFIXES.get(self.kind, ""))


class GetMetrics(msgspec.Struct, frozen=True, array_like=True, tag="o.metrics"):
    """Answered by `Metrics`, in the form that is asked for."""

    form: Form = "text"


class Metrics(msgspec.Struct, frozen=True, array_like=True, tag="o.metricsare"):
    """A node's metrics: `text`, or `families`. `address`: HOST:PORT of its HTTP server, or ""."""

    alias: str
    kid: Kid
    address: str
    text: Annotated[str, Meta(max_length=TEXT_BYTES_MAX)] = ""
    families: Annotated[tuple[Family, ...], Meta(max_length=FAMILIES_MAX)] = ()


class ProfileNode(msgspec.Struct, frozen=True, array_like=True, tag="o.profile"):
    """Answered by `Profile` after `seconds`, while the node goes on serving."""

    seconds: Annotated[float, Meta(ge=PROFILE_S_MIN, le=PROFILE_S_MAX)] = 10.0
    hz: Annotated[int, Meta(ge=1, le=PROFILE_HZ_MAX)] = 100


class Stack(msgspec.Struct, frozen=True, array_like=True):
    """Frames from the thread's name down to where it was, joined by `;`, and how often it was."""

    frames: Annotated[str, Meta(max_length=STACK_CHARACTERS_MAX)]
    count: Annotated[int, Meta(ge=1)]


class Profile(msgspec.Struct, frozen=True, array_like=True, tag="o.profileis"):
    """Where the node's threads were, sample by sample. `cpu_s`: used by its process meanwhile."""

    alias: str
    kid: Kid
    seconds: float
    samples: int
    cpu_s: float
    stacks: Annotated[tuple[Stack, ...], Meta(max_length=STACKS_MAX + 1)]
    truncated: int = 0  # samples whose stack was one too many; they are in a stack `(other)`


Message = GetMetrics | Metrics | ProfileNode | Profile
