"""Whether the next round of a key waits a moment for more operations. Pure, one for each key.

Clients that wait for their answers come again right after them, all of them: the first would begin
a round of its own, and the others would wait for its end before theirs. So a round waits until as
many are there as the last one has answered or left waiting, for GATHER_MS at most.

Interface: `ended` says how many those were; `waits` whether the round is to wait, which begins the
wait; `missed` that its time is over.
Invariants:
  A1  whoever asks alone never waits: a crowd has two;
  A2  where the others do not come, waits become rare: after n in vain in a row, one round in 2^n.
Source: DeWitt et al., "Implementation Techniques for Main Memory Database Systems" (1984), group
commit; this is it for clients in closed loops, with a size instead of a time.
"""

from __future__ import annotations

from dataclasses import dataclass

GATHER_MS = 1.0  # a loop's timers are as exact; a client's way there and back takes half of it
VAIN_MAX = 10  # then one round in a thousand waits


@dataclass(slots=True)
class Gathering:
    """See the module. `open`: a round waits; `number`: of that wait."""

    open: bool = False
    number: int = 0
    _crowd: int = 0
    _vain: int = 0
    _spared: int = 0  # rounds that do not wait

    def ended(self, answered: int, waiting: int, most: int) -> None:
        """A round has answered some, and others came meanwhile; a round takes `most`."""
        self._crowd = min(answered + waiting, most)

    def waits(self, queued: int) -> bool:
        """Whether the round with so many operations waits for more."""
        if queued >= self._crowd or self._crowd < 2:
            self._vain = 0 if self.open else self._vain
            self.open = False
            return False
        if self.open:
            return True
        if self._spared:
            self._spared -= 1
            return False
        self.open = True
        self.number += 1
        return True

    def missed(self) -> None:
        """They have not come."""
        self.open = False
        self._crowd = 0
        self._vain = min(self._vain + 1, VAIN_MAX)
        self._spared = (1 << self._vain) - 1
