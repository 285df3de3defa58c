"""What a recipe asks of a GPU: its models and sizes, apart from the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rltrain.advantage import ADVANTAGES
from rltrain.config.capacity.adapter import AdapterSize, adapter_size
from rltrain.config.capacity.constants import (
    MOMENT_BYTES,
    MOMENT_BYTES_8BIT,
)
from rltrain.config.capacity.shape import ModelShape
from rltrain.config.rules.offline import all_needs, takes_pairs
from rltrain.config.schema import (
    BUCKET_MIB_GPU,
    Adapter,
    AnyRecipe,
    LearnerCore,
    MethodRef,
    OfflineRecipe,
    OnlinePairsRecipe,
    OnlineRecipe,
    Optimizer,
    SampledRecipe,
    Workers,
)
from rltrain.control import TOKEN_CONTROLS
from rltrain.loss import LOSS_TERMS
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.needs import MISMATCHED, REF_LOGP, SCALAR_HEAD
from rltrain.registry import Registry

# (path or Hub name, revision) -> the model's shape; None where its config cannot be read
ShapeReader = Callable[[str, str | None], ModelShape | None]


@dataclass(frozen=True)
class Engine:
    """What samples: in the learner's process, or vllm_server on GPUs of its own."""

    name: Literal["vllm", "transformers", "vllm_server"]
    ranks: int  # that hold it together, each a shard
    utilization: float | None  # of vLLM: share of the card; None: what the rest of a run leaves of it
    max_rows: int  # sequences that it decodes at once, at most
    rows: int  # completions per step, all ranks
    rounds: int  # rounds of dynamic sampling, at most
    prompt_tokens: int  # at most
    completion_tokens: int  # at most
    server_gpus: int = 0  # of its own
    is_elsewhere: bool = False  # those GPUs are not among the plan's
    bucket_bytes: int = 0  # of one of the two buffers in which weights travel to a server
    gpus_per_worker: int = 0  # of server_gpus
    overlaps: bool = False  # it samples while the policy is updated
    most_learners: int | None = None  # GPUs that the learner may have then; None: any number


@dataclass(frozen=True)
class Frozen:
    """A model that is not trained."""

    role: str
    shape: ModelShape
    is_resident: bool = True  # False: freed before the first update
    is_reward: bool = False  # scores completions during the rollout
    is_start: bool = False  # the trained model as it started: an adapter is switched off in its place


@dataclass(frozen=True)
class Trained:
    """A model with gradients and optimizer states, of all its weights or of an adapter."""

    role: str
    shape: ModelShape
    moment_bytes: float = MOMENT_BYTES  # of the optimizer, per parameter
    adapter: AdapterSize | None = None  # None: all weights are trained
    optimizer: str = "AdamW"  # whose state it is, in reports

    @property
    def trainable(self) -> int:
        """Parameters with a gradient."""
        return self.shape.parameters if self.adapter is None else self.adapter.parameters


@dataclass(frozen=True)
class Workload:
    """Sizes of a step. Tokens and rows are upper bounds."""

    kind: Literal["online", "online_pairs", "offline"]
    trained: tuple[Trained, ...]  # the policy first
    frozen: tuple[Frozen, ...]
    engine: Engine | None
    tokens: int  # of a micro-batch
    longest_example: int  # tokens that stay in one micro-batch
    row_tokens: int  # of the longest row
    rows_per_step: int  # rows that pass through the model in a step, all ranks
    epochs: int
    updates: int  # per step
    recomputed: float | None  # share of the layers, by gradient checkpointing; None: as many as must be
    head_chunk: int  # tokens whose logits exist at once; 0: no logits
    compute_bytes: int  # per number in a matrix product on a GPU
    notes: tuple[str, ...] = ()
    offload: Literal["nothing", "optimizer", "all"] = "nothing"  # to the host
    switched_off: int = 0  # passes over a step's rows with an adapter off, in place of a frozen model
    fuses_layers: bool = False  # whether elementwise kernels of a trained model's layers are fused

    @property
    def policy(self) -> ModelShape:
        return self.trained[0].shape

    def change(self, tokens: int, utilization: float | None, ranks: int | None = None) -> Workload:
        """The same step with other tokens per micro-batch, another share of the card for vLLM, and other
        ranks that hold an engine together; None: as it is.
        """
        engine = self.engine
        if engine is not None:
            share = engine.utilization if utilization is None else utilization
            engine = replace(engine, utilization=share, ranks=ranks or engine.ranks)
        return replace(self, tokens=tokens, engine=engine)


def workload_of(recipe: AnyRecipe, read: ShapeReader) -> Workload:
    """Raises LookupError with the policy's path if its config cannot be read.

    The shape of another model that cannot be read is taken to be the policy's, with a note.
    """
    policy = read(recipe.model.path, recipe.model.revision)
    if policy is None:
        raise LookupError(recipe.model.path)
    models = _Models(policy, read)
    if isinstance(recipe, OfflineRecipe):
        return _offline_workload(recipe, models)
    return _sampled_workload(recipe, models)


