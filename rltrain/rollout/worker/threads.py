"""Threads beside the learner's: an event loop for connections, and calls that block. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

__all__ = ["LoopThread", "call_in_thread"]

_Result = TypeVar("_Result")


class LoopThread:
    """An event loop in a thread of its own, so that connections outlive a call."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rltrain-worker", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, call: Callable[..., object], *arguments: Any) -> None:
        """Calls in the loop, soon; the caller does not wait."""
        self._loop.call_soon_threadsafe(call, *arguments)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def call_in_thread(call: Callable[..., _Result], *arguments: Any) -> _Result:
    """The result of a call that blocks, in a thread of its own that does not keep the process alive."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            result = call(*arguments)
        except (RuntimeError, OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            _settle(future.set_exception, error)
        else:
            _settle(future.set_result, result)
        finally:
            if not future.done():  # the thread prints it
                _settle(future.set_exception, RuntimeError(f"{call} ended by a fault of the program"))

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


def _settle(settle: Callable[[Any], None], outcome: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # nobody waits any more
        settle(outcome)
