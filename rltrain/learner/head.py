"""Per-token statistics from hidden states, without a ``(tokens, V)`` tensor that outlives a chunk.

Logits exist for ``chunk`` tokens at a time, in the forward pass and again, recomputed, in the backward pass,
where the gradient with respect to the logits overwrites them. Softmax arithmetic is float32 whatever the
inputs are (float64 for float64 inputs) and works on tiles of a few rows that stay in cache. With z the logits
divided by the temperature, p = softmax(z), H the entropy, g and g_H the gradients of the loss by log-prob and
entropy:

    dz = g (1[target] - p) - g_H p (log p + H)        d(logits) = dz / temperature

Every other statistic is a function of a token's log-probs (``STATISTICS``), differentiated by recomputing it
on those tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rltrain.learner import compiled_tiles
from rltrain.learner.kept_tokens import KeptTokens, log_kept_mass
from rltrain.registry import suggestion

__all__ = ["BUILT_IN", "STATISTICS", "token_statistics"]

BUILT_IN = ("logp", "entropy", "entropy_grad")  # entropy_grad: the entropy, with a gradient

# Elements of one float32 tile: on a CPU it stays in the last-level cache; on other devices kernel launches
# cost more than memory.
_TILE_ELEMENTS = {"cpu": 1 << 21}
_TILE_ELEMENTS_ELSEWHERE = 1 << 26
_PRODUCT_ROWS = 8192  # rows of the weight's gradient per product, where it is summed in another dtype
_KEY_BITS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}  # of numbers of one sign


def clamped_entropy(logp: Tensor, targets: Tensor, share: float) -> Tensor:
    """Entropy over the vocabulary without its ``floor(share V)`` least likely tokens, renormalised,
    arXiv:2509.03493.

    The choice of tokens carries no gradient, and neither do the dropped logits.
    """
    del targets
    vocab = logp.shape[-1]
    kept = vocab - int(share * vocab)
    if logp.device.type != "cpu":  # topk of so many entries sorts every row there
        return entropy_of_largest(logp, kept)
    largest = logp.topk(kept, dim=-1, sorted=False).values.log_softmax(-1)
    return -(largest.exp() * largest).sum(-1)


def entropy_of_largest(logp: Tensor, kept: int) -> Tensor:
    """Entropy of the ``kept`` largest log-probs of each row (r, V), renormalised, without sorting.

    Of equal entries at the threshold each counts in the same part.
    """
    threshold = kth_largest(logp.detach(), kept)[:, None]
    above = logp > threshold
    ties = logp == threshold
    rest = kept - above.sum(-1, keepdim=True)
    part = rest.to(logp.dtype) / ties.sum(-1, keepdim=True)
    mass = logp.exp() * torch.where(ties, part, above.to(logp.dtype))
    total = mass.sum(-1)
    # 0 ln 0 is 0, also for a token that the model excludes
    surprise = torch.where(mass > 0, mass * logp, 0.0).sum(-1)
    return total.log() - surprise / total


def kth_largest(logp: Tensor, k: int) -> Tensor:
    """(r,) the ``k``-th largest entry of each row of numbers that are at most 0, by bisection of their bits.

    The bits of floating-point numbers of one sign are ordered like the numbers; for negative ones, downwards.
    """
    integers, width = _KEY_BITS[logp.dtype]
    # magnitudes: the k-th smallest is the smallest with at least k entries up to it
    keys = logp.abs().view(integers)
    low = keys.new_zeros(keys.shape[0])
    for bit in reversed(range(width)):
        middle = low | ((1 << bit) - 1)
        enough = (keys <= middle[:, None]).sum(-1) >= k
        low = torch.where(enough, low, low | (1 << bit))
    return -low.view(logp.dtype)


def collision(logp: Tensor, targets: Tensor) -> Tensor:
    """Probability that two draws agree, ``sum p^2 = exp(-H_2)``; 1 minus it is the expected squared
    gradient norm of a softmax.
    """
    del targets
    return (2 * logp).exp().sum(-1)


def expected_entropy_slope(logp: Tensor, targets: Tensor) -> Tensor:
    """``sum_v p_v^2 (ln p_v + H)``: minus the expectation over tokens of the entropy's slope along their
    logits.

    0 for a uniform row. It is the effect of an update of the sampled token on the entropy through all other
    tokens (STEER's exact form, arXiv:2510.10150).
    """
    del targets
    p = logp.exp()
    surprise = p * logp
    return (p * (surprise - p * surprise.sum(-1, keepdim=True))).sum(-1)


def tempered_logp(logp: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-prob of the target at another temperature, relative to the temperature of ``logp``."""
    tempered = logp / temperature
    return tempered.gather(1, targets[:, None]).squeeze(1) - tempered.logsumexp(-1)


def sharpened_entropy(logp: Tensor, targets: Tensor, sharpness: float) -> Tensor:
    """Entropy of ``p ** sharpness``, renormalised: the entropy of the same logits with the temperature
    divided by ``sharpness``.
    """
    del targets
    sharp = (logp * sharpness).log_softmax(-1)
    return -(sharp.exp() * sharp).sum(-1)


def log_mass(logp: Tensor, targets: Tensor, power: Tensor | float) -> Tensor:
    """``ln sum_v p(v) ** power``, the log of the normaliser of ``p ** power``; power is one number, or one
    per token, (r,).
    """
    del targets
    return (logp * (power[:, None] if isinstance(power, Tensor) else power)).logsumexp(-1)


# name -> f(log-probs (r, V), targets (r,), *arguments) -> (r,). Arguments follow the name:
# "clamped_entropy:0.3". An argument that is not a number names one of the ``arguments`` of
# ``token_statistics``, with a number per token: "log_mass:power". "entropy:0.5", the entropy at temperature
# 0.5 whatever the sampling temperature is, becomes ``sharpened_entropy``.
STATISTICS: dict[str, Callable[..., Tensor]] = {
    "clamped_entropy": clamped_entropy,
    "collision": collision,
    "expected_entropy_slope": expected_entropy_slope,
    "log_mass": log_mass,
    "sharpened_entropy": sharpened_entropy,
    "tempered_logp": tempered_logp,
}


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    wants: frozenset[str],
    chunk: int,
    bias: Tensor | None = None,
    fp32_head: bool = False,
    logit_scale: float = 1.0,
    arguments: Mapping[str, Tensor | KeptTokens] | None = None,
) -> dict[str, Tensor]:
    """The statistics ``wants`` of ``softmax(logit_scale (hidden weight^T + bias) / temperature)``, each
    ``(n,)``, float32 nats.

    hidden (n, H), weight (V, H), targets (n,) int64, bias (V,). Under autocast the matrix products run in the
    autocast dtype, otherwise in the dtype of the inputs; ``fp32_head`` computes them in float32 from any
    stored dtype (it costs a float32 copy of a bf16 weight). ``"entropy"`` is detached; ``"entropy_grad"``
    asks for the entropy with a gradient; both are returned as ``"entropy"``. ``arguments`` holds (n,) tensors
    or n sets of tokens that further statistics name. Raises ValueError on an unknown statistic, a temperature
    that is not positive, or shapes that do not fit.
    """
    _check(hidden, weight, targets, temperature, chunk)
    plan = _Plan(
        inverse_temperature=logit_scale / temperature,
        chunk=chunk,
        matmul=_matmul_dtype(hidden, weight, fp32_head),
        math=torch.promote_types(hidden.dtype, torch.float32),
        compiled=wants <= {*BUILT_IN} and compiled_tiles.serve(hidden.device),
        entropy=bool({"entropy", "entropy_grad"} & wants),
        entropy_grad="entropy_grad" in wants,
        extras=tuple(
            _resolve(name, temperature, arguments or {}) for name in sorted(wants.difference(BUILT_IN))
        ),
    )
    logp, entropy, *extras = _TokenStatistics.apply(hidden, weight, bias, targets, plan)
    statistics = {extra.name: values for extra, values in zip(plan.extras, extras, strict=True)}
    if "logp" in wants:
        statistics["logp"] = logp
    if plan.entropy:
        statistics["entropy"] = entropy
    return statistics


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int) -> None:
    """Raises ValueError on shapes that do not fit, or a temperature or chunk that is not positive."""
    are_matrices = hidden.dim() == weight.dim() == 2
    if not are_matrices or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}: expected (n, H), (V, H) and (n,)")
    if not temperature > 0 or chunk < 1:
        raise ValueError(f"temperature is {temperature}, chunk is {chunk}: both must be positive")