class _Models:
    """The shapes of a recipe's models; collects notes on those that could not be read."""

    def __init__(self, policy: ModelShape, read: ShapeReader) -> None:
        self.policy = policy
        self.notes: list[str] = []
        self._read = read

    def shape(self, role: str, path: str | None) -> ModelShape:
        """The shape of the model at ``path``; None means the policy's."""
        if path is None:
            return self.policy
        shape = self._read(path, None)
        if shape is None:
            self.notes.append(f"{role} {path}: config not readable, taken to be of the policy's shape")
            return self.policy
        return shape


def _offline_workload(recipe: OfflineRecipe, models: _Models) -> Workload:
    data = recipe.data
    learner = recipe.learner
    ref = recipe.loss.preference
    spec = PREFERENCE_LOSSES.check(ref.name, ref.hp)
    needs = all_needs(spec, ref.hp)
    sides = (2 if takes_pairs(spec) else 1) + (recipe.loss.degree is not None)
    has_scalar_head = SCALAR_HEAD in spec.traits
    role = "model" if has_scalar_head else "policy"
    # a scalar head replaces an output head of its own
    policy = replace(models.policy, tied=True) if has_scalar_head else models.policy
    row = data.max_prompt_tokens + data.max_completion_tokens
    paths = {"ref_logp": recipe.model.reference, "previous_logp": recipe.model.previous}
    if MISMATCHED in needs:
        needs |= {"ref_logp"}
    # one at a time; the learner stands in for the starting model, unless the run was resumed
    frozen = [
        Frozen(f"frozen {path}", models.shape("frozen model", path), is_resident=False)
        for path in dict.fromkeys(paths[name] for name in paths if name in needs)
        if path is not None
    ]
    return Workload(
        kind="offline",
        trained=(_trained_model(role, policy, learner.optimizer, recipe.model.adapter),),
        offload=learner.offload,
        frozen=tuple(frozen[:1]),
        engine=None,
        tokens=learner.tokens_per_micro_batch,
        longest_example=sides * row,
        row_tokens=row,
        rows_per_step=sides * recipe.train.examples,
        epochs=1,
        updates=1,
        recomputed=_recomputed_share(learner),
        head_chunk=0 if has_scalar_head else learner.head_chunk_on("cuda"),
        compute_bytes=_compute_bytes(learner.precision),
        notes=tuple(models.notes),
        fuses_layers=learner.kernels != "eager",
    )


def _sampled_workload(recipe: OnlineRecipe | OnlinePairsRecipe, models: _Models) -> Workload:
    learner = recipe.learner
    row = recipe.data.max_prompt_tokens + recipe.rollout.max_tokens
    adapter = recipe.model.adapter
    trained = [_trained_model("policy", models.policy, learner.optimizer, adapter)]
    switched_off = 0
    if recipe.kind == "online":
        frozen = [*_frozen_online(recipe, models)]
        if adapter is not None:
            switched_off += sum(model.is_start for model in frozen)
            frozen = [model for model in frozen if not model.is_start]
        settings = recipe.process_reward
        sides = 1
        rows = recipe.rollout.prompts * recipe.rollout.n
        if settings is not None:
            shape = models.shape("process reward model", settings.path)
            trained.append(_trained_model("process reward model", shape, settings.optimizer, adapter))
            if settings.reference is None and adapter is not None:
                switched_off += 1
            elif settings.reference != "policy":
                reference = models.shape("its reference", settings.reference or settings.path)
                frozen.append(Frozen("its reference", reference))
    else:
        frozen = [*_frozen_of_pairs(recipe, models)]
        if adapter is not None:
            switched_off += sum(model.is_start for model in frozen)
            frozen = [model for model in frozen if not model.is_start]
        sides = 2
        rows = 2 * recipe.rollout.prompts * _pairs_per_prompt(recipe)
    frozen += _reward_models(recipe, models)
    return Workload(
        kind=recipe.kind,
        trained=tuple(trained),
        frozen=tuple(frozen),
        engine=engine_of(recipe),
        tokens=learner.tokens_per_micro_batch,
        longest_example=sides * row,
        row_tokens=row,
        rows_per_step=rows,
        epochs=learner.epochs,
        updates=learner.updates_per_step,
        recomputed=_recomputed_share(learner),
        head_chunk=learner.head_chunk_on("cuda"),
        compute_bytes=_compute_bytes(learner.precision),
        notes=tuple(models.notes),
        offload=learner.offload,
        switched_off=switched_off,
        fuses_layers=learner.kernels != "eager",
    )


def _trained_model(role: str, shape: ModelShape, optimizer: Optimizer, adapter: Adapter | None) -> Trained:
    size = None if adapter is None else adapter_size(adapter, shape)
    hidden = 1.0 if adapter is not None else shape.layers * shape.layer / shape.parameters
    label = {"rmsprop": "RMSprop", "muon": "Muon and AdamW"}.get(optimizer.name, "AdamW")
    return Trained(role, shape, moment_bytes(optimizer, hidden), size, label)


def _recomputed_share(learner: LearnerCore) -> float | None:
    return None if learner.gradient_checkpointing == "auto" else float(learner.gradient_checkpointing)


