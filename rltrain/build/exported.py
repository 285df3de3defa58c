"""The model of a run, or of one of its checkpoints, as a folder by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rltrain.analysis.curves import Curves
from rltrain.build.publication import ADAPTER, ModelOfRun, results_until
from rltrain.checkpoint.export import export_adapter, export_model
from rltrain.checkpoint.model_card import model_card
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import SHARDS, is_sharded, read_verified
from rltrain.checkpoint.shards import ShardedTensors
from rltrain.config.load import load_recipe
from rltrain.config.schema import Adapter, AnyRecipe, Model
from rltrain.data.tokenization import Tokenization, tokenization_of
from rltrain.errors import UserError
from rltrain.learner.adapter import inject_adapter, target_paths
from rltrain.learner.loading import load_causal_lm
from rltrain.learner.reward_learner import load_reward_model, name_pad_token
from rltrain.learner.shards import MASTER
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.remote_code import trust_copy

__all__ = ["export_run"]


def export_run(folder: Path, out: Path, checkpoint: str | None, precision: str) -> Path:
    """Writes the new model folder ``out``: of the checkpoint of that name, else of the finished model, else
    of the latest checkpoint. precision: of the weights, a dtype of torch; an adapter of a checkpoint in parts
    is written as one, in float32.

    Raises UserError: no such model, a damaged checkpoint, an ``out`` that exists.
    """
    source = _find_source(RunFolder.from_path(folder), checkpoint)
    assert source.run is not None
    recipe = load_recipe(source.run.recipe)
    if (source.folder / ADAPTER).is_file():
        raise UserError(
            f"{source.folder} holds an adapter, which is a folder by itself: copy it, or merge it into its "
            "base with peft's merge_and_unload"
        )
    if source.folder != source.run.model:
        read_verified(source.folder)
    results = results_until(Curves.read(source.run.path).evals, source.step)
    card = model_card(recipe.model_dump(mode="json"), results, source.step)
    if recipe.model.adapter is not None and is_sharded(source.folder):
        return _export_adapter(recipe, recipe.model.adapter, source.folder, out.absolute(), card)
    model, tokenization = _load(recipe, source.folder)
    dtype: torch.dtype = getattr(torch, precision)
    return export_model(out.absolute(), model.to(dtype), tokenization.tokenizer, card)  # pyright: ignore[reportArgumentType]


def _export_adapter(recipe: AnyRecipe, settings: Adapter, checkpoint: Path, out: Path, card: str) -> Path:
    """Writes the adapter of a checkpoint in parts. The base, which names its layers, must still be there."""
    model = load_causal_lm(recipe.model.path, recipe.model.revision, "auto")
    adapter = inject_adapter(model, settings, target_paths(model, settings))
    _take_masters(model, ShardedTensors(checkpoint / SHARDS))
    tokenizer = tokenization_of(recipe.model, {}, recipe.data.chat_template).tokenizer
    weights = adapter.weights(lambda weight, dtype: weight.detach())
    return export_adapter(
        out, tokenizer, card, adapter.config(recipe.model), weights, storage=settings.quantize
    )


def _find_source(run: RunFolder, checkpoint: str | None) -> ModelOfRun:
    if not run.recipe.is_file():
        raise UserError(f"{run.path} holds no run ({run.recipe.name} is missing)")
    checkpoints = {path.name: (step, path) for step, path in run.present_checkpoints()}
    if checkpoint is None and run.model.is_dir():
        return ModelOfRun(run.model, run, int(Curves.read(run.path).steps[-1]["step"]))
    name = next(reversed(checkpoints), None) if checkpoint is None else Path(checkpoint).name
    if name is None or name not in checkpoints:
        request = "finished model and no checkpoint" if checkpoint is None else f"checkpoint {checkpoint}"
        present = ", ".join(checkpoints) or "none"
        raise UserError(f"{run.path} has no {request}; checkpoints: {present}")
    step, path = checkpoints[name]
    return ModelOfRun(path, run, step)


def _load(recipe: AnyRecipe, folder: Path) -> tuple[PreTrainedModel, Tokenization]:
    """Model and tokenizer in ``folder``. The weights of a checkpoint in parts are put into the recipe's
    model, which must still be there.
    """
    if not is_sharded(folder):
        trust_copy(folder, recipe.model.path, recipe.model.revision)
        model = _load_model(str(folder), None, is_reward=_has_scalar_head(folder), is_trained=True)
        return model, tokenization_of(Model(path=str(folder)), {})

    tokenization = tokenization_of(recipe.model, {}, recipe.data.chat_template)
    preference: Any = getattr(recipe.loss, "preference", None)
    is_reward = preference is not None and "scalar_head" in PREFERENCE_LOSSES.spec(preference.name).traits
    model = _load_model(recipe.model.path, recipe.model.revision, is_reward=is_reward, is_trained=False)
    if is_reward:
        name_pad_token(model, tokenization.stop_tokens.pad, tokenization.stop_tokens.stop)
    _take_masters(model, ShardedTensors(folder / SHARDS))
    return model, tokenization


@torch.no_grad()
def _take_masters(model: PreTrainedModel, tensors: ShardedTensors) -> None:
    """Gives ``model`` the trained weights; a frozen one stays the recipe's model's."""
    for name, parameter in model.named_parameters():
        if f"{name}/{MASTER}" in tensors:
            parameter.copy_(tensors[f"{name}/{MASTER}"])


def _load_model(path: str, revision: str | None, *, is_reward: bool, is_trained: bool) -> PreTrainedModel:
    if is_reward:
        return load_reward_model(path, revision, "auto", trained=is_trained)
    return load_causal_lm(path, revision, "auto")


def _has_scalar_head(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
