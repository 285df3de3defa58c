"""Catches whatever third-party code raises, as data."""

from __future__ import annotations

from types import TracebackType


class Caught:
    """Keeps whatever third-party code raises inside the block, SystemExit included, as ``error``.

    This is the only place that accepts every exception: a user's grader may raise anything, and its failure
    must become data. KeyboardInterrupt passes through.
    """

    error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return not isinstance(error, KeyboardInterrupt)

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"
