"""The numbers that follow from a recipe, computed before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rltrain.config.capacity.adapter import adapter_size
from rltrain.config.capacity.shape import ModelShape, read_shape
from rltrain.config.model_config import config_path, model_context
from rltrain.config.plan_offline import plan_offline
from rltrain.config.rules.online_pairs import pair_plan
from rltrain.config.rules.registries import EXTRA_SAMPLES
from rltrain.config.schema import (
    Adapter,
    AnyRecipe,
    MethodRef,
    OfflineRecipe,
    OnlinePairsRecipe,
    OnlineRecipe,
    SampledRecipe,
)

GIB = 2**30
WEIGHT_BYTES = 4  # per parameter that is not trained: float32
MASTER_BYTES = 16  # per parameter: float32 weight, gradient and AdamW's two moments
REWARD_BYTES = 4  # per parameter of a model that scores


class PlanLine(NamedTuple):
    name: str
    value: str
    note: str  # unit and derivation


def plan(recipe: AnyRecipe) -> list[PlanLine]:
    """The derived numbers in the order of a step. Memory is included only if the model's config.json is on
    this machine.
    """
    return _PLANS[recipe.kind](recipe)


def _plan_online(recipe: OnlineRecipe) -> list[PlanLine]:
    other_models = [*_process_reward_lines(recipe), *_reward_model_lines(recipe.reward.functions)]
    return [
        *_rollout_lines(recipe),
        *_learner_lines(recipe),
        *_evaluation_lines(recipe),
        *_memory_lines(recipe),
        *other_models,
    ]


def _plan_pairs(recipe: OnlinePairsRecipe) -> list[PlanLine]:
    sampling = [*_rollout_lines(recipe), *_learner_lines(recipe)]
    prefixes = ("rollout", "reward", "learner: updates", "learner: groups")
    sampling_lines = [line for line in sampling if line.name.startswith(prefixes)]
    pairs = [PlanLine(*line) for line in pair_plan(recipe)]
    judges = _reward_model_lines([*recipe.reward.functions, recipe.pairs.judge])
    return [*sampling_lines, *pairs, *_evaluation_lines(recipe), *_memory_lines(recipe), *judges]


def _plan_offline(recipe: OfflineRecipe) -> list[PlanLine]:
    return [*(PlanLine(*line) for line in plan_offline(recipe)), *_learner_memory_lines(recipe)[0]]


_PLANS: Mapping[str, Callable[[Any], list[PlanLine]]] = {
    "online": _plan_online,
    "online_pairs": _plan_pairs,
    "offline": _plan_offline,
    "sft": _plan_offline,
}


def _rollout_lines(recipe: SampledRecipe) -> list[PlanLine]:
    rollout = recipe.rollout
    reward = recipe.reward
    rows = rollout.prompts * rollout.n
    rounds = rollout.dynamic_sampling.max_rounds if rollout.dynamic_sampling else 1
    sources = [(ref.name, _extra_rows(recipe, ref)) for ref in rollout.extra_samples]
    graded = rows + sum(count for _, count in sources)
    grading = len(reward.functions) * graded * reward.seconds / reward.workers

    lines = [
        PlanLine(
            "rollout: completions per step",
            f"{rows:,}",
            f"rollout.prompts {rollout.prompts} x rollout.n {rollout.n}, all ranks",
        ),
        *(
            PlanLine(
                f"rollout: {name} rows per step", f"{count:,}", "additional rows, from rollout.extra_samples"
            )
            for name, count in sources
        ),
        PlanLine(
            "rollout: longest row",
            f"{_longest_row(recipe):,}",
            "tokens, data.max_prompt_tokens + rollout.max_tokens",
        ),
        PlanLine("rollout: tokens per step, at most", f"{rows * rollout.max_tokens:,}", "completion tokens"),
        PlanLine(
            "rollout: prompts drawn in all",
            f"{recipe.train.steps * rollout.prompts:,}",
            "train.steps x rollout.prompts",
        ),
    ]

    if rounds > 1:
        prompts_drawn = rounds * rollout.prompts
        lines.append(
            PlanLine(
                "rollout: prompts drawn per step, at most",
                f"{prompts_drawn:,}",
                f"dynamic sampling, {rounds} rounds",
            )
        )

    lines.append(
        PlanLine(
            "reward: grading per step, at most",
            f"{grading:,.0f}",
            "seconds, if every completion reached its limit",
        )
    )
    return lines


def _extra_rows(recipe: SampledRecipe, ref: MethodRef) -> int:
    """Completions that a source adds to a step."""
    rollout = recipe.rollout
    hp = {name: item.default for name, item in EXTRA_SAMPLES.spec(ref.name).hyperparameters.items()} | ref.hp
    if "share" in hp:
        return max(int(hp["share"] * rollout.prompts + 1e-9), hp["share"] > 0) * rollout.n
    return rollout.prompts * ((hp["n"] or rollout.n) if "n" in hp else 1)


def _learner_lines(recipe: SampledRecipe) -> list[PlanLine]:
    rollout = recipe.rollout
    learner = recipe.learner
    groups = rollout.prompts / learner.updates
    rows = learner.tokens_per_micro_batch // _longest_row(recipe)
    most_rows = -(-rollout.prompts // learner.updates) * rollout.n
    micro = -(-most_rows // rows) if rows else 0
    lag = learner.updates_per_step * (recipe.rollout.oldest + 1) - 1
    return [
        PlanLine(
            "learner: updates per step",
            f"{learner.updates_per_step}",
            f"learner.updates {learner.updates} x epochs {learner.epochs}",
        ),
        PlanLine(
            "learner: updates in all",
            f"{learner.updates_per_step * recipe.train.steps:,}",
            f"x train.steps {recipe.train.steps:,}",
        ),
        PlanLine("learner: groups per update", f"{groups:g}", "rollout.prompts / learner.updates"),
        PlanLine("learner: completions per update", f"{groups * rollout.n:g}", "all ranks"),
        PlanLine(
            "learner: longest rows per micro-batch",
            f"{rows}",
            "of learner.tokens_per_micro_batch; more if rows are shorter",
        ),
        PlanLine("learner: micro-batches per update, at most", f"{micro:,}", "shared among the ranks"),
        PlanLine(
            "learner: staleness, at most",
            f"{lag}",
            "updates between the policy that sampled and the one that learns",
        ),
    ]


def _evaluation_lines(recipe: SampledRecipe) -> list[PlanLine]:
    if recipe.data.eval is None:
        return [PlanLine("eval", "none", "data.eval is null")]
    settings = recipe.eval
    steps = recipe.train.steps
    evaluations = 1 + settings.at_start + ((steps - 1) // settings.every if settings.every else 0)
    completions = settings.prompts * settings.n
    return [
        PlanLine(
            "eval: completions",
            f"{completions:,} x {evaluations}",
            f"eval.prompts {settings.prompts} x eval.n {settings.n}, {evaluations} times, at most",
        )
    ]


def _memory_lines(recipe: SampledRecipe) -> list[PlanLine]:
    learner, size = _learner_memory_lines(recipe)
    if size is None:
        return learner

    kv_bytes = (4 if recipe.learner.precision == "float32" else 2) * size.kv_numbers_per_token
    rows = recipe.rollout.prompts * recipe.rollout.n
    if recipe.rollout.engine == "transformers":
        rows = min(rows, recipe.rollout.max_rows)
    return [
        *learner,
        PlanLine("memory: KV per token", f"{kv_bytes:,}", "bytes"),
        PlanLine(
            "memory: KV of a step, at most",
            _format_gib(kv_bytes * rows * _longest_row(recipe)),
            f"{rows:,} longest rows at once, all ranks",
        ),
    ]


def _process_reward_lines(recipe: OnlineRecipe) -> list[PlanLine]:
    """Memory of the process reward model and of its reference."""
    settings = recipe.process_reward
    if settings is None:
        return []
    path = settings.path or recipe.model.path
    reference = settings.reference
    lines = [
        _weights_line(
            "process reward model",
            path,
            MASTER_BYTES if recipe.model.adapter is None else WEIGHT_BYTES,
            "weights, gradients, AdamW in float32; divided by ranks if sharded"
            if recipe.model.adapter is None
            else "weights in float32 at most, under an adapter; divided by ranks if sharded",
        )
    ]
    if reference == "policy":
        return [
            *lines,
            PlanLine(
                "memory: its reference",
                "none",
                "process_reward.reference is policy, whose log-probs are there already",
            ),
        ]
    if reference is None and recipe.model.adapter is not None:
        note = "the adapter switched off is the reference"
        return [*lines, PlanLine("memory: its reference", "none", note)]
    return [
        *lines,
        _weights_line(
            "its reference",
            reference or path,
            4 if recipe.learner.precision == "float32" else 2,
            "weights in the learner's precision on a GPU; divided by ranks if sharded",
        ),
    ]


def _reward_model_lines(refs: Sequence[MethodRef]) -> list[PlanLine]:
    """Memory of the reward models that score in the learner's processes; each use loads one."""
    paths = [str(ref.hp["path"]) for ref in refs if ref.name == "reward_model" and "path" in ref.hp]
    return [
        _weights_line(
            "reward model", path, REWARD_BYTES, "weights in float32, on every rank; half of it on a GPU"
        )
        for path in paths
    ]


