"""The finished model as an ordinary Hugging Face folder, re-opened before anyone is told that it is there."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rltrain.checkpoint.run_folder import directory_atomic
from rltrain.checkpoint.tensor_files import write_tensors
from rltrain.weight_names import CheckpointNames

MANIFEST = "files.sha256.json"


class ExportError(RuntimeError):
    """What was written does not load as the architecture it claims to be; nothing was left behind."""


def export_model(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    extra: Callable[[Path], None] | None = None,
    ties: Mapping[str, str] | None = None,
) -> Path:
    """Write ``model`` to the new folder ``out``: safetensors, config, generation config, tokenizer, card,
    file hashes.

    weights: full ones under their checkpoint names, when ``model`` itself is sharded or wrapped, written as
    they come; None: the model's own. ties: second name of a weight to its first; None: the model's. extra:
    puts more into the folder before it is hashed, which makes it a checkpoint. The folder appears whole or
    not at all. Raises UserError when ``out`` exists, ExportError when the weights are not exactly those the
    architecture loads.
    """
    if weights is None or ties is None:
        names = CheckpointNames(model)
        ties = names.ties
        weights = names.to_checkpoint(model.state_dict().items()) if weights is None else weights
    out.parent.mkdir(parents=True, exist_ok=True)
    with directory_atomic(out) as making, _without_progress_bars():
        with _storable_generation_config(model):
            model.save_pretrained(making, state_dict={})
        (making / "model.safetensors").unlink(missing_ok=True)  # that of no weights
        write_tensors(making, "model", _storable(weights, ties, model))
        with _system_errors():
            tokenizer.save_pretrained(making)
        (making / "README.md").write_text(card, encoding="utf-8")
        verify(making, classifier=_is_classifier(model), own_code=_own_code(model) or _own_code(tokenizer))
        if extra is not None:
            extra(making)
        (making / MANIFEST).write_text(json.dumps(file_hashes(making), indent=2) + "\n", encoding="utf-8")
    return out


def verify(folder: Path, *, classifier: bool = False, own_code: bool = False) -> None:
    """Load ``folder`` as a user would, without memory for its weights. Raises ExportError on a missing, extra
    or misshapen tensor.

    classifier: it holds a reward model with a scalar head, which transformers calls one for sequence
    classification. own_code: the folder brings the code of its classes, which this process runs already.
    """
    AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=own_code)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    opened: Any = kind.from_pretrained(
        folder,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
        trust_remote_code=own_code,
    )
    loaded, report = opened
    found = {
        kind: sorted(map(str, report[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")
    }
    wrong = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in found.items() if names]
    if wrong or report["error_msgs"]:
        raise ExportError(
            f"the weights written are not those of {type(loaded).__name__}: "
            f"{'; '.join([*wrong, *report['error_msgs']])}; "
            "pass the state dict of the bare model, under its Hugging Face names"
        )


def _is_classifier(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _own_code(loaded: object) -> bool:
    """Whether its class came with a model folder: transformers imports such code below a package of
    this name.
    """
    return type(loaded).__module__.split(".")[0] == "transformers_modules"


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of ``folder`` but the manifest, by name."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with open(path, "rb") as file:
                hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Inside, what Rust code says in words is raised as Python says it: the tokenizers library has a bare
    Exception for a full disk, "No space left on device (os error 28)"."""
    try:
        yield
    except Exception as error:  # the class itself is what tokenizers raises; any other goes on as it is
        number = re.search(r"\(os error (\d+)\)", str(error)) if type(error) is Exception else None
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws a bar per file and per load; the run has its own line."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _storable(
    weights: Iterable[tuple[str, Tensor]], ties: Mapping[str, str], model: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """``weights`` with one tensor per tied pair, and without what transformers does not store.

    Gathering a sharded model breaks the tie into equal copies. Raises ExportError where they differ, and at
    the end for tensors with NaN or infinity.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    firsts = frozenset(ties.values())
    digests: dict[str, str] = {}
    copies: dict[str, str] = {}
    broken: list[str] = []
    for name, weight in weights:
        if name in ignored:
            continue
        if name in ties:
            copies[name] = _digest(weight)
            continue
        if name in firsts:
            digests[name] = _digest(weight)
        if not torch.isfinite(weight).all():
            broken.append(name)
        yield name, weight
    for copied, digest in copies.items():
        source = ties[copied]
        if digests.get(source, digest) != digest:
            raise ExportError(
                f"{copied} and {source} are tied but differ; one of them is stale, so the model cannot be "
                "written as tied"
            )
    if broken:
        raise ExportError(
            f"{len(broken)} tensors hold NaN or infinity ({', '.join(broken[:3])}); the run lost its "
            "numbers, look at loss/total"
        )


def _digest(weight: Tensor) -> str:
    """SHA-256 of a weight's bytes."""
    flat = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


@contextlib.contextmanager
def _storable_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's generation config is one that transformers agrees to write.

    It reads sampling parameters without ``do_sample`` (many published models have them) but refuses to store
    them: they were meant for sampling, so the stored file says so.
    """
    if _is_classifier(model):  # generates nothing
        yield
        return
    kept = model.generation_config
    try:
        kept.validate(strict=True)
    except ValueError:
        model.generation_config = copy.deepcopy(kept)
        model.generation_config.do_sample = True
    try:
        yield
    finally:
        model.generation_config = kept
