"""A worker that is back already is not lost for what failed before, and is counted once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from rltrain.rollout.pool.members import MemberState
from rltrain.rollout.pool.pool import PoolRules, WorkerPool

SECONDS = 20.0  # that no machine is too slow for


class AliveClient:
    def require_alive(self) -> None: ...

    async def close_async(self) -> None: ...

    def close(self) -> None: ...


class SlowHome:
    """Opens a worker when it is told to."""

    is_local = True

    def __init__(self) -> None:
        self.may_open = threading.Event()
        self.may_open.set()

    def open(self) -> tuple[Any, int]:
        assert self.may_open.wait(SECONDS)
        return AliveClient(), 4

    def require_process(self) -> None: ...

    def close(self) -> None:
        self.may_open.set()


async def reach(pool: WorkerPool, state: MemberState) -> None:
    async with asyncio.timeout(SECONDS):
        while not pool.find_members(state):
            await asyncio.sleep(0.001)


async def fail_push(pool: WorkerPool) -> None:
    await pool.end_push(1, (), {"worker 0": RuntimeError("it disconnected")}, {})


async def fail_call(pool: WorkerPool) -> None:
    await pool.lose({"worker 0": RuntimeError("it disconnected")})


@contextlib.asynccontextmanager
async def open_pool(home: SlowHome) -> AsyncIterator[WorkerPool]:
    """Whose worker is attached."""
    pool = WorkerPool({"worker 0": home}, PoolRules(vocabulary=8, retry=0.01), lambda line: None)
    try:
        await pool.start()
        await reach(pool, MemberState.ATTACHED)
        yield pool
    finally:
        home.may_open.set()
        await pool.close()


@pytest.mark.parametrize("fail", [fail_push, fail_call])
@pytest.mark.parametrize("back", [MemberState.STARTING, MemberState.ATTACHED])
def test_what_failed_before_it_was_lost_is_not_held_against_it(
    back: MemberState, fail: Callable[[WorkerPool], Awaitable[None]]
) -> None:
    """Its process died in the middle of a push, which was noticed before the push failed."""

    async def run() -> None:
        home = SlowHome()
        async with open_pool(home) as pool:
            assert list(await pool.begin_push()) == ["worker 0"]
            home.may_open.clear()
            pool._lose(pool.members["worker 0"], "its process ended")
            await reach(pool, MemberState.STARTING)
            if back is MemberState.ATTACHED:
                home.may_open.set()
                await reach(pool, back)
            await fail(pool)
            assert pool.members["worker 0"].state is back
            home.may_open.set()
            await reach(pool, MemberState.ATTACHED)
            assert (pool.counts.lost, pool.counts.restarts) == (1, 1)

    asyncio.run(run())


@pytest.mark.parametrize("fail", [fail_push, fail_call])
def test_a_worker_that_fails_a_push_or_a_call_is_lost(
    fail: Callable[[WorkerPool], Awaitable[None]],
) -> None:
    async def run() -> None:
        async with open_pool(SlowHome()) as pool:
            await pool.begin_push()
            if fail is fail_call:
                await pool.end_push(0, ("worker 0",), {}, {})
            await fail(pool)
            assert pool.counts.lost == 1
            await reach(pool, MemberState.ATTACHED)

    asyncio.run(run())


def test_a_pool_that_is_closed_just_after_a_loss_ends() -> None:
    """Its worker is being watched, and a cancellation must not be lost between the two."""

    async def run() -> None:
        async with open_pool(SlowHome()) as pool:
            pool._lose(pool.members["worker 0"], "its process ended")
            async with asyncio.timeout(SECONDS):
                await pool.close()
            assert pool.counts.lost == 1
            assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    asyncio.run(run())
