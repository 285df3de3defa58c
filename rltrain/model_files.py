"""Files of a model, wherever it is: in a folder, or on the Hub."""

from __future__ import annotations

from pathlib import Path


def local_file(path: str, revision: str | None, name: str) -> Path | None:
    """Where a file of a model lies on this machine, fetched from the Hub if need be; None: the model
    has none of that name.
    """
    from transformers.utils.hub import cached_file  # a second that validate does not need

    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(str(found))
