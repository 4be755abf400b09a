"""Cancelling a coroutine ends what it began, whenever it is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from manifold.shells.sdk.aio import Beginning, _begun
from manifold.shells.sdk.future import Future


def test_what_was_begun_when_it_is_given_up_is_cancelled() -> None:
    futures = [Future(), Future()]
    beginning = Beginning(lambda: (futures, list))
    beginning.run()
    assert not any(future.cancelled() for future in futures)
    beginning.give_up()
    assert all(future.cancelled() for future in futures)


def test_what_is_begun_after_it_was_given_up_is_cancelled_as_well() -> None:
    futures = [Future(), Future()]
    beginning = Beginning(lambda: (futures, list))
    beginning.give_up()
    beginning.run()
    assert all(future.cancelled() for future in futures)


def test_a_coroutine_that_is_cancelled_while_its_calls_begin_leaves_none_of_them() -> None:
    future, at_work, go_on = Future(), threading.Event(), threading.Event()

    def begin() -> tuple[list[Future], type[list]]:
        at_work.set()
        assert go_on.wait(10.0)
        return [future], list

    async def main() -> None:
        task = asyncio.ensure_future(_begun(begin))
        assert await asyncio.to_thread(at_work.wait, 10.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not future.cancelled()
        go_on.set()
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(main())
    assert future.cancelled()