def _weights_line(role: str, path: str, bytes_per_parameter: int, note: str) -> PlanLine:
    """A line about the memory of a model's weights."""
    size = read_shape(config_path(path))
    if size is None:
        return PlanLine(f"memory: {role}", "unknown", f"no readable config.json in {path} on this machine")
    return PlanLine(
        f"memory: {role}",
        _format_gib(bytes_per_parameter * size.parameters),
        f"{size.parameters:,} parameters; {note}",
    )


def _learner_memory_lines(recipe: SampledRecipe | OfflineRecipe) -> tuple[list[PlanLine], ModelShape | None]:
    context = _context_line(recipe)
    size = read_shape(config_path(recipe.model.path, recipe.model.revision))
    if size is None:
        reason = f"no readable config.json in {recipe.model.path} on this machine"
        return [context, PlanLine("memory", "unknown", reason)], None
    chunk = recipe.learner.head_chunk_on("cuda")
    place = ", on a GPU" if recipe.learner.head_chunk == "auto" else ""
    logits = 4 * chunk * size.vocabulary
    lines = [
        context,
        PlanLine("model: parameters", f"{size.parameters:,}", "from its config.json"),
        *_trained_lines(recipe.model.adapter, size, 4 if recipe.learner.precision == "float32" else 2),
        PlanLine(
            "memory: logits of a chunk",
            _format_gib(logits),
            f"learner.head_chunk {chunk}{place} x vocabulary {size.vocabulary:,}",
        ),
    ]
    return lines, size


