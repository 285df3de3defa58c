"""Seconds of a step in closed form, if every row reaches its limit. Rewards and evaluation are not included.

Every number is arithmetic on the rates of ``constants.py``: an order of magnitude and a bottleneck, no
measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rltrain.config.capacity.cluster import Cluster
from rltrain.config.capacity.constants import (
    COMPILED_ELEMENTWISE,
    DECODE_OVERHEAD,
    EXPOSED_COMMUNICATION,
    HEAD_FORWARD_PASSES,
    HEAD_GRADIENT_PASSES,
    HEAD_UPDATE_PASSES,
    MASTER_BYTES,
    SLEEP_AND_WAKE,
    Rates,
)
from rltrain.config.capacity.memory import (
    engine_cache,
    engine_weights,
    rows_at_once,
    with_recomputation,
    with_utilization,
)
from rltrain.config.capacity.shape import ModelShape
from rltrain.config.capacity.workload import Engine, Workload


@dataclass(frozen=True)
class Duration:
    phase: str
    seconds: float
    limit: str  # what bounds it


@dataclass(frozen=True)
class LayerSeconds:
    """One layer's forward pass over a micro-batch."""

    products: float
    elementwise: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.elementwise + self.attention

    @property
    def backward(self) -> float:
        """Twice the products, 2.2 times the elementwise kernels, 2.5 times the attention."""
        return 2 * self.products + 2.2 * self.elementwise + 2.5 * self.attention


def step_durations(load: Workload, cluster: Cluster, rates: Rates) -> tuple[Duration, ...]:
    """The phases of a step, in order."""
    load = with_recomputation(with_utilization(load, cluster), cluster)
    durations: list[Duration] = []
    if load.engine is not None:
        durations.append(_rollout(load, load.engine, cluster, rates))
        durations.append(_annotate(load, cluster, rates))
    durations.append(_update(load, cluster, rates))
    if load.engine is not None:
        shape = load.policy
        gathered = MASTER_BYTES * load.trained[0].trainable / rates.link
        if load.engine.name == "vllm_server":
            sent = load.compute_bytes * shape.parameters / rates.link
            durations.append(Duration("push", max(gathered, sent), "gather, while a bucket travels"))
        else:
            durations.append(Duration("push", gathered + SLEEP_AND_WAKE, "sleep and wake of the engine"))
    return tuple(durations)


def bottleneck(durations: tuple[Duration, ...]) -> Duration:
    return max(durations, key=lambda duration: duration.seconds)


def layer_seconds(
    shape: ModelShape, tokens: int, row: int, rates: Rates, *, compute_bytes: int, residual_bytes: int
) -> LayerSeconds:
    """row: tokens of a row, each of which sees half of it on average."""
    is_float32 = compute_bytes == MASTER_BYTES
    rate = rates.float32 if is_float32 else rates.products
    attention_rate = rates.float32 if is_float32 else rates.attention
    hidden = shape.hidden
    matrices = shape.layer
    # two norms in float32; gate, up, activation and product; three residual sums; rotary embedding
    norms = 2 * tokens * hidden * (5 * residual_bytes + 28)
    mlp = 5 * compute_bytes * tokens * shape.inner
    sums = 3 * tokens * hidden * residual_bytes
    rotary = 9 * compute_bytes * tokens * (shape.query_width + shape.kv_width)
    casts = 6 * matrices if residual_bytes > compute_bytes else 0
    return LayerSeconds(
        products=2 * matrices * tokens / rate,
        elementwise=(norms + mlp + sums + rotary + casts) / rates.memory,
        attention=2 * tokens * row * shape.query_width / attention_rate,
    )


def head_seconds(shape: ModelShape, tokens: int, chunk: int, rates: Rates, *, update: bool) -> float:
    """The output head over ``tokens`` completion tokens; forward only, or with its backward pass."""
    if chunk == 0:
        return 0.0
    product = 2 * tokens * shape.embedding / rates.head_products
    passes = (
        (HEAD_UPDATE_PASSES if update else HEAD_FORWARD_PASSES) * tokens * shape.vocabulary / rates.memory
    )
    if not update:
        return product + passes
    # the product that adds to the weight's gradient is bound by its FLOP or by the gradient's bytes
    gradient = HEAD_GRADIENT_PASSES * 4 * shape.embedding * tokens / chunk / rates.memory
    return 3 * product + max(product, gradient) + passes


