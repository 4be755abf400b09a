"""`map` and `reduce` over a cluster, for functions and for kernels.

Interface rules: results keep the order of their items. Items are cut into chunks, each one call; a
chunk is a few for each slot, so that a slow one does not hold up the rest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import TYPE_CHECKING, Any

from manifold.shells.sdk.future import Future, Progress
from manifold.shells.sdk.placing import Where
from manifold.shells.sdk.progress import PROGRESS_S, Shown, is_program, remaining_s, shown

if TYPE_CHECKING:
    from manifold.shells.sdk.client import Client

CHUNKS_PER_SLOT = 4  # as multiprocessing.Pool: the last chunk is an eighth of a slot's time at most
CHUNK_MAX = 65_536
_NOTHING = object()


class Chunk:
    """A function of one item as one of many; importable, so that only the function is pickled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__qualname__ = getattr(function, "__qualname__", type(function).__qualname__)

    def __call__(self, items: Sequence[tuple[Any, ...]]) -> list[Any]:
        function = self.function
        return [function(*item) for item in items]


class ChunkOfOne(Chunk):
    """The same for functions of one argument: the items need no tuples around them."""

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        return list(map(self.function, items))


class Reduced(Chunk):
    """A reduction of neighbours."""

    def __call__(self, items: Sequence[Any]) -> Any:
        return functools.reduce(self.function, items)


def chunks(items: Sequence[Any], chunksize: int, slots: int) -> list[Sequence[Any]]:
    """`items` in runs of `chunksize`; 0: a few for each slot."""
    size = chunksize or min(CHUNK_MAX, max(1, -(-len(items) // (slots * CHUNKS_PER_SLOT))))
    return [items[at : at + size] for at in range(0, len(items), size)]


Joined = tuple[list[Future], Callable[[list[Any]], Any]]  # futures, and what their results make


def map_futures(
    client: Client,
    function: Any,
    iterables: tuple[Iterable[Any], ...],
    chunksize: int,
    where: Where = (),
) -> Joined:
    """Everything a `map` waits for."""
    if not iterables:
        raise TypeError("map() needs something to map over")
    if chunksize < 0:
        raise ValueError("chunksize is at least 1, or 0 to have it chosen")
    items: Sequence[Any]
    if len(iterables) == 1:
        first = iterables[0]
        items = first if isinstance(first, (list, tuple, range)) else list(first)
    else:
        items = list(zip(*iterables, strict=False))
    if is_program(function):
        return _program_futures(client, function, items, len(iterables), where)
    if not items:
        return [], _flat
    calls = client.own_calls(where)
    chunk = calls.code(ChunkOfOne(function) if len(iterables) == 1 else Chunk(function))
    parts = chunks(items, chunksize, calls.workers)
    return [calls.submit(chunk, (part,), {}) for part in parts], _flat


def _flat(parts: list[Any]) -> list[Any]:
    return [value for part in parts for value in part]


def _program_futures(
    client: Client, program: Any, items: Sequence[Any], width: int, where: Where
) -> Joined:
    if isinstance(items, range) and items.step == 1 and items:
        return [client.job(program, items.start, items.stop, where=where)], _flat
    rows = items if width > 1 else [(item,) for item in items]
    return [client.submit_where(where, program, *row) for row in rows], list


def reduce_futures(
    client: Client,
    function: Callable[[Any, Any], Any],
    items: Iterable[Any],
    chunksize: int,
    where: Where = (),
) -> Joined:
    """Everything a `reduce` waits for."""
    listed = items if isinstance(items, (list, tuple, range)) else list(items)
    if not listed:
        raise TypeError("reduce() of an empty sequence")
    calls = client.own_calls(where)
    reduction = calls.code(Reduced(function))
    parts = chunks(listed, chunksize, calls.workers)
    futures = [calls.submit(reduction, (part,), {}) for part in parts]
    return futures, functools.partial(functools.reduce, function)


class _Many:
    """Several futures as one for a progress bar."""

    def __init__(self, futures: Sequence[Future]) -> None:
        self._futures = futures
        self._began_s = time.monotonic()

    def progress(self) -> Progress:
        elapsed_ms = 1000 * (time.monotonic() - self._began_s)
        if len(self._futures) == 1:
            return self._futures[0].progress() or Progress(0, 1, 1, 0, elapsed_ms)
        done = sum(future.done() for future in self._futures)
        return Progress(done, len(self._futures), len(self._futures), 0, elapsed_ms)


def gathered(joined: Joined, timeout_s: float | None, progress: Shown) -> Any:
    """What the futures make; the first exception, a timeout or a Ctrl-C cancels the rest."""
    futures, join = joined
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    many = _Many(futures)
    left: set[Any] = set(futures)
    try:
        with shown(progress) as show:
            while left:
                patience_s = remaining_s(deadline_s)
                if show is not None:
                    patience_s = PROGRESS_S if patience_s is None else min(PROGRESS_S, patience_s)
                done, left = wait(left, patience_s, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if show is not None:
                    show(many)
                if left and remaining_s(deadline_s) == 0:
                    raise TimeoutError(f"{len(left)} of {len(futures)} parts were not done in time")
        return join([future.result() for future in futures])
    except BaseException:
        for future in left:
            future.cancel()
        raise
