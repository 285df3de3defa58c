"""What the rules of several graders share: settings that cannot work, found before a run starts.

``values`` are the grader's hyperparameters, defaults included; ``recipe`` is the whole recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

__all__ = ["check_address", "check_time_limit"]


def check_time_limit(values: Mapping[str, Any], recipe: Any, key: str = "seconds") -> Iterator[str]:
    """Checks that the grader's own limit of wall-clock time ends before that of its process."""
    limit = recipe.reward.seconds
    if values[key] >= limit:
        yield (
            f"{key} is {values[key]:g}, but its process is ended after reward.seconds {limit:g} and its "
            "completions stay ungraded; set reward.seconds above it"
        )


def check_address(values: Mapping[str, Any]) -> Iterator[str]:
    """Checks the address of a grader's server, and that it holds no secret."""
    try:
        parts = urlsplit(str(values["url"]))
    except ValueError:  # brackets around what is no IPv6 address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        yield "url must be the address of a server, such as http://127.0.0.1:8000/v1; set url"
    if parts.username or parts.password:
        yield (
            "the url holds a password, and recipes are copied to other places; name an environment variable "
            "in token_env"
        )
