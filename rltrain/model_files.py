"""Files of a model that is a local folder or a repository on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def local_file(path: str, revision: str | None, name: str) -> Path | None:
    """The local path of a model's file, downloaded from the Hub if necessary; None where the model has no
    file of that name.
    """
    # Imported here: the import takes a second, which ``rltrain validate`` does not need.
    from transformers.utils.hub import cached_file

    file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(str(file))


def config_file(path: str, revision: str | None) -> Path | None:
    """The local path of a model's config.json, downloaded from the Hub if necessary; None without one.

    Unlike ``local_file`` it imports no transformers.
    """
    folder = Path(path)
    if folder.is_dir():
        file = folder / "config.json"
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision))
    except (OSError, ValueError):  # offline and not in the cache, no such repository, no name on the Hub
        return None


@contextmanager
def model_errors() -> Iterator[None]:
    """Inside, whatever the libraries raise for a model's broken files is an OSError or a ValueError.

    transformers, huggingface_hub, tokenizers and safetensors raise classes of their own, KeyError, TypeError
    and bare Exceptions for a field that is missing or of another type.
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ValueError(f"{type(error).__name__}: {reason:.300}") from error