def _trained_lines(adapter: Adapter | None, shape: ModelShape, compute_bytes: int) -> list[PlanLine]:
    """Memory of what is trained, and of the base under an adapter."""
    note = "weights, gradients, AdamW in float32; divided by ranks if sharded"
    if adapter is None:
        return [PlanLine("memory: learner", _format_gib(MASTER_BYTES * shape.parameters), note)]
    size = adapter_size(adapter, shape)
    base = size.base_bytes(shape, compute_bytes, throughout=False)
    storage = "in the precision of the products" if adapter.quantize == "none" else f"in {adapter.quantize}"
    return [
        PlanLine("model: parameters of the adapter", f"{size.parameters:,}", f"rank {adapter.rank}"),
        PlanLine("memory: learner", _format_gib(MASTER_BYTES * size.parameters), f"the adapter's {note}"),
        PlanLine(
            "memory: base of the adapter",
            _format_gib(base),
            f"linear layers {storage} on a GPU, the rest in float32; one process or DDP",
        ),
    ]


def _context_line(recipe: SampledRecipe | OfflineRecipe) -> PlanLine:
    """The longest row that the model reads; the rules refuse a recipe whose rows are longer."""
    name = "model: tokens of a row, at most"
    context = model_context(recipe.model.path, recipe.model.revision)
    if context is None:
        reason = f"no length in a config.json of {recipe.model.path} on this machine: rows not compared"
        return PlanLine(name, "unknown", reason)
    return PlanLine(name, f"{context.tokens:,}", context.why)


def _longest_row(recipe: SampledRecipe) -> int:
    return recipe.data.max_prompt_tokens + recipe.rollout.max_tokens


def _format_gib(count: float) -> str:
    return f"{count / GIB:,.2f} GiB"
