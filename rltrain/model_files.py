"""Files of a model that is a local folder or a repository on the Hub."""

from __future__ import annotations

from pathlib import Path


def local_file(path: str, revision: str | None, name: str) -> Path | None:
    """The local path of a model's file, downloaded from the Hub if necessary; None where the model has no
    file of that name.
    """
    # Imported here: the import takes a second, which ``rltrain validate`` does not need.
    from transformers.utils.hub import cached_file

    file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(str(file))