def _resolve(name: str, temperature: float, tensors: Mapping[str, Tensor | KeptTokens]) -> _Extra:
    """The statistic called ``name`` with its arguments, which may name ``tensors``.

    temperature: of the log-probs that it will receive. Raises ValueError on an unknown statistic or argument.
    """
    word, *texts = name.split(":")
    arguments = [float(text) if _is_number(text) else text for text in texts]
    if word == "entropy" and len(arguments) == 1 and isinstance(arguments[0], float) and arguments[0] > 0:
        return _Extra(name, sharpened_entropy, (temperature / arguments[0],))
    if word == "log_kept_mass":  # of every log-prob under truncated sampling; no method names it
        return _Extra(name, log_kept_mass, (tensors[texts[0]],))
    if word not in STATISTICS:
        raise ValueError(f"no token statistic is called {name!r}{suggestion(word, (*BUILT_IN, *STATISTICS))}")
    for argument in arguments:
        if isinstance(argument, str) and argument not in tensors:
            raise ValueError(
                f"token statistic {name!r} reads {argument!r}, a number per token, which is missing"
            )
    values = tuple(tensors[argument] if isinstance(argument, str) else argument for argument in arguments)
    return _Extra(name, STATISTICS[word], values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _matmul_dtype(hidden: Tensor, weight: Tensor, fp32_head: bool) -> torch.dtype:
    """The dtype of the product of ``hidden`` and ``weight``."""
    stored = torch.promote_types(hidden.dtype, weight.dtype)
    if fp32_head:
        return torch.promote_types(stored, torch.float32)
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stored


@dataclass(frozen=True)
class _Extra:
    """A further statistic, with its arguments: numbers, or one for each of the n tokens."""

    name: str
    function: Callable[..., Tensor]
    arguments: tuple[float | Tensor | KeptTokens, ...]

    def __call__(self, logp: Tensor, targets: Tensor, rows: slice) -> Tensor:
        arguments = (
            argument if isinstance(argument, float | int) else argument[rows] for argument in self.arguments
        )
        return self.function(logp, targets, *arguments)


@dataclass(frozen=True)
class _Plan:
    """What to compute, and how."""

    inverse_temperature: float
    chunk: int  # tokens whose logits exist at once
    matmul: torch.dtype  # of the products and of the logits as they are stored
    math: torch.dtype  # of all computations after the logits
    compiled: bool  # whether the functions of a tile run as compiled kernels
    entropy: bool
    entropy_grad: bool
    extras: tuple[_Extra, ...]


class _Workspace:
    """Buffers that a pass reuses for every chunk: the logits ``(chunk, V)`` and two tiles ``(rows, V)``."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> None:
        vocab = weight.shape[0]
        device = hidden.device
        self.hidden = hidden
        self.plan = plan
        self.weight = weight.to(plan.matmul)
        self.bias = None if bias is None else bias.to(plan.matmul)
        chunk = max(min(plan.chunk, hidden.shape[0]), 1)
        elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ELSEWHERE)
        self.rows = chunk if plan.compiled else min(chunk, max(1, elements // vocab))
        self._logits = torch.empty(chunk, vocab, dtype=plan.matmul, device=device)
        # compiled kernels need no scratch
        self._tiles = torch.empty(2, 0 if plan.compiled else self.rows, vocab, dtype=plan.math, device=device)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(positions, hidden states, logits) of each chunk; the next chunk overwrites the logits."""
        for positions in _slices(0, self.hidden.shape[0], self.plan.chunk):
            hidden = self.hidden[positions].to(self.plan.matmul)
            logits = self._logits[: hidden.shape[0]]
            torch.mm(hidden, self.weight.t(), out=logits)
            if self.bias is not None:
                logits.add_(self.bias)
            yield positions, hidden, logits

    def tiles(self, chunk: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(positions, their logits, scratch, scratch) of each tile of the chunk at positions ``chunk``."""
        for rows in _slices(chunk.start, chunk.stop, self.rows):
            count = rows.stop - rows.start
            tile = logits[rows.start - chunk.start : rows.stop - chunk.start]
            yield rows, tile, self._tiles[0, :count], self._tiles[1, :count]


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of length ``step`` from ``start`` to ``stop``; the last may be shorter."""
    return (slice(low, min(low + step, stop)) for low in range(start, stop, step))


class _TokenStatistics(torch.autograd.Function):
    """(hidden, weight, bias, targets, plan) -> (log-prob, entropy, *extras), each (n,).

    Saves inputs and two numbers per token.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan
    ) -> tuple[Tensor, ...]:
        log_z, logp, entropy, *extras = torch.empty(
            3 + len(plan.extras), hidden.shape[0], dtype=plan.math, device=hidden.device
        )
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Workspace(hidden, weight, bias, plan)
            for positions, _, logits in work.chunks():
                for rows, z, shifted, scratch in work.tiles(positions, logits):
                    log_z[rows], logp[rows], entropy[rows] = _softmax_numbers(
                        z, targets[rows], shifted, scratch, plan
                    )
                    for extra, values in zip(plan.extras, extras, strict=True):
                        values[rows] = extra(shifted, targets[rows], rows)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        # Rows of one buffer would be views of it; autograd requires outputs that are not views.
        outputs = (logp.clone(), entropy.clone(), *(values.clone() for values in extras))
        if not plan.entropy_grad:
            ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        plan: _Plan = ctx.plan
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Workspace(hidden, weight, bias, plan)
            gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad, plan)
            for positions, chunk, logits in work.chunks():
                for rows, z, logp, scratch in work.tiles(positions, logits):
                    tile_grads = [None if grad is None else grad[rows] for grad in grads]
                    _logits_gradient(
                        z, targets[rows], log_z[rows], entropy[rows], tile_grads, logp, scratch, plan, rows
                    )
                gradients.add(positions, chunk, logits, work.weight)
        return *gradients.result(), None, None


def _softmax_numbers(
    z: Tensor, targets: Tensor, shifted: Tensor, scratch: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """(log Z, log-prob of the target, entropy), each (r,), of logits (r, V).

    Leaves all log-probs in ``shifted`` for the extras.
    """
    if plan.compiled:
        inverse = plan.inverse_temperature
        return compiled_tiles.softmax_numbers(z, targets, inverse, plan.math, entropy=plan.entropy)
    top = z.amax(-1, keepdim=True).to(plan.math) * plan.inverse_temperature
    torch.add(-top, z, alpha=plan.inverse_temperature, out=shifted)
    weights = torch.exp(shifted, out=scratch)
    total = weights.sum(-1, keepdim=True)
    log_total = total.log()
    logp = shifted.gather(1, targets[:, None]) - log_total
    entropy = (
        log_total - weights.mul_(shifted).sum(-1, keepdim=True) / total
        if plan.entropy
        else torch.zeros_like(logp)
    )
    if plan.extras:
        shifted.sub_(log_total)
    return (top + log_total).squeeze(1), logp.squeeze(1), entropy.squeeze(1)


def _logits_gradient(
    z: Tensor,
    targets: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grads: list[Tensor | None],
    logp: Tensor,
    scratch: Tensor,
    plan: _Plan,
    rows: slice,
) -> None:
    """Overwrite the logits ``z (r, V)`` by their gradient: ``p (a + b log p) + 1[target] g + dense``, all
    divided by the temperature.

    rows: positions of the tile among all tokens.
    """
    grad_logp, grad_entropy, *grad_extras = grads
    if plan.compiled:
        inverse = plan.inverse_temperature
        compiled_tiles.logits_gradient(z, targets, log_z, entropy, grad_logp, grad_entropy, inverse)
        return
    torch.add(-log_z[:, None], z, alpha=plan.inverse_temperature, out=logp)
    dense = _extras_gradient(logp, targets, grad_extras, plan, rows)
    constant = torch.zeros_like(log_z) if grad_logp is None else -grad_logp
    if dense is not None:
        constant = constant - dense.sum(-1)
    if grad_entropy is None:
        factor = (constant * plan.inverse_temperature)[:, None]
    else:
        constant = (constant - grad_entropy * entropy) * plan.inverse_temperature
        slope = -grad_entropy * plan.inverse_temperature
        factor = torch.addcmul(constant[:, None], slope[:, None], logp, out=scratch)
    result = z if z.dtype == plan.math else logp
    torch.mul(logp.exp_(), factor, out=result)
    if dense is not None:
        result.add_(dense, alpha=plan.inverse_temperature)
    if grad_logp is not None:
        result.scatter_add_(1, targets[:, None], (grad_logp * plan.inverse_temperature)[:, None])
    if result is not z:
        z.copy_(result)


def _extras_gradient(
    logp: Tensor, targets: Tensor, grads: list[Tensor | None], plan: _Plan, rows: slice
) -> Tensor | None:
    """Gradient (r, V) of the extra statistics with respect to the log-probs, by computing them again; None
    where no gradient arrived.
    """
    live = [(extra, grad) for extra, grad in zip(plan.extras, grads, strict=True) if grad is not None]
    if not live:
        return None
    leaf = logp.detach().requires_grad_()
    with torch.enable_grad():
        values = [extra(leaf, targets, rows) for extra, _ in live]
    return torch.autograd.grad(values, leaf, [grad for _, grad in live])[0]


class _Gradients:
    """Gradients of the inputs, summed up over chunks.

    An input that needs no gradient costs no matrix product.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...], plan: _Plan
    ) -> None:
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        self.hidden = torch.empty_like(hidden, dtype=plan.matmul) if needs[0] else None
        # Sums over chunks are kept in float32: in bf16 the later chunks would vanish.
        self.weight = torch.zeros_like(weight, dtype=plan.math) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=plan.math) if bias is not None and needs[2] else None

    def add(self, positions: slice, hidden: Tensor, gradient: Tensor, weight: Tensor) -> None:
        """Add ``gradient (c, V)`` of the logits of ``hidden (c, H)``, both in the matmul dtype."""
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[positions])
        if self.weight is not None:
            _add_product(self.weight, gradient, hidden)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))

    def result(self) -> tuple[Tensor | None, ...]:
        """The gradients of (hidden, weight, bias) in the inputs' dtypes."""
        pairs = zip((self.hidden, self.weight, self.bias), self.dtypes, strict=True)
        return tuple(None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """``total (V, H) += gradient^T hidden`` without a second ``(V, H)`` tensor, also for different dtypes."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    if adds_products(gradient.device, gradient.dtype, total.dtype):
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
        return
    for rows in _slices(0, total.shape[0], _PRODUCT_ROWS):
        total[rows].add_(torch.mm(gradient[:, rows].t(), hidden))


@cache
def adds_products(device: torch.device, inputs: torch.dtype, total: torch.dtype) -> bool:
    """Whether one kernel of ``device`` adds a product of ``inputs`` to a ``total`` of another dtype.

    Tried once on small matrices and compared: kernels for it exist on CUDA only, and not for every dtype.
    """
    if device.type == "meta":
        return True
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(16, 16, generator=generator).to(device, inputs) for _ in range(2))
    start = torch.ones(16, 16, dtype=total, device=device)
    result = start.clone()
    try:
        torch.addmm(result, left.t(), right, out_dtype=total, out=result)
    except (NotImplementedError, RuntimeError):
        return False
    return torch.allclose(result, start + left.to(total).t() @ right.to(total), rtol=1e-3, atol=1e-3)
