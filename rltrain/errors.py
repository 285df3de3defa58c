"""Errors that are the user's to mend.

The command line prints them as one line; every other exception is ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """Says what arrived, what was expected, and the remedy."""


class RecipeError(UserError):
    """Everything that is wrong with one recipe, one line per problem."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Before weights are loaded, what a file or a folder refuses is the user's to mend, and is said in one
    line.

    What took too long is not: a TimeoutError, an OSError to Python, goes on to the watchdog.
    """
    try:
        yield
    except (UserError, TimeoutError):
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
