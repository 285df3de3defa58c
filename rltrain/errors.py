"""Errors that are the user's to mend. The command line prints them as one line; every other exception is ours and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """Says what arrived, what was expected, and the remedy."""


class RecipeError(UserError):
    """Everything that is wrong with one recipe, one line per problem."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))
