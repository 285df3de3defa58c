"""Rules about ``model.adapter``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rltrain.config.schema import AnyRecipe, Optimizer, SampledRecipe
from rltrain.model_files import ADAPTER_CONFIG, padded_rank

__all__ = ["adapter_problems", "adapter_warnings", "scalar_head_problem"]

# Learning rates at which adapters are trained with AdamW; full training takes about a tenth.
_LEAST_LR = 1e-5
_LARGEST_LR = 1e-3


def adapter_problems(recipe: AnyRecipe) -> Iterator[str]:
    """What engine, export or the base model exclude."""
    adapter = recipe.model.adapter
    if adapter is None:
        return
    is_adapter_folder = (Path(recipe.model.path).expanduser() / ADAPTER_CONFIG).is_file()
    if is_adapter_folder:
        yield (
            f"model.adapter is set, but model.path {recipe.model.path} is itself an adapter, on which no "
            "second one is stacked; merge it first (rltrain soup PATH --out FOLDER) and train on the folder, "
            "or leave model.adapter out to train all weights"
        )
    if adapter.quantize != "none" and adapter.export == "merged":
        yield (
            f"model.adapter.export is merged, but model.adapter.quantize is {adapter.quantize}: a merged "
            "weight would be rounded to that storage again and be another model's; set export to adapter"
        )
    if adapter.quantize != "none" and recipe.learner.offload != "nothing":
        yield (
            f"learner.offload is {recipe.learner.offload} and model.adapter.quantize is {adapter.quantize}: "
            "quantised weights stay on the device; set offload to nothing, or quantize to none"
        )
    if isinstance(recipe, SampledRecipe):
        yield from _engine_problems(recipe)


def _engine_problems(recipe: SampledRecipe) -> Iterator[str]:
    """Engines that cannot take an adapter."""
    rollout = recipe.rollout
    sections = {"vllm": ("vllm", rollout.vllm), "vllm_server": ("server", rollout.server)}
    if rollout.engine not in sections:
        return
    name, section = sections[rollout.engine]
    if section.tensor_parallel > 1:
        yield (
            f"rollout.{name}.tensor_parallel is {section.tensor_parallel}, over which vLLM divides the "
            "adapter's matrices, and the proof of an adapter compares whole ones; set it to 1, or leave "
            "model.adapter out"
        )
    elsewhere = "rollout.workers" if rollout.workers is not None else "rollout.server.url"
    is_elsewhere = rollout.workers is not None or rollout.server.url is not None
    adapter = recipe.model.adapter
    if rollout.engine == "vllm_server" and is_elsewhere and adapter and adapter.quantize != "none":
        yield (
            f"{elsewhere} is set and model.adapter.quantize is {adapter.quantize}: vLLM samples from a copy "
            "of the dequantised base, which lasts on this machine until the run's own worker has read it; "
            f"leave {elsewhere} out, so that the run starts one worker, or set quantize to none"
        )


def scalar_head_problem(recipe: AnyRecipe, traits: frozenset[str]) -> Iterator[str]:
    """An adapter cannot train a new head beside itself."""
    if recipe.model.adapter is not None and "scalar_head" in traits:
        yield (
            "model.adapter is set, but the loss trains a new scalar head, which would have to be a module in "
            "full beside the adapter; leave model.adapter out"
        )


def adapter_warnings(recipe: AnyRecipe) -> Iterator[str]:
    """Learning rates that belong to the other kind of training, and ranks that vLLM pads."""
    yield from _rank_warnings(recipe)
    for key, optimizer in _optimizers(recipe):
        if optimizer.lr == 0:
            continue
        if recipe.model.adapter is None:
            continue
        if optimizer.lr < _LEAST_LR:
            yield (
                f"{key}.lr is {optimizer.lr:g}, which belongs to full training: an adapter starts at 0 and "
                f"would hardly move; about ten times the rate of full training is usual, "
                f"{_LEAST_LR:g} to {_LARGEST_LR:g}"
            )
        elif optimizer.lr > _LARGEST_LR:
            yield (
                f"{key}.lr is {optimizer.lr:g}, above what adapters are trained with "
                f"({_LEAST_LR:g} to {_LARGEST_LR:g}); lower it if the loss or the KL jumps"
            )


def _rank_warnings(recipe: AnyRecipe) -> Iterator[str]:
    adapter = recipe.model.adapter
    if adapter is None or not isinstance(recipe, SampledRecipe) or recipe.rollout.engine != "vllm":
        return
    padded = padded_rank(adapter.rank)
    if padded != adapter.rank:
        yield (
            f"model.adapter.rank is {adapter.rank}, which vLLM serves padded to {padded}: a rank of {padded} "
            "samples at the same cost"
        )


def _optimizers(recipe: AnyRecipe) -> Iterator[tuple[str, Optimizer]]:
    yield "learner.optimizer", recipe.learner.optimizer
    if recipe.kind == "online" and recipe.process_reward is not None:
        yield "process_reward.optimizer", recipe.process_reward.optimizer