def moment_bytes(optimizer: Optimizer, hidden: float) -> float:
    """Bytes of the optimizer's state per trained parameter, on average.

    AdamW keeps two float32 numbers, RMSprop one, and Muon one for each of its own. hidden: share of the
    parameters that stand in layers or adapters, which all count as Muon's, norms and biases too.
    """
    match optimizer.name:
        case "adamw_8bit":
            return MOMENT_BYTES_8BIT
        case "rmsprop":
            return MOMENT_BYTES / 2
        case "muon":
            return MOMENT_BYTES * (1 - hidden / 2)
        case "adamw":
            return MOMENT_BYTES


def _has_controller(recipe: SampledRecipe) -> bool:
    """Whether a process of its own samples, so that any number of ranks may learn meanwhile."""
    rollout = recipe.rollout
    return rollout.bound is None and rollout.workers is not None and recipe.model.adapter is None


def engine_of(recipe: SampledRecipe) -> Engine:
    """What samples for this recipe."""
    rollout = recipe.rollout
    server = rollout.server
    share = rollout.vllm.gpu_memory_utilization
    is_vllm = rollout.engine != "transformers"
    is_server = rollout.engine == "vllm_server"
    ranks = server.tensor_parallel if is_server else rollout.vllm.tensor_parallel
    gpus_per_worker = server.tensor_parallel * server.data_parallel if is_server else 0
    return Engine(
        name=rollout.engine,
        ranks=ranks if is_vllm else 1,
        server_gpus=gpus_per_worker * _count_workers(rollout.workers),
        is_elsewhere=server.url is not None or _are_elsewhere(rollout.workers),
        gpus_per_worker=gpus_per_worker,
        overlaps=is_server and rollout.oldest > 0,
        most_learners=None if _has_controller(recipe) else 1,
        bucket_bytes=2**20 * (server.bucket_mib or BUCKET_MIB_GPU) if is_server else 0,
        utilization=None if share == "auto" else share,
        max_rows=rollout.vllm.max_num_seqs if is_vllm else rollout.max_rows,
        rows=rollout.prompts * rollout.n,
        rounds=rollout.dynamic_sampling.max_rounds if rollout.dynamic_sampling else 1,
        prompt_tokens=recipe.data.max_prompt_tokens,
        completion_tokens=rollout.max_tokens,
    )


def _are_elsewhere(workers: Workers | None) -> bool:
    return workers is not None and workers.count is None


def _count_workers(workers: Workers | None) -> int:
    """One where they are not known before the run."""
    if workers is None:
        return 1
    return workers.count or len(workers.urls) or len(workers.admin) or 1


def online_needs(recipe: OnlineRecipe) -> frozenset[str]:
    """Every statistic that advantage, controls, policy loss and terms need."""
    uses: list[tuple[Registry, MethodRef]] = [
        (ADVANTAGES, recipe.advantage),
        *((TOKEN_CONTROLS, ref) for ref in recipe.control),
        (POLICY_LOSSES, recipe.loss.policy),
        *((LOSS_TERMS, ref) for ref in recipe.loss.terms),
    ]
    needs = [registry.check(ref.name, ref.hp).needs_with(ref.hp) for registry, ref in uses]
    return frozenset().union(*needs)


def _frozen_online(recipe: OnlineRecipe, models: _Models) -> Iterator[Frozen]:
    needs = online_needs(recipe)
    for name, role, path in (
        ("ref_logp", "reference", recipe.model.reference),
        ("teacher_logp", "teacher", recipe.model.teacher),
    ):
        if name in needs:
            yield Frozen(role, models.shape(role, path), is_start=path is None)


def _frozen_of_pairs(recipe: OnlinePairsRecipe, models: _Models) -> Iterator[Frozen]:
    ref = recipe.loss.preference
    needs = all_needs(PREFERENCE_LOSSES.check(ref.name, ref.hp), ref.hp)
    judge = recipe.pairs.judge
    if REF_LOGP in needs or (judge.name == "self" and judge.hp.get("by") == "reference"):
        reference = recipe.model.reference
        yield Frozen("reference", models.shape("reference", reference), is_start=reference is None)
    if recipe.train.previous_every > 1:
        yield Frozen("previous iterate", models.policy)


def _reward_models(recipe: OnlineRecipe | OnlinePairsRecipe, models: _Models) -> list[Frozen]:
    judges = [recipe.pairs.judge] if recipe.kind == "online_pairs" else []
    refs = [ref for ref in (*recipe.reward.functions, *judges) if ref.name == "reward_model"]
    shapes = [models.shape("reward model", str(ref.hp.get("path"))) for ref in refs]
    return [Frozen("reward model", shape, is_reward=True) for shape in shapes]


def _pairs_per_prompt(recipe: OnlinePairsRecipe) -> int:
    n = recipe.rollout.n
    return {"disjoint": n // 2, "best_worst": 1, "ranked": n * (n - 1) // 2}[recipe.pairs.choose]


def _compute_bytes(precision: str) -> int:
    return 4 if precision == "float32" else 2
