"""A box office: seats are sold once, whoever sells them and whatever machines fail meanwhile.

Each seat is a global of the cluster. It is absent or empty while the seat is free, and otherwise
holds who has it. Selling is a compare-and-swap, so of two who want a seat one gets it.
"""

from __future__ import annotations

import manifold

FREE = ""
PATIENCE_S = 3.0  # a customer waits no longer


class BoxOffice:
    """Sells the seats of one show, through the node that `client` is attached to."""

    def __init__(self, client: manifold.Client, show: str) -> None:
        self._globals = client.globals
        self._show = show

    def _name(self, seat: int) -> str:
        return f"{self._show}/{seat:04}"

    def sell(self, seat: int, customer: str) -> bool:
        """Whether `customer`, whose name is nobody else's, has the seat now.

        `manifold.Unavailable`: it was not sold, as far as this node knows nothing is.
        """
        name = self._name(seat)
        try:
            for free in (None, FREE):
                if self._globals.cas(name, free, customer, timeout_s=PATIENCE_S):
                    return True
        except manifold.Maybe:
            pass  # perhaps it was: whoever holds it now tells
        return self.holder(seat) == customer

    def take_back(self, seat: int, customer: str) -> bool:
        """Whether it was theirs, and is free again."""
        return self._globals.cas(self._name(seat), customer, FREE)

    def holder(self, seat: int) -> str:
        """Who has it, or ""."""
        return self._globals.get(self._name(seat), FREE)

    def sold(self) -> dict[int, str]:
        """Seats and who has them."""
        found = self._globals.items(f"{self._show}/")
        return {int(name.rpartition("/")[2]): who for name, who in found if who != FREE}
