"""Exports a model as an ordinary Hugging Face folder, and loads that folder before it appears under its
name.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from rltrain.checkpoint.manifest import MANIFEST, file_hashes
from rltrain.checkpoint.run_folder import directory_atomic
from rltrain.checkpoint.tensor_files import write_tensors
from rltrain.model_files import ADAPTER_CONFIG, ADAPTER_STORAGE, ADAPTER_WEIGHTS
from rltrain.weight_names import CheckpointNames


class ExportError(RuntimeError):
    """The files written do not load as the model's architecture; they have been removed."""


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

    weights: full weights under their checkpoint names, when ``model`` itself is sharded or wrapped, written
    as they arrive; None: the model's own. ties: second name of a weight to its first; None: the model's own.
    extra: writes further files into the folder before it is hashed, such as a checkpoint's state. The folder
    appears completely or not at all. Raises UserError when ``out`` exists, ExportError when the weights are
    not exactly those that the architecture loads.
    """
    if weights is None or ties is None:
        names = CheckpointNames(model)
        ties = names.ties
        weights = names.to_checkpoint(model.state_dict().items()) if weights is None else weights
    out.parent.mkdir(parents=True, exist_ok=True)
    with directory_atomic(out) as temporary, _without_progress_bars():
        with _storable_generation_config(model):
            model.save_pretrained(temporary, state_dict={})
        (temporary / "model.safetensors").unlink(missing_ok=True)  # it holds no weights
        write_tensors(temporary, "model", _storable_weights(weights, ties, model))
        with _system_errors():
            tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        verify(
            temporary,
            classifier=_is_classifier(model),
            own_code=_has_own_code(model) or _has_own_code(tokenizer),
        )
        if extra is not None:
            extra(temporary)
        (temporary / MANIFEST).write_text(
            json.dumps(file_hashes(temporary), indent=2) + "\n", encoding="utf-8"
        )
    return out


def export_adapter(
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    config: Mapping[str, Any],
    weights: Iterable[tuple[str, Tensor]],
    extra: Callable[[Path], None] | None = None,
    storage: str = "none",
) -> Path:
    """Write an adapter to the new folder ``out`` as peft does, with tokenizer and card beside it.

    transformers, peft and vLLM load it with its base. A config.json would make transformers look for a whole
    model there.

    config: the content of adapter_config.json. weights: by peft's names. extra: as for ``export_model``.
    storage: of the base when the adapter was trained. Raises UserError when ``out`` exists, ExportError on
    NaN.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with directory_atomic(out) as temporary:
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if storage != "none":
            text = json.dumps({"quantize": storage}) + "\n"
            (temporary / ADAPTER_STORAGE).write_text(text, encoding="utf-8")
        # peft and vLLM read one file
        write_tensors(temporary, Path(ADAPTER_WEIGHTS).stem, _finite_weights(weights), limit=sys.maxsize)
        with _system_errors():
            tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        AutoTokenizer.from_pretrained(
            temporary, local_files_only=True, trust_remote_code=_has_own_code(tokenizer)
        )
        if extra is not None:
            extra(temporary)
        (temporary / MANIFEST).write_text(
            json.dumps(file_hashes(temporary), indent=2) + "\n", encoding="utf-8"
        )
    return out


def _finite_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """``weights`` unchanged. Raises ExportError, after the last weight, where one holds NaN or infinity."""
    nonfinite: list[str] = []
    for name, weight in weights:
        if not torch.isfinite(weight).all():
            nonfinite.append(name)
        yield name, weight
    _refuse_nonfinite(nonfinite)


def _refuse_nonfinite(names: Sequence[str]) -> None:
    if names:
        raise ExportError(
            f"{len(names)} tensors hold NaN or infinity ({', '.join(names[:3])}): the run diverged, "
            "look at loss/total"
        )


def verify(folder: Path, *, classifier: bool = False, own_code: bool = False) -> None:
    """Load ``folder`` as a user would, without memory for its weights. Raises ExportError on a missing, extra
    or misshapen tensor.

    classifier: the folder holds a reward model with a scalar head, in transformers a model for sequence
    classification. own_code: the folder contains the code of its classes, which this process runs already.
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
    keys = {
        problem: sorted(map(str, report[f"{problem}_keys"]))
        for problem in ("missing", "unexpected", "mismatched")
    }
    problems = [
        f"{len(names)} {problem} ({', '.join(names[:3])})" for problem, names in keys.items() if names
    ]
    problems += report["error_msgs"]
    if problems:
        raise ExportError(
            f"the weights written are not those of {type(loaded).__name__}: {'; '.join(problems)}; "
            "pass the state dict of the bare model, under its Hugging Face names"
        )


def _is_classifier(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _has_own_code(loaded: object) -> bool:
    """Whether the class of ``loaded`` came with a model folder: transformers imports such code below a
    package of this name.
    """
    return type(loaded).__module__.split(".")[0] == "transformers_modules"


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Inside, errors of the operating system from Rust code become an OSError: the tokenizers library raises
    a bare Exception for a full disk, "No space left on device (os error 28)".
    """
    try:
        yield
    except Exception as error:  # tokenizers raises this class itself; a subclass is raised as it is
        number = re.search(r"\(os error (\d+)\)", str(error)) if type(error) is Exception else None
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Inside, transformers draws no progress bars; the run reports its own progress."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _storable_weights(
    weights: Iterable[tuple[str, Tensor]], ties: Mapping[str, str], model: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """``weights`` with one tensor per tied pair, and without those that transformers does not store.

    Gathering a sharded model gives two equal copies of a tied weight. Raises ExportError, after the last
    weight, where copies differ or a tensor holds NaN or infinity.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    first_names = frozenset(ties.values())
    digests: dict[str, str] = {}
    nonfinite: list[str] = []
    for name, weight in weights:
        if name in ignored:
            continue
        if name in ties or name in first_names:
            digests[name] = _digest(weight)
        if name in ties:
            continue
        if not torch.isfinite(weight).all():
            nonfinite.append(name)
        yield name, weight
        del weight

    for copied, source in ties.items():
        if copied in digests and source in digests and digests[copied] != digests[source]:
            raise ExportError(
                f"{copied} and {source} are tied but differ; one of them is stale, so the model cannot be "
                "written as tied"
            )
    _refuse_nonfinite(nonfinite)


def _digest(weight: Tensor) -> str:
    """SHA-256 of a weight's bytes."""
    flat = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


@contextlib.contextmanager
def _storable_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's generation config is one that transformers will write.

    transformers reads sampling parameters without ``do_sample`` (many published models have them) but refuses
    to store them. They were meant for sampling, so ``do_sample`` is set.
    """
    if _is_classifier(model):  # generates nothing
        yield
        return
    original = model.generation_config
    try:
        original.validate(strict=True)
    except ValueError:
        model.generation_config = copy.deepcopy(original)
        model.generation_config.do_sample = True
    try:
        yield
    finally:
        model.generation_config = original
