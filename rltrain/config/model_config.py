"""The config.json of a recipe's models where it is on this machine: in the model's folder or in the Hub's
cache.

Reads files only: imports neither torch nor transformers, and downloads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rltrain.config.schema import AnyRecipe, OfflineRecipe
from rltrain.errors import UserError
from rltrain.json_text import parse_json
from rltrain.model_files import config_source
from rltrain.model_limits import Context, context_of, require_context

__all__ = ["config_path", "context_problems", "count_experts", "model_context", "models_of", "row_sizes"]

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def config_path(model: str, revision: str | None = None) -> Path:
    """Where the config.json of ``model``, a folder or a Hub name, would be; the file need not exist.

    The Hub's cache has a folder ``snapshots/COMMIT`` for each downloaded commit, and the commit of a branch
    in ``refs/BRANCH``.
    """
    model, revision = config_source(model, revision)
    folder = Path(model)
    if folder.is_dir() or model.count("/") > 1:
        return folder / "config.json"
    cache = _hub_cache() / f"models--{model.replace('/', '--')}"
    reference = cache / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return cache / "snapshots" / (commit or "main") / "config.json"


def model_context(model: str, revision: str | None = None) -> Context | None:
    """The longest row that ``model`` reads; None where its config.json is not here or sets no limit."""
    config = _read_config(config_path(model, revision))
    return None if config is None else context_of(config)


def context_problems(recipe: AnyRecipe) -> Iterator[str]:
    """The models of a recipe that cannot read its longest row, of those whose config.json is here."""
    for key, model, revision in models_of(recipe):
        config = _read_config(config_path(model, revision))
        if config is None:
            continue
        try:
            require_context(config, f"{key} {model}", row_sizes(recipe))
        except UserError as error:
            yield str(error)


def count_experts(model: str, revision: str | None = None) -> int:
    """Experts of a layer by the model's config.json; 0 where there are none, or the file is not here."""
    try:
        facts: Any = parse_json(config_path(model, revision).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    text = facts.get("text_config", facts) if isinstance(facts, Mapping) else {}
    counts = [text.get(name) for name in _EXPERT_KEYS] if isinstance(text, Mapping) else []
    return max((count for count in counts if isinstance(count, int) and count > 1), default=0)


def row_sizes(recipe: AnyRecipe) -> dict[str, int]:
    """The most tokens of each part of a row, by recipe key."""
    prompt = {"data.max_prompt_tokens": recipe.data.max_prompt_tokens}
    if isinstance(recipe, OfflineRecipe):
        return prompt | {"data.max_completion_tokens": recipe.data.max_completion_tokens}
    return prompt | {"rollout.max_tokens": recipe.rollout.max_tokens}


def models_of(recipe: AnyRecipe) -> Iterator[tuple[str, str, str | None]]:
    """(key, name, revision) of the models that read whole rows."""
    yield "model.path", recipe.model.path, recipe.model.revision
    others = {"model.reference": recipe.model.reference, "model.teacher": recipe.model.teacher}
    if isinstance(recipe, OfflineRecipe):
        others["model.previous"] = recipe.model.previous
    if recipe.kind == "online" and recipe.process_reward is not None:
        others["process_reward.path"] = recipe.process_reward.path
    for key, model in others.items():
        if model is not None:
            yield key, model, None


def _read_config(path: Path) -> SimpleNamespace | None:
    """The file in the form of a transformers config, as far as the context depends on it; None without the
    file, or if it says nothing about the length.
    """
    try:
        facts: Any = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text = facts.get("text_config", facts) if isinstance(facts, Mapping) else {}
    if not isinstance(text, Mapping) or not isinstance(text.get("max_position_embeddings"), int):
        return None
    values = {"model_type": "", **text}
    rotary = values.get("rope_parameters") or values.get("rope_scaling")
    original = values.get("original_max_position_embeddings")
    if isinstance(rotary, Mapping) and original is not None:  # older folders have it beside, not inside
        values["rope_parameters"] = {"original_max_position_embeddings": original, **rotary}
    config = SimpleNamespace(**values)
    config.get_text_config = lambda: config
    return config


def _hub_cache() -> Path:
    """The folder that huggingface_hub keeps models in, by the same variables."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    home = Path(os.environ.get("HF_HOME") or home).expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
