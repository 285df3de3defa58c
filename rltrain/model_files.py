"""Files of a model that is a local folder or a repository on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rltrain.errors import UserError
from rltrain.json_text import parse_json

ADAPTER_CONFIG = "adapter_config.json"  # of a folder that holds a LoRA adapter
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_STORAGE = "adapter_base.json"  # beside it, where the base was quantised: in which storage
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the largest ranks that vLLM can be started with
# Adapters in vLLM's memory: the one that samples, and the next one while it is loaded. Nothing is in flight
# at a push.
ADAPTER_SLOTS = 2


def padded_rank(rank: int) -> int:
    """The rank to which vLLM pads adapters of ``rank``."""
    return next(size for size in SERVED_RANKS if size >= rank)


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
    path, revision = config_source(path, revision)
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


def adapter_base(path: str) -> tuple[str, str | None] | None:
    """(name, revision) of the model that an adapter in the folder ``path`` belongs to; None for a whole
    model.

    Raises UserError where its adapter_config.json names none.
    """
    file = Path(path) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); export the adapter again") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: base_model_name_or_path is {base!r}; write the base model's name there")
    return base, config.get("revision")


def adapter_storage(path: str) -> str:
    """The storage of the base's weights when the adapter in the folder ``path`` was trained; "none": not
    quantised. Raises UserError where its file cannot be read.
    """
    file = Path(path) / ADAPTER_STORAGE
    if not file.is_file():
        return "none"
    try:
        return str(parse_json(file.read_text(encoding="utf-8"))["quantize"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); export the adapter again") from error


def config_source(path: str, revision: str | None) -> tuple[str, str | None]:
    """(name, revision) of the model whose config.json describes the model ``path``: an adapter's base."""
    return adapter_base(path) or (path, revision)
