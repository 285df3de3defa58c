"""A reward worker that gets no memory for its imports says which limit to raise, however the interpreter
puts it.
"""

from __future__ import annotations

import errno
import os

import pytest

from rltrain.reward.caught import Caught
from rltrain.reward.worker import _explain_failed_start


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (SystemError("<built-in function compile> returned NULL without setting an exception"), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (ImportError("libx.so: failed to map segment: Cannot allocate memory"), True),
        (ImportError("No module named 'x'"), False),
        (ValueError("there is no file"), False),
    ],
)
def test_what_a_failed_start_is_said_to_be(error: Exception, is_memory: bool) -> None:
    with Caught() as caught:
        raise error
    said = _explain_failed_start(caught)
    assert ("reward.memory_gib; raise it" in said) is is_memory
    assert is_memory or str(error) in said
