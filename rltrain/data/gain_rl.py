"""GAIN-RL's curriculum: prompts are sorted by the alignment of their hidden states and drawn from a window
that moves down the list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rltrain.needs import ALIGNMENT
from rltrain.registry import method
from rltrain.seeds import stable_hash

__all__ = ["GainRlOrder", "log_weights", "stride", "template_lengths"]

_ALIGNMENT_METRIC = "control/alignment"  # the step metric that moves the window, together with the accuracy


@method("gain_rl", arxiv="2506.02281", needs={ALIGNMENT})
class GainRlOrder:
    """Ranks prompts by ``C_intra + inter_weight C_inter`` and draws them with weight ``exp(-((rank - centre)
    / sigma)^2 / 2)``, arXiv:2506.02281.

    A step's prompts are all different; the next step may draw them again. After each step the centre moves by
    ``clip(stride tanh(slope (accuracy - goal)) + stride tanh(slope alignment), 0, max_stride)``, at most to
    the end of the list. accuracy: share of the step's completions that are correct (their mean reward if no
    reward function reports correctness) times accuracy_scale. The released verl version has accuracy_scale
    0.5: it halves the 0/1 rewards, so that this term is never positive. alignment: mean cosine of the hidden
    states of the step's rows, prompt and completion. inter_weight is 1 in the README of the released code and
    8 in its script.
    """

    def __init__(
        self,
        count: int,
        per_step: int,
        seed: int,
        scores: Sequence[float],
        *,
        inter_weight: float = 1.0,
        sigma: float = 1000.0,
        stride: float = 500.0,
        slope: float = 2.0,
        goal: float = 0.5,
        max_stride: float = 1000.0,
        accuracy_scale: float = 1.0,
    ) -> None:
        """scores: one per prompt, from the initial model; empty if a saved state will be loaded."""
        del inter_weight  # already contained in the scores
        if not 1 <= per_step <= count:
            raise ValueError(
                f"a step needs {per_step} different prompts and the training set has {count}; lower "
                "rollout.prompts"
            )
        if not sigma > 0:
            raise ValueError(f"data.order gain_rl: sigma is {sigma}, it must be positive")

        self.count = count
        self.per_step = per_step
        self.seed = seed
        self.sigma = sigma
        self.stride = stride
        self.slope = slope
        self.goal = goal
        self.max_stride = max_stride
        self.accuracy_scale = accuracy_scale

        self.ranking = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        self.centre = 0.0
        self.drawn = 0

    def next(self) -> list[int]:
        """``per_step`` different indices, most aligned first."""
        generator = np.random.default_rng(stable_hash("gain_rl", self.seed, self.drawn))
        self.drawn += 1
        # The indices of the largest log-weights plus Gumbel noise are a draw without replacement. It works
        # even if the weights themselves would underflow.
        keys = log_weights(self.count, self.centre, self.sigma) + generator.gumbel(size=self.count)
        ranks = np.sort(np.argsort(-keys, kind="stable")[: self.per_step])
        return [self.ranking[rank] for rank in ranks]

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Moves the window by one step's metrics; a NaN accuracy or alignment moves nothing."""
        accuracy = metrics.get("reward/correct", metrics.get("reward/mean", math.nan)) * self.accuracy_scale
        move = stride(
            accuracy, metrics[_ALIGNMENT_METRIC], self.stride, self.slope, self.goal, self.max_stride
        )
        if math.isfinite(move):
            self.centre = min(self.centre + move, self.count - 1)

    def state_dict(self) -> dict[str, Any]:
        """Position of the window and ranking of the prompts, whose scores come from weights that are gone."""
        settings = {"count": self.count, "per_step": self.per_step, "seed": self.seed}
        return {**settings, "centre": self.centre, "drawn": self.drawn, "ranking": self.ranking}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``.

        Raises ValueError if it belongs to other data, another step size, seed or order.
        """
        if "ranking" not in state:
            raise ValueError(
                "the saved prompt order is not gain_rl's; resume with the data.order of the saved run, or "
                "start a new run"
            )
        for name in ("count", "per_step", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved order has {name} {state[name]} and this run {getattr(self, name)}: the same "
                    "prompts cannot be continued; resume with the data, rollout.prompts and seed of the "
                    "saved run, or start a new run"
                )
        self.centre = state["centre"]
        self.drawn = state["drawn"]
        self.ranking = list(state["ranking"])


def log_weights(count: int, centre: float, sigma: float) -> np.ndarray:
    """(count,) log of each rank's weight, up to a constant."""
    return -0.5 * ((np.arange(count) - centre) / sigma) ** 2


def stride(accuracy: float, alignment: float, size: float, slope: float, goal: float, limit: float) -> float:
    """How far the centre moves, in ranks: at least 0, at most ``limit``; NaN if an argument is NaN."""
    move = size * math.tanh(slope * (accuracy - goal)) + size * math.tanh(slope * alignment)
    return move if math.isnan(move) else min(max(move, 0.0), limit)


def template_lengths(prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(prefix, suffix) lengths in tokens that all ``prompts`` share: system message and chat template.

    At least one token remains between them.
    """
    first = prompts[0]
    shortest = min(map(len, prompts))
    prefix = next(
        (index for index in range(shortest) if any(prompt[index] != first[index] for prompt in prompts)),
        shortest,
    )
    prefix = min(prefix, shortest - 1)

    room = shortest - prefix - 1
    suffix = next(
        (
            index
            for index in range(room)
            if any(prompt[-1 - index] != first[-1 - index] for prompt in prompts)
        ),
        room,
    )
    return prefix, suffix