def update_seconds(load: Workload, shape: ModelShape, cluster: Cluster, rates: Rates, tokens: int) -> float:
    """Forward and backward pass of ``tokens`` tokens on one GPU."""
    layer = _policy_layer(load, shape, cluster, rates, tokens)
    assert load.recomputed is not None, "with_recomputation decides it"
    # under an adapter no weight of a linear layer has a gradient
    saved = 0.0 if load.trained[0].adapter is None else layer.products
    passes = layer.total * (1 + load.recomputed) + layer.backward - saved
    head = head_seconds(shape, _completion_tokens(load, tokens), load.head_chunk, rates, update=True)
    micro_batches = -(-tokens // load.tokens)
    communication = EXPOSED_COMMUNICATION * micro_batches if cluster.gpus > 1 else 0.0
    return shape.layers * passes + head + communication


def forward_seconds(load: Workload, shape: ModelShape, cluster: Cluster, rates: Rates, tokens: int) -> float:
    """A pass without gradients over ``tokens`` tokens on one GPU."""
    layer = _policy_layer(load, shape, cluster, rates, tokens)
    head = head_seconds(shape, _completion_tokens(load, tokens), load.head_chunk, rates, update=False)
    return shape.layers * layer.total + head


def model_flop(load: Workload, tokens: int) -> float:
    """FLOP of an update that a model needs, recomputation not counted."""
    shape = load.policy
    products = 6 * (shape.layers * shape.layer + shape.embedding) * tokens
    return products + 6 * shape.layers * tokens * load.row_tokens * shape.query_width


def tokens_per_gpu(load: Workload, cluster: Cluster) -> int:
    """Tokens of a step that pass through a model on one GPU, at most."""
    return -(-load.rows_per_step // cluster.gpus) * load.row_tokens


def _policy_layer(
    load: Workload, shape: ModelShape, cluster: Cluster, rates: Rates, tokens: int
) -> LayerSeconds:
    casts = cluster.form in ("one", "ddp")
    residual = MASTER_BYTES if casts else load.compute_bytes
    layer = layer_seconds(
        shape,
        tokens,
        load.row_tokens,
        rates,
        compute_bytes=load.compute_bytes,
        residual_bytes=residual,
    )
    fused = replace(layer, elementwise=COMPILED_ELEMENTWISE * layer.elementwise)
    return fused if load.fuses_layers else layer


def _completion_tokens(load: Workload, tokens: int) -> int:
    """Tokens of completions among ``tokens``: only they reach the output head."""
    if load.engine is None:
        return tokens
    return tokens * load.engine.completion_tokens // load.row_tokens


def _rollout(load: Workload, engine: Engine, cluster: Cluster, rates: Rates) -> Duration:
    """One round. Every decoding step reads the weights and, on average, half-grown caches."""
    rows = -(-engine.rows * engine.ranks // cluster.sampling_gpus)
    at_once = max(1, rows_at_once(load, cluster))
    steps = rows * engine.completion_tokens / at_once
    tokens = at_once * (engine.prompt_tokens + engine.completion_tokens // 2)
    cache = engine_cache(load, engine, tokens)
    weights = engine_weights(load, engine)
    step = (weights + cache) / rates.memory + DECODE_OVERHEAD
    limit = "all rows at once" if at_once == rows else f"{at_once} of {rows} rows at once"
    if at_once == engine.max_rows < rows:
        limit += ", the engine's own limit"
    elif at_once < rows:
        limit += ", the cache is full"
    if engine.rounds > 1:
        limit += f"; one round of at most {engine.rounds}"
    return Duration("rollout", steps * step, limit)


def _annotate(load: Workload, cluster: Cluster, rates: Rates) -> Duration:
    tokens = tokens_per_gpu(load, cluster)
    models = (*load.trained, *(model for model in load.frozen if not model.is_reward))
    seconds = sum(forward_seconds(load, model.shape, cluster, rates, tokens) for model in models)
    seconds += load.switched_off * forward_seconds(load, load.policy, cluster, rates, tokens)
    return Duration("annotate", seconds, "matrix products")


def _update(load: Workload, cluster: Cluster, rates: Rates) -> Duration:
    tokens = tokens_per_gpu(load, cluster)
    seconds = sum(update_seconds(load, model.shape, cluster, rates, tokens) for model in load.trained)
    epochs = load.epochs
    used = model_flop(load, tokens) / (seconds * rates.peak) if len(load.trained) == 1 else None
    limit = "matrix products" if used is None else f"matrix products, {used:.0%} of the peak"
    return Duration("update", seconds * epochs, limit)
