"""Bytes per GPU in every phase of a run, term by term.

Sharded backends divide by the number of GPUs, also frozen models, which are kept in the learner's precision.
Models that score completions are whole on every GPU. A push holds the shards and two tensors in the engine's
dtype, a save two tensors in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from rltrain.config.capacity.cluster import Cluster
from rltrain.config.capacity.constants import (
    CUDA_CONTEXT,
    ENGINE_BATCH_TOKENS,
    FRAGMENTATION,
    GRADIENT_BYTES,
    MARGIN,
    MASTER_BYTES,
    NCCL,
    REWARD_MODEL_BYTES,
    SLEEPING_VLLM,
    STEP_NUMBERS,
    TENSORS_IN_FLIGHT,
    TILE_ELEMENTS,
    ZERO_BUCKET,
    ZERO_LIVE,
    ZERO_PREFETCH,
)
from rltrain.config.capacity.recomputation import recomputed_layers
from rltrain.config.capacity.shape import ModelShape
from rltrain.config.capacity.workload import Engine, Frozen, Trained, Workload
from rltrain.config.schema import MOST_UTILIZATION
from rltrain.model_files import ADAPTER_SLOTS


@dataclass(frozen=True)
class Term:
    name: str
    bytes: int


@dataclass(frozen=True)
class Phase:
    """limit: bytes that the phase may take; None: it is on the host, whose memory the plan does not know."""

    name: str
    terms: tuple[Term, ...]
    limit: int | None

    @property
    def total(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit


def phases_of(load: Workload, cluster: Cluster) -> tuple[Phase, ...]:
    """Every phase in the order of a run."""
    load = with_recomputation(with_utilization(load, cluster), cluster)
    common = (*_resident(load, cluster), *_frozen(load, cluster))
    phases = [
        _host(load, cluster),
        *_host_phases(load, cluster),
        _gpu_phase("learner at rest", common, load, cluster),
    ]
    if load.engine is not None:
        phases += _engine_phases(load, load.engine, cluster)
    else:
        phases += _reference_phase(load, cluster)
    if load.engine is not None:
        phases.append(_annotate(load, cluster))
    phases.append(_update(load, cluster))
    size = TENSORS_IN_FLIGHT * MASTER_BYTES * max(model.shape.largest_tensor for model in load.trained)
    saving = Term("two tensors in float32", size)
    awake = () if load.engine is None else (_engine_awake(load, load.engine, cluster),)
    phases.append(_gpu_phase("save", (*common, *awake, saving), load, cluster))
    return tuple(phases)


# learner ----------------------------------------------------------------------------------------------------


def weight_terms(model: Trained, cluster: Cluster, compute_bytes: int) -> list[Term]:
    """What a backend holds of a model's weights from its construction on."""
    count = model.trainable
    shards = cluster.shards
    role = model.role
    base = {} if model.adapter is None else {"base": _base_bytes(model, cluster, compute_bytes)}
    match cluster.form:
        case "one":
            sizes = {"weights": MASTER_BYTES * count}
        case "ddp":
            sizes = {"weights": MASTER_BYTES * count, "DDP's buckets": GRADIENT_BYTES * count}
        case "fsdp2":
            sizes = {"weights": MASTER_BYTES * count // shards}
        case "zero2":
            sizes = {"whole weights": compute_bytes * count, "masters": MASTER_BYTES * count // shards}
        case _:
            sizes = {
                "weights": compute_bytes * count // shards,
                "masters": MASTER_BYTES * count // shards,
            }
    return [Term(f"{role}: {name}", size) for name, size in {**base, **sizes}.items()]


def _base_bytes(model: Trained, cluster: Cluster, compute_bytes: int) -> int:
    """Of the weights under an adapter, on one GPU. FSDP2 and ZeRO-3 divide them."""
    assert model.adapter is not None
    throughout = cluster.form not in ("one", "ddp")
    size = model.adapter.base_bytes(model.shape, compute_bytes, throughout=throughout)
    return size // cluster.shards if cluster.form in ("fsdp2", "zero3") else size


def moment_term(model: Trained, cluster: Cluster) -> Term:
    """The optimizer's state, from the first update on."""
    size = int(model.moment_bytes * model.trainable) // _state_shards(cluster)
    return Term(f"{model.role}: {model.optimizer}", size)


def gradient_term(model: Trained, cluster: Cluster) -> Term:
    """The gradient that is left when the backward pass is over; DDP's is in its buckets."""
    if cluster.form == "ddp":
        return Term(f"{model.role}: gradient", 0)
    return Term(f"{model.role}: gradient", GRADIENT_BYTES * model.trainable // _state_shards(cluster))


def _state_shards(cluster: Cluster) -> int:
    return cluster.shards if _divides(cluster) else 1


def _resident(load: Workload, cluster: Cluster) -> list[Term]:
    """Trained models between two updates."""
    moments = [moment_term(model, cluster) for model in load.trained]
    return [*_weights(load, cluster), *_kept_terms(moments, load, cluster)]


def _weights(load: Workload, cluster: Cluster) -> list[Term]:
    """Trained models before the first update."""
    terms = [term for model in load.trained for term in weight_terms(model, cluster, load.compute_bytes)]
    return _kept_terms(terms, load, cluster)


def _moved_terms(load: Workload, cluster: Cluster) -> tuple[str, ...]:
    """Ends of the names of terms that are in the host's memory; none where the backend cannot."""
    match cluster.form, load.offload:
        case ("zero2" | "zero3", "optimizer"):
            return ("masters", "AdamW", "RMSprop", "gradient")
        case ("fsdp2" | "zero3", "all"):
            return ("weights", "masters", "AdamW", "RMSprop", "gradient")
        case _:
            return ()


def _kept_terms(terms: Iterable[Term], load: Workload, cluster: Cluster) -> list[Term]:
    ends = tuple(f": {end}" for end in _moved_terms(load, cluster))
    return [term for term in terms if not (ends and term.name.endswith(ends))]


def _host_phases(load: Workload, cluster: Cluster) -> list[Phase]:
    """What is offloaded, of all ranks of a node."""
    terms = [
        term
        for model in load.trained
        for term in (
            *weight_terms(model, cluster, load.compute_bytes),
            moment_term(model, cluster),
            gradient_term(model, cluster),
        )
    ]
    kept = _kept_terms(terms, load, cluster)
    ranks = cluster.ranks_per_node
    moved = tuple(Term(term.name, ranks * term.bytes) for term in terms if term not in kept)
    return [Phase("offloaded, on the host", moved, None)] if moved else []


def frozen_term(model: Frozen, cluster: Cluster, compute_bytes: int) -> Term:
    """A frozen model between two passes: FSDP2 and ZeRO divide it; elsewhere embedding and norms stay
    float32, as autocast leaves them.
    """
    shape = model.shape
    if model.is_reward:
        return Term(f"{model.role}: whole", REWARD_MODEL_BYTES * shape.parameters)
    if _divides(cluster):
        return Term(f"{model.role}: weights", compute_bytes * shape.parameters // cluster.shards)
    float32 = shape.embedding + shape.norms
    size = compute_bytes * (shape.parameters - float32) + MASTER_BYTES * float32
    return Term(f"{model.role}: weights", size)


def _frozen(load: Workload, cluster: Cluster) -> list[Term]:
    return [frozen_term(model, cluster, load.compute_bytes) for model in load.frozen if model.is_resident]


def _divides(cluster: Cluster) -> bool:
    """Whether the backend divides weights, or states, among the GPUs."""
    return cluster.form not in ("one", "ddp")


def _gathered_terms(model: Trained, cluster: Cluster, compute_bytes: int, *, update: bool) -> list[Term]:
    """Weights and gradients of layers that a sharded backend holds whole for a moment."""
    shape = model.shape
    is_full = model.adapter is None
    layer = shape.layer if is_full else model.trainable // shape.layers
    bucket = min(ZERO_BUCKET, ZERO_BUCKET if is_full else model.trainable)
    match cluster.form:
        case "fsdp2":
            weights = _gathered_by_fsdp2(shape, compute_bytes)
            # of the head in float32; of a layer as computed, and twice in float32 while it is reduced
            head = shape.embedding + shape.last_norm if is_full else 0
            reduced = GRADIENT_BYTES * (head + 2 * layer) + compute_bytes * layer
        case "zero2":
            weights = 0
            reduced = bucket * (compute_bytes + GRADIENT_BYTES)
        case "zero3":
            live = min(ZERO_LIVE, shape.parameters) + ZERO_PREFETCH
            weights = compute_bytes * live
            reduced = bucket * (compute_bytes + GRADIENT_BYTES)
        case _:
            return []
    terms = [Term("gathered weights", weights)]
    return [*terms, Term("gradients being reduced", reduced)] if update else terms


def _gathered_by_fsdp2(shape: ModelShape, compute_bytes: int) -> int:
    """The embedding, or the head with the last norm, each a group of its own; a layer and the next one."""
    return compute_bytes * (shape.embedding + shape.last_norm + 2 * shape.layer)


# activations ------------------------------------------------------------------------------------------------


def kept_activations(shape: ModelShape, tokens: int, compute_bytes: int, *, float32_sum: bool) -> int:
    """Inputs of the layers, which gradient checkpointing keeps.

    float32_sum: the residual stream is float32.
    """
    return tokens * shape.hidden * (4 if float32_sum else compute_bytes) * shape.layers


def layer_activations(shape: ModelShape, tokens: int, compute_bytes: int, *, update: bool) -> int:
    """One layer's forward pass, or its recomputation and backward pass."""
    attention = 2 * compute_bytes * (2 * shape.query_width + 2 * shape.kv_width)
    if not update:
        return tokens * (3 * compute_bytes * shape.inner + attention + (8 + 2 * compute_bytes) * shape.hidden)
    # gate, up, activation, product and three gradients; norms work in float32
    return tokens * (7 * compute_bytes * shape.inner + attention + (16 + 6 * compute_bytes) * shape.hidden)


def saved_layer(shape: ModelShape, tokens: int, compute_bytes: int) -> int:
    """What a layer without checkpointing keeps until its backward pass."""
    attention = compute_bytes * (2 * shape.query_width + 2 * shape.kv_width)
    return tokens * (4 * compute_bytes * shape.inner + attention + (8 + 6 * compute_bytes) * shape.hidden)


def head_bytes(shape: ModelShape, chunk: int, compute_bytes: int, *, update: bool) -> int:
    """The output head: a chunk's logits, two float32 tiles, the weight's float32 gradient."""
    if chunk == 0:
        return 0
    logits = chunk * shape.vocabulary
    tiles = 2 * 4 * min(logits, TILE_ELEMENTS)
    return compute_bytes * logits + tiles + (4 * shape.embedding if update else 0)


def _update_terms(load: Workload, model: Trained, cluster: Cluster) -> list[Term]:
    shape = model.shape
    size = load.compute_bytes
    tokens = max(load.tokens, load.longest_example)
    casts = cluster.form in ("one", "ddp") and size < MASTER_BYTES
    assert load.recomputed is not None, "with_recomputation decides it"
    recomputed = recomputed_layers(shape.layers, load.recomputed)
    kept = kept_activations(shape, tokens, size, float32_sum=casts) * recomputed // shape.layers
    kept += (shape.layers - recomputed) * saved_layer(shape, tokens, size)
    layer = layer_activations(shape, tokens, size, update=True)
    if model.adapter is not None:
        alive = shape.layers - recomputed + min(1, recomputed)  # of the recomputed layers one at a time
        kept += size * tokens * model.adapter.inputs * alive
        layer += model.adapter.dequantized_bytes(size)
    # either a layer's backward pass, or the forward pass's end, where autocast has copied every weight
    copies = _cast_bytes(model, size) if casts else 0
    peak = Term("one layer's backward pass", layer)
    if copies > layer:
        peak = Term("autocast's copies of the weights", copies)
    return [
        *_gathered_terms(model, cluster, size, update=True),
        *_kept_terms([gradient_term(model, cluster)], load, cluster),
        Term("kept activations", kept),
        peak,
        Term("output head", head_bytes(shape, load.head_chunk, size, update=model.adapter is None)),
    ]


def _cast_bytes(model: Trained, compute_bytes: int) -> int:
    """Autocast's copies of float32 weights: of all that are trained, and of a tied head."""
    if model.adapter is None:
        return compute_bytes * model.shape.parameters
    head = model.shape.embedding if model.shape.tied else 0
    return compute_bytes * (model.trainable + head)


def _update(load: Workload, cluster: Cluster) -> Phase:
    """The model whose update takes most; one is updated after the other."""
    common = (*_resident(load, cluster), *_frozen(load, cluster))
    candidates = [
        _gpu_phase("update", (*common, *_update_terms(load, model, cluster)), load, cluster)
        for model in load.trained
    ]
    return max(candidates, key=lambda phase: phase.total)


def with_recomputation(load: Workload, cluster: Cluster) -> Workload:
    """``load`` with the least share of recomputed layers, in tenths, whose update fits without ``MARGIN``,
    where the recipe leaves it open; all of them where none does.
    """
    if load.recomputed is not None:
        return load
    candidates = [replace(load, recomputed=tenths / 10) for tenths in range(11)]
    limit = (1 - MARGIN) * cluster.gpu_bytes
    fitting = (candidate for candidate in candidates if _update(candidate, cluster).total <= limit)
    return next(fitting, candidates[-1])


def _forward_terms(shape: ModelShape, load: Workload, compute_bytes: int) -> list[Term]:
    """A pass without gradients."""
    tokens = max(load.tokens, load.longest_example)
    return [
        Term("one layer's forward pass", layer_activations(shape, tokens, compute_bytes, update=False)),
        Term("output head", head_bytes(shape, load.head_chunk, compute_bytes, update=False)),
    ]


def _trained_pass(model: Trained, load: Workload, cluster: Cluster) -> list[Term]:
    size = load.compute_bytes
    gathered = _gathered_terms(model, cluster, size, update=False)
    if cluster.form in ("one", "ddp") and size < MASTER_BYTES:
        gathered = [Term("autocast's copies of the weights", _cast_bytes(model, size))]
    if model.adapter is not None:
        gathered.append(Term("a dequantised matrix", model.adapter.dequantized_bytes(size)))
    return [*gathered, *_forward_terms(model.shape, load, size)]


def _frozen_pass(model: Frozen, load: Workload, cluster: Cluster) -> list[Term]:
    """A frozen model is divided as FSDP2 divides, under ZeRO too; its weights need no copies to compute."""
    if model.is_reward:
        return _forward_terms(model.shape, load, REWARD_MODEL_BYTES)
    terms = _forward_terms(model.shape, load, load.compute_bytes)
    if not _divides(cluster):
        return terms
    return [Term("gathered weights", _gathered_by_fsdp2(model.shape, load.compute_bytes)), *terms]


def _annotate(load: Workload, cluster: Cluster) -> Phase:
    common = (*_resident(load, cluster), *_frozen(load, cluster))
    passes = [_trained_pass(model, load, cluster) for model in load.trained]
    passes += [_frozen_pass(model, load, cluster) for model in load.frozen if not model.is_reward]
    if load.engine is not None:  # after the passes: controls over the whole step
        size = STEP_NUMBERS * 4 * load.rows_per_step * load.engine.completion_tokens
        passes.append([Term("tensors of a step", size)])
    candidates = [_gpu_phase("annotate", (*common, *terms), load, cluster) for terms in passes]
    return max(candidates, key=lambda phase: phase.total)


def _reference_phase(load: Workload, cluster: Cluster) -> list[Phase]:
    """Log-probs of frozen models before the first update, when there are no optimizer states yet."""
    weights = _weights(load, cluster)
    if not load.frozen:
        terms = _trained_pass(load.trained[0], load, cluster)
        return [_gpu_phase("annotate", (*weights, *terms), load, cluster)]
    candidates = []
    for model in load.frozen:
        frozen_weights = frozen_term(model, cluster, load.compute_bytes)
        terms = (*weights, frozen_weights, *_frozen_pass(model, load, cluster))
        candidates.append(_gpu_phase("annotate", terms, load, cluster))
    return [max(candidates, key=lambda phase: phase.total)]


# engine -----------------------------------------------------------------------------------------------------


def engine_work(shape: ModelShape, max_rows: int, number_bytes: int) -> int:
    """What vLLM's profiling run adds to its weights: gate, up, product and hidden states of a full batch, and
    float32 logits of every sequence.
    """
    per_token = number_bytes * (3 * shape.inner + 4 * shape.hidden)
    return ENGINE_BATCH_TOKENS * per_token + 8 * max_rows * shape.vocabulary


def kv_bytes(shape: ModelShape, tokens: int, number_bytes: int) -> int:
    """Keys and values of ``tokens`` tokens in the engine's cache."""
    return number_bytes * shape.kv_numbers_per_token * tokens


def engine_weights(load: Workload, engine: Engine) -> int:
    """One rank's shard of the engine's weights, and vLLM's places for adapters."""
    adapter = load.trained[0].adapter
    slots = 0
    if adapter is not None and engine.name != "transformers":
        slots = ADAPTER_SLOTS * adapter.parameters
    return load.compute_bytes * (load.policy.parameters + slots) // engine.ranks


def engine_cache(load: Workload, engine: Engine, tokens: int) -> int:
    """One rank's keys and values of ``tokens`` tokens: it has at least one head."""
    return kv_bytes(load.policy, tokens, load.compute_bytes) // min(engine.ranks, load.policy.kv_heads)


def with_utilization(load: Workload, cluster: Cluster) -> Workload:
    """``load`` with vLLM's share of the card where the recipe leaves it open: in hundredths what the phases
    in which the engine is awake beside everything else leave of it, without ``MARGIN``.
    """
    engine = load.engine
    if engine is None or engine.name == "transformers" or engine.utilization is not None:
        return load
    if engine.name == "vllm_server":  # nothing else is on its GPUs
        return replace(load, engine=replace(engine, utilization=MOST_UTILIZATION))
    without = phases_of(replace(load, engine=replace(engine, utilization=0.0)), cluster)
    taken = max(phase.total for phase in without if phase.name in ("rollout", "save"))
    share = math.floor(100 * (1 - MARGIN - taken / cluster.gpu_bytes)) / 100
    share = min(max(share, 0.01), MOST_UTILIZATION)
    return replace(load, engine=replace(engine, utilization=share))


def engine_bytes(engine: Engine, cluster: Cluster) -> int:
    """vLLM's share of a GPU."""
    assert engine.utilization is not None, "with_utilization decides it"
    return int(engine.utilization * cluster.gpu_bytes)


def cache_tokens(load: Workload, cluster: Cluster) -> int:
    """Tokens whose keys and values vLLM's cache holds; 0 where the weights leave no room."""
    assert load.engine is not None
    shape = load.policy
    size = load.compute_bytes
    room = engine_bytes(load.engine, cluster)
    room -= engine_weights(load, load.engine) + engine_work(shape, load.engine.max_rows, size)
    return max(0, room // engine_cache(load, load.engine, 1))


def rows_at_once(load: Workload, cluster: Cluster) -> int:
    """Longest rows that one engine decodes at the same time, at most."""
    engine = load.engine
    assert engine is not None
    rows = min(engine.max_rows, -(-engine.rows * engine.ranks // cluster.sampling_gpus))
    if engine.name == "transformers":
        return rows
    return min(rows, cache_tokens(load, cluster) // load.row_tokens)


def _engine_awake(load: Workload, engine: Engine, cluster: Cluster) -> Term:
    shape = load.policy
    if engine.name == "vllm":
        return Term(f"vLLM, {engine.utilization:g} of the GPU", engine_bytes(engine, cluster))
    if engine.name == "vllm_server":
        return Term("nothing: the server has GPUs of its own", 0)
    size = load.compute_bytes
    cache = kv_bytes(shape, rows_at_once(load, cluster) * load.row_tokens, size)
    return Term("engine: weights and cache", size * shape.parameters + cache)


def _engine_phases(load: Workload, engine: Engine, cluster: Cluster) -> list[Phase]:
    shape = load.policy
    size = load.compute_bytes
    learner = _kept_terms(weight_terms(load.trained[0], cluster, load.compute_bytes), load, cluster)
    awake = _engine_awake(load, engine, cluster)
    flight = Term("two tensors in the engine's dtype", TENSORS_IN_FLIGHT * size * shape.largest_tensor)
    if (adapter := load.trained[0].adapter) is not None:  # merged, or compared, in float32
        largest = TENSORS_IN_FLIGHT * MASTER_BYTES * shape.largest_tensor
        flight = Term("two tensors and the adapter in float32", largest + MASTER_BYTES * adapter.parameters)
    elif engine.name == "vllm_server":
        number = size * shape.largest_tensor
        flight = Term("two buckets and the largest tensor", 2 * engine.bucket_bytes + number)
    phases = [_gpu_phase("engine start", (*learner, awake), load, cluster)]
    if engine.name != "transformers":
        row = (
            Term("engine: weights", engine_weights(load, engine)),
            Term("engine: largest batch", engine_work(shape, engine.max_rows, size)),
            Term("cache of one longest row", engine_cache(load, engine, load.row_tokens)),
        )
        phases.append(Phase("one row in the engine", row, engine_bytes(engine, cluster)))
    # the first push finds the engine mapped, cache included, but no optimizer states; later ones the reverse
    weights = _weights(load, cluster)
    first = (*weights, *_frozen(load, cluster), awake, flight)
    common = (*_resident(load, cluster), *_frozen(load, cluster))
    held = 0 if engine.name == "vllm_server" else engine_weights(load, engine)
    later = (*common, Term("engine: weights", held), flight)
    pushes = [_gpu_phase("push", terms, load, cluster) for terms in (first, later)]
    phases.append(max(pushes, key=lambda phase: phase.total))
    # reward models score beside the engine
    scoring = [_frozen_pass(model, load, cluster) for model in load.frozen if model.is_reward]
    largest = max(scoring, key=lambda terms: sum(term.bytes for term in terms), default=[])
    phases.append(_gpu_phase("rollout", (*common, awake, *largest), load, cluster))
    return phases


# the rest ---------------------------------------------------------------------------------------------------


OVERHEADS = frozenset({"CUDA context", "fragmentation", "NCCL", "vLLM outside its share"})


def overhead_terms(load: Workload, cluster: Cluster) -> tuple[Term, ...]:
    """Memory of a GPU that belongs to no tensor of the plan."""
    terms = [Term("CUDA context", CUDA_CONTEXT), Term("fragmentation", FRAGMENTATION)]
    if cluster.gpus > 1:
        terms.append(Term("NCCL", NCCL))
    if load.engine is not None and load.engine.name == "vllm":
        terms.append(Term("vLLM outside its share", SLEEPING_VLLM))
    return tuple(terms)


def _gpu_phase(name: str, terms: Iterable[Term], load: Workload, cluster: Cluster) -> Phase:
    everything = (*terms, *overhead_terms(load, cluster))
    return Phase(name, tuple(term for term in everything if term.bytes), cluster.gpu_bytes)


def _host(load: Workload, cluster: Cluster) -> Phase:
    """Host memory of a node while models load, one after the other: rank 0 reads each and sends it to the
    others, but every rank reads a model that scores.
    """
    sizes = {model.role: MASTER_BYTES * model.shape.parameters for model in (*load.trained, *load.frozen)}
    for model in load.trained:
        if _is_quantized(model):  # every rank reads and quantises it
            sizes[model.role] *= cluster.ranks_per_node
    for model in load.frozen:
        if model.is_reward:
            sizes[model.role] *= cluster.ranks_per_node
    role, size = max(sizes.items(), key=lambda item: item[1])
    return Phase("load, on the host", (Term(f"{role} in float32", size),), None)


def _is_quantized(model: Trained) -> bool:
    return model.adapter is not None and model.adapter.quantize != "none"
