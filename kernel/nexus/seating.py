"""Who ought to vote: spread over sites, racks and organisations as far as possible. Pure.

Interface: `choose(count, candidates)` picks the first voters; `settle(voters, leaving, candidates)`
says who votes once `leaving` have left. A candidate is a KID and its labels (`site=a`); the first
ones are preferred among equals. Nothing here changes who votes: that is `voters.py`.
Invariants:
  S1  of two sites of which one has a candidate that was not chosen, that one has at most one voter
      less than the other; within a site the same holds for its racks;
  S2  who votes and stays goes on voting, but where there are too many;
  S3  as many vote as before; where there are not so many nodes, the largest odd number: of two
      voters either one stops both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from manifold.kernel import labels as labelling
from manifold.kernel.labels import GROUPS
from manifold.vm.kid import Kid

Candidate = tuple[Kid, Sequence[str]]
_NOTHING: Mapping[Kid, Sequence[str]] = MappingProxyType({})


def choose(count: int, candidates: Sequence[Candidate], kept: Sequence[Kid] = ()) -> list[Kid]:
    """`count` of `candidates`, or all of them where they are fewer; those `kept` come first."""
    chosen: list[Candidate] = []
    left = list(candidates)
    for among in (kept, None):
        while len(chosen) < count:
            free = [each for each in left if among is None or each[0] in among]
            if not free:
                break
            taken = [_groups(labels) for _, labels in chosen]
            best = min(free, key=lambda each: _crowd(_groups(each[1]), taken))
            chosen.append(best)
            left.remove(best)
    return [kid for kid, _ in chosen]


def settle(
    voters: Sequence[Kid],
    leaving: Collection[Kid],
    candidates: Sequence[Candidate],
    known: Mapping[Kid, Sequence[str]] = _NOTHING,
) -> list[Kid]:
    """S2, S3. `candidates` are the nodes that are there; of `leaving` none votes any more. `known`
    are the labels of voters that are silent for now."""
    staying = [kid for kid in voters if kid not in leaving]
    if len(staying) == len(voters):
        return staying
    there = [each for each in candidates if each[0] not in leaving]
    silent = [(kid, known.get(kid, ())) for kid in staying if all(kid != each for each, _ in there)]
    pool = [*there, *silent]
    if len(pool) >= len(voters):
        count = len(voters)
    else:
        count = len(pool) if len(pool) % 2 else len(pool) - 1
    return choose(count, pool, staying)


def _groups(labels: Sequence[str]) -> tuple[str, ...]:
    """The value of each of `GROUPS`; "" where a node says nothing: those are taken for one."""
    return tuple(labelling.value(labels, name) for name in GROUPS)


def _crowd(mine: tuple[str, ...], taken: Sequence[tuple[str, ...]]) -> tuple[int, ...]:
    """How many there are already in the same site, in the same rack of it, of the same owner."""
    site, rack, org = mine
    sites = Counter(each[0] for each in taken)
    racks = Counter(each[:2] for each in taken)
    orgs = Counter(each[2] for each in taken)
    return (sites[site], racks[(site, rack)], orgs[org])
