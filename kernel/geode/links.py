"""The links of one node in a cluster too large for a full view: near ones and long ones.

Near: the `near_links` geometrically nearest of all that were heard of. Long: `far_links` of the
others, each drawn with P proportional to 1/rank in the order of distance. Rank, not distance to
the power of d: machines cluster (a thousand equal boards lie in one point), and Kleinberg's
exponent needs a lattice; P ~ 1/rank has the same effect wherever the nodes are.

Nobody keeps everybody: a pool of POOL_MAX nodes, a uniform sample of all that were heard of
(reservoir sampling), stands for the rest, so memory and the work per change are bounded. A link
lost is replaced from the pool at once; `refresh` draws one long link anew.

Interface rules: `heard` as often as one likes, `forget` when a node is gone; `near` and `far`
are to be read only.
Invariants: L1 at most near_links + far_links links, none to oneself, none twice; L2 the pool is
bounded.
Source: the design page of geode, "Topology"; Liben-Nowell et al., "Geographic routing in social
networks" (2005), section "rank-based friendship".
"""

from __future__ import annotations

from bisect import insort
from random import Random
from zlib import crc32

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode.features import Features
from manifold.vm.kid import Kid

# As many as a full view holds by default: 256 nodes of some 200 bytes are 50 KB.
POOL_MAX = 256


def distance(one: Features, other: Features) -> float:
    """Between two nodes: Minkowski, p = 3, over all four axes, symmetric."""
    return float(
        (
            abs(one.compute - other.compute) ** 3
            + abs(one.memory - other.memory) ** 3
            + abs(one.bandwidth - other.bandwidth) ** 3
            + abs(one.latency - other.latency) ** 3
        )
        ** (1 / 3)
    )


class Links:
    def __init__(self, me: Kid, config: GeodeConfig, random: Random) -> None:
        self._me = me
        self._near_max = config.near_links
        self._far_max = config.far_links
        self._random = random
        self._here: Features | None = None
        self._heard = 0
        self._features: dict[Kid, Features] = {}  # of the pool and of the links
        self._pool: list[Kid] = []
        self._place: dict[Kid, int] = {}  # of each in the pool
        self._ranked: list[tuple[float, int, Kid]] = []  # near links, nearest first
        self.far: list[Kid] = []
        self.version = 0  # changes with the links

    @property
    def near(self) -> tuple[Kid, ...]:
        return tuple(kid for _, _, kid in self._ranked)

    def heard(self, kid: Kid, features: Features) -> None:
        """A node is alive, and this is where it lies."""
        if kid == self._me:
            self._here = features
            self._rebuild()
            return
        moved = self._features.get(kid, features) != features
        if moved:
            self.forget(kid)
        if kid in self._features:
            return
        self._heard += 1
        self._take(kid, features)
        self._offer_near(kid, features)
        if len(self.far) < self._far_max:
            self._fill_far()

    def forget(self, kid: Kid) -> None:
        if self._features.pop(kid, None) is None:
            return
        place = self._place.pop(kid, None)
        if place is not None:
            last = self._pool.pop()
            if last != kid:
                self._pool[place] = last
                self._place[last] = place
        lost_near = [each for each in self._ranked if each[2] == kid]
        if lost_near:
            self._ranked.remove(lost_near[0])
            self._fill_near()
            self.version += 1
        if kid in self.far:
            self.far.remove(kid)
            self._fill_far()
            self.version += 1

    def refresh(self) -> None:
        """Give up the oldest long link for a new draw."""
        if self.far:
            lost = self.far.pop(0)
            self._fill_far()
            self._drop(lost)
            self.version += 1

    def _take(self, kid: Kid, features: Features) -> None:
        """Reservoir sampling: each node heard of is in the pool with the same probability."""
        if len(self._pool) < POOL_MAX:
            self._place[kid] = len(self._pool)
            self._pool.append(kid)
            self._features[kid] = features
            return
        place = self._random.randrange(self._heard)
        if place < POOL_MAX:
            lost, self._pool[place] = self._pool[place], kid
            del self._place[lost]
            self._place[kid] = place
            self._features[kid] = features
            self._drop(lost)
        assert len(self._pool) <= POOL_MAX, "L2"

    def _drop(self, kid: Kid) -> None:
        """Forget the features of a node that is neither pooled nor linked."""
        if kid not in self._place and kid not in self.far and kid not in self.near:
            self._features.pop(kid, None)

    def _key(self, kid: Kid, features: Features) -> tuple[float, int, Kid]:
        """Order of distance; equal ones in an order of this node's own, or all would link alike."""
        apart = distance(self._here, features) if self._here is not None else 0.0
        return (apart, crc32(f"{self._me}{kid}".encode()), kid)

    def _offer_near(self, kid: Kid, features: Features) -> None:
        key = self._key(kid, features)
        if len(self._ranked) >= self._near_max and key >= self._ranked[-1]:
            return
        self._features[kid] = features
        insort(self._ranked, key)
        self.version += 1
        if kid in self.far:
            self.far.remove(kid)
        if len(self._ranked) > self._near_max:
            lost = self._ranked.pop()[2]
            self._drop(lost)
        self._check()

    def _fill_near(self) -> None:
        linked = {kid for _, _, kid in self._ranked}
        spare = [self._key(kid, self._features[kid]) for kid in self._pool if kid not in linked]
        for key in sorted(spare)[: self._near_max - len(self._ranked)]:
            insort(self._ranked, key)
            if key[2] in self.far:
                self.far.remove(key[2])
        self._fill_far()

    def _fill_far(self) -> None:
        """Draw long links from the pool, P proportional to 1/rank."""
        linked = {*self.near, *self.far}
        spare = sorted(
            self._key(kid, self._features[kid]) for kid in self._pool if kid not in linked
        )
        weights = [1.0 / rank for rank in range(1, len(spare) + 1)]
        while spare and len(self.far) < self._far_max:
            mark = self._random.random() * sum(weights)
            place = 0
            while place < len(weights) - 1 and mark >= weights[place]:
                mark -= weights[place]
                place += 1
            self.far.append(spare.pop(place)[2])
            del weights[place]
            self.version += 1
        self._check()

    def _rebuild(self) -> None:
        self._ranked = []
        self.far = []
        self._fill_near()
        self.version += 1

    def _check(self) -> None:
        links = [*self.near, *self.far]
        assert len(links) <= self._near_max + self._far_max, "L1"
        assert len(set(links)) == len(links) and self._me not in links, "L1"
