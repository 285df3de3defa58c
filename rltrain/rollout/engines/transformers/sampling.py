"""Draws tokens from logits. The functions overwrite the logits, which are not used again."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from rltrain.rollout.temperature import entropy_of, token_temperatures
from rltrain.rollout.truncation import kept_tokens
from rltrain.types.samples import AdaptiveTemperature, Truncation

# vocabulary entries summed before the search: a running sum over the whole vocabulary costs ten times more
_BLOCK = 256
_MAX_SINGLE_SEARCH = 4 * _BLOCK  # entries up to which that running sum costs less


def sample_tokens_(
    logits: Tensor, uniform: Tensor, temperature: float, adaptive: AdaptiveTemperature | None = None
) -> tuple[Tensor, Tensor]:
    """Draws a token per row by inverting the cumulative distribution; returns it with its log-prob.
    Overwrites ``logits``.

    logits (R, V); uniform (R,) float32 in [0, 1]. Returns tokens (R,) int64 and log-probs (R,) float32 in
    nats, of softmax(logits / temperature); temperature 0 takes the largest logit and reports log-probs at
    temperature 1. With ``adaptive`` each row is drawn at a temperature of its own, and reported at
    ``temperature``. A token of probability 0 is never returned. NaN or infinite logits give NaN log-probs.
    """
    logits = logits.float()
    if temperature == 0:
        logp, tokens = torch.log_softmax(logits, dim=-1).max(dim=-1)
        return tokens, logp
    if adaptive is not None:
        reported = torch.log_softmax(logits / temperature, dim=-1)
        entropy = entropy_of(logits / temperature)  # as the learner measures it, from which the signal is
        token, _ = _draw_(logits.div_(token_temperatures(entropy, temperature, adaptive)[:, None]), uniform)
        return token, reported.gather(1, token[:, None])[:, 0]
    return _draw_(logits if temperature == 1 else logits.div_(temperature), uniform)


def truncate(
    logits: Tensor, temperature: float, truncation: Truncation, *, sets: bool
) -> tuple[Tensor, list[tuple[array[int], float]] | None]:
    """(R, V) float32 logits at ``temperature``, -inf for the tokens that ``truncation`` drops, and with
    ``sets`` the tokens that each row keeps, with their probability before the others are dropped.
    """
    scaled = logits.float() / temperature
    is_kept = kept_tokens(scaled, truncation)
    kept = None
    if sets:
        mass = torch.where(is_kept, scaled.softmax(dim=-1), 0.0).sum(dim=-1).tolist()
        ids = torch.nonzero(is_kept)[:, 1].split(is_kept.sum(dim=-1).tolist())
        kept = [(array("i", row.tolist()), row_mass) for row, row_mass in zip(ids, mass, strict=True)]
    return scaled.masked_fill_(~is_kept, -torch.inf), kept


def _draw_(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token from softmax(logits) for each row, and its log-prob."""
    mass = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()  # (R, V) unnormalised probabilities
    if mass.shape[1] <= _MAX_SINGLE_SEARCH:
        cumulative = mass.cumsum(dim=-1)
        total = cumulative[:, -1:]
        target = _clamp_below(uniform[:, None] * total, total)
        token = torch.searchsorted(cumulative, target, right=True).clamp_(max=mass.shape[1] - 1)
    else:
        total, token = _search_in_blocks(mass, uniform)
    return token[:, 0], (mass.gather(1, token) / total).log()[:, 0]


def _search_in_blocks(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(R, 1) the sum of each row, and the token at the share ``uniform`` of it, found by its block first and
    then by its place in the block.
    """
    blocks = _block_sums(mass).cumsum(dim=-1)
    total = blocks[:, -1:]
    target = _clamp_below(uniform[:, None] * total, total)
    block = torch.searchsorted(blocks, target, right=True).clamp_(max=blocks.shape[1] - 1)

    sum_before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0.0)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=mass.device)
    entries = torch.where(columns < mass.shape[1], mass.gather(1, columns.clamp(max=mass.shape[1] - 1)), 0.0)
    cumulative = entries.cumsum(dim=-1)
    target_inside = _clamp_below(target - sum_before, cumulative[:, -1:])
    offset = torch.searchsorted(cumulative, target_inside, right=True).clamp_(max=_BLOCK - 1)
    return total, (block * _BLOCK + offset).clamp_(max=mass.shape[1] - 1)


def _block_sums(mass: Tensor) -> Tensor:
    """(R, ceil(V / _BLOCK)) sums of consecutive columns, without padding (R, V) first."""
    full = mass.shape[1] // _BLOCK * _BLOCK  # columns in full blocks
    sums = mass[:, :full].unflatten(1, (-1, _BLOCK)).sum(dim=-1)
    if full == mass.shape[1]:
        return sums
    return torch.cat([sums, mass[:, full:].sum(dim=-1, keepdim=True)], dim=1)


def _clamp_below(value: Tensor, total: Tensor) -> Tensor:
    """``value`` clamped below ``total``, so that the search stops at a column that adds to the sum."""
    return torch.minimum(value, torch.nextafter(total, torch.zeros_like(total)))
