"""COPO: the more a prompt's completions agree, the more its advantage as a whole prompt counts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import ANSWER, POLICY_LOSS
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask, segment_count, segment_mean
from rltrain.types.policy import TrainBatch

__all__ = ["consistency_entropy", "copo", "global_advantages"]

Mode = Literal["soft", "soft_forced", "forced", "soft_zero", "zero", "global", "local"]


@method("copo", arxiv="2508.04138", needs={ANSWER}, traits={POLICY_LOSS("copo")})
def copo(
    batch: TrainBatch,
    *,
    mode: Literal["soft", "soft_forced", "forced", "soft_zero", "zero", "global", "local"] = "soft",
    k: float = 20.0,
    b: float = 0.5,
    discount: bool = False,
    coefficient: float = 1.0,
    eps: float = 1e-6,
) -> TrainBatch:
    """COPO: shares of the advantage within the prompt and of the prompt's own, by how far its answers agree,
    for the loss ``copo``, arXiv:2508.04138 (other papers use the name too).

    Formula: ``A <- w A``, ``A_global = (1 - w) (mean_q - mean) / (std + eps)``, ``w = sigmoid(k (H - b))``

    H is the entropy in bits of the prompt's extracted answers ("no answer" counts as one more answer). A
    prompt whose completions agree relies on its global advantage: its mean reward normalised over all prompts
    of the step (std with ddof 1, plus eps). discount: mean rewards are first multiplied by 1 - lambda H,
    lambda = (1 - 1/G) / log2 G. The loss is positively homogeneous in the advantage, so w is multiplied into
    ``advantages`` and 1 - w into ``extra["advantage_global"]``; ``coefficient`` multiplies the latter.

    mode "soft": as above. "forced": w is 1 where the local advantage is not 0, else 0; "soft_forced": the
    product of both, so that no group of equal rewards is without a signal. "zero" and "soft_zero": the same
    with the condition that the reward is not 0 (in the release "only-zero", "soft-with-zero"). "global": w is
    0; "local": w is 1 and nothing changes. The release's scripts use k 20 and b 0.5, or 5 and 1; the paper
    reports its best result at 20 and 1.5, without the base of the logarithm. Raises ValueError if no reward
    function extracts answers.
    """
    if batch.answer is None:
        raise ValueError(
            "control copo needs the completions' answers: name a reward function that extracts them "
            "(math_answer, choice, exact)"
        )
    counted = ~batch.rewards.isnan() & batch.mask.any(1)
    dtype = batch.advantages.dtype
    entropy = consistency_entropy(batch.answer, batch.group, counted).to(dtype)
    share = _local_share(batch, entropy, mode, k, b)
    local_advantage = apply_mask(batch.advantages, batch.mask) * share.to(dtype)[:, None]

    discounted_by = entropy if discount else None
    prompt_advantage = global_advantages(batch.rewards, batch.group, counted, discounted_by, eps)
    global_advantage = (coefficient * (1 - share) * prompt_advantage).to(dtype)[:, None]
    global_advantage = apply_mask(global_advantage.expand(batch.mask.shape), batch.mask)

    batch = batch.replace(advantages=local_advantage).with_extra(advantage_global=global_advantage)
    if not bool(counted.any()):
        return batch
    return batch.with_metrics(
        copo_entropy=float(entropy[counted].mean()), copo_local_share=float(share[counted].mean())
    )


def consistency_entropy(answer: Tensor, group: Tensor, counted: Tensor) -> Tensor:
    """(B,) entropy in bits of the answers among a group's counted rows, at each of them; 0 at other rows.

    It is 0 if the answers agree.
    """
    ids = answer[counted]
    prompts = group[counted]
    width = int(ids.max()) + 2 if len(ids) else 1
    prompt = torch.unique(prompts, return_inverse=True)[1]
    share = segment_count(prompt * width + ids + 1).double() / segment_count(prompt)
    entropy = torch.zeros(len(answer), dtype=torch.float64, device=answer.device)
    entropy[counted] = segment_mean(-share.log2(), prompt)
    return entropy


def global_advantages(
    rewards: Tensor, group: Tensor, counted: Tensor, entropy: Tensor | None, eps: float
) -> Tensor:
    """(B,) the prompt's mean reward over its counted rows, normalised over prompts (ddof 1); 0 at other rows.

    entropy: bits; discounts the mean reward. A single prompt gets 0, and so do prompts with equal means.
    """
    prompt = torch.unique(group[counted], return_inverse=True)[1]
    mean = segment_mean(rewards[counted], prompt)
    if entropy is not None:
        size = segment_count(prompt).to(mean.dtype)
        rate = torch.where(size > 1, (1 - 1 / size) / size.log2().clamp(min=1.0), torch.zeros_like(size))
        mean = mean * (1 - rate * entropy[counted].to(mean.dtype))
    prompts = torch.zeros(int(prompt.max()) + 1 if len(prompt) else 0, dtype=mean.dtype, device=mean.device)
    prompts[prompt] = mean
    centred = prompts - segment_mean(prompts, torch.zeros_like(prompts, dtype=torch.int64))
    spread = (centred.square().sum() / max(len(prompts) - 1, 1)).sqrt()
    advantages = torch.zeros_like(rewards)
    advantages[counted] = (centred / (spread + eps))[prompt]
    return advantages


def _local_share(batch: TrainBatch, entropy: Tensor, mode: Mode, k: float, b: float) -> Tensor:
    """(B,) w, the share of the local loss."""
    soft = torch.sigmoid(k * (entropy - b)) if mode.startswith("soft") else torch.ones_like(entropy)
    if mode == "global":
        return torch.zeros_like(entropy)
    if mode.endswith("forced"):
        return soft * (apply_mask(batch.advantages, batch.mask) != 0).any(1)
    if mode.endswith("zero"):
        return soft * (batch.rewards.nan_to_num(0.0) != 0)
    return soft
