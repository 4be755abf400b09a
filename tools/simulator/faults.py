"""What goes wrong, and how often: one frozen record, parsed from a string.

`parse("light,drop=0.1,crash=2")` is the profile `light` with two keys replaced. Probabilities are
per message; rates are per minute of virtual time over the whole cluster; ranges are `low:high` in
milliseconds. What each key means is told by `KEYS`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from manifold.kernel.errors import ConfigError

Range = tuple[float, float]
RATE_MAX = 60_000.0  # a fault each millisecond


KEYS = {
    "drop": ("probability", "a message is lost"),
    "dup": ("probability", "a message arrives twice"),
    "reorder": ("probability", "a message takes up to ten times the longest delay"),
    "delay": ("range", "one-way latency"),
    "sync": ("range", "time until a write is durable"),
    "cut": ("rate", "one direction between two nodes breaks"),
    "partition": ("rate", "a random minority is cut off from the rest"),
    "clog": ("rate", "swizzle: the links of some nodes stop one by one, then resume"),
    "broken": ("range", "how long a cut, partition or clog lasts"),
    "crash": ("rate", "a node loses its memory and some unsynced writes"),
    "down": ("range", "time until a crashed node starts again"),
    "pause": ("rate", "a node stops as by SIGSTOP; its messages wait"),
    "stop": ("range", "how long a pause lasts"),
    "clock": ("spread", "clocks run up to this part too fast or too slow"),
    "jump": ("rate", "a clock jumps forward by up to 5 s"),
    "fsync": ("probability", "a write fails, and so do all later ones until the node starts again"),
}


@dataclass(frozen=True, slots=True)
class Faults:
    """All faults off; latencies of a quiet local network. `KEYS` says what each field means."""

    drop: float = 0.0
    dup: float = 0.0
    reorder: float = 0.0
    delay: Range = (0.2, 2.0)
    sync: Range = (0.2, 5.0)
    cut: float = 0.0
    partition: float = 0.0
    clog: float = 0.0
    broken: Range = (500.0, 20_000.0)
    crash: float = 0.0
    down: Range = (100.0, 20_000.0)
    pause: float = 0.0
    stop: Range = (200.0, 15_000.0)
    clock: float = 0.0
    jump: float = 0.0
    fsync: float = 0.0

    def text(self) -> str:
        """The string that `parse` turns into this."""
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                parts.append(f"{item.name}={_show(value)}")
        return ",".join(parts) or "none"

    @property
    def quiet(self) -> bool:
        """Whether nothing goes wrong: then nobody may be suspected."""
        rates = [name for name, (kind, _) in KEYS.items() if kind in ("rate", "probability")]
        return all(getattr(self, name) == 0 for name in rates)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ":".join(f"{part:g}" for part in value)
    return f"{value:g}"


PROFILES = {
    "none": Faults(),
    "light": Faults(
        drop=0.01, dup=0.005, reorder=0.01, delay=(0.2, 10.0), crash=2, pause=2, cut=2, clock=0.02
    ),
    "heavy": Faults(
        drop=0.10,
        dup=0.05,
        reorder=0.10,
        delay=(0.5, 50.0),
        sync=(0.2, 100.0),
        cut=12,
        partition=2,
        clog=2,
        crash=12,
        pause=12,
        clock=0.10,
        jump=6,
    ),
}


def parse(text: str) -> Faults:
    """`profile` and `key=value` parts, separated by commas; later parts replace earlier ones."""
    result = Faults()
    for index, part in enumerate(piece.strip() for piece in text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if name not in PROFILES or index > 0:
                raise _refused(part, "A profile comes first and is one of none, light, heavy.")
            result = PROFILES[name]
            continue
        if name not in KEYS:
            raise _refused(part, f"The keys are {', '.join(KEYS)}.")
        changed: dict[str, Any] = {name: _value(part, KEYS[name][0], value)}
        result = replace(result, **changed)
    return result


def _value(part: str, kind: str, value: str) -> float | Range:
    try:
        numbers = [float(piece) for piece in value.split(":")]
    except ValueError:
        raise _refused(part, f"A {kind} is a number, as in 0.1 or 1:50.") from None
    if kind == "range":
        low, high = numbers if len(numbers) == 2 else (numbers[0], numbers[0])
        if len(numbers) > 2 or not 0 <= low <= high <= 1e9:
            raise _refused(part, "A range is low:high in milliseconds, as in 1:50.")
        return (low, high)
    high = {"probability": 1.0, "spread": 0.5, "rate": RATE_MAX}[kind]
    if len(numbers) != 1 or not 0 <= numbers[0] <= high:
        raise _refused(part, f"A {kind} is one number from 0 to {high:g}.")
    return numbers[0]


def _refused(part: str, next_step: str) -> ConfigError:
    return ConfigError(f"--faults: {part!r} is not understood.", next_step)
