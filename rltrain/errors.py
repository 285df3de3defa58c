"""Errors that the user can correct.

The command line prints them as one line; every other exception is a fault of this program and keeps its
traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """Says what arrived, what was expected, and the remedy."""


class TemporaryError(RuntimeError):
    """Something outside of this process has failed; the same command may succeed later (exit code 75)."""


class RecipeError(UserError):
    """Everything that is wrong with one recipe, one line per problem."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Inside, a ValueError or OSError (a file or folder that cannot be used) becomes a UserError, one line.

    Used before weights are loaded. A TimeoutError, which is an OSError to Python, is raised as it is, for the
    watchdog.
    """
    try:
        yield
    except (UserError, TimeoutError):
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
