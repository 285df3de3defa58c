"""Chooses the prompts of each step: seeded, resumable, every prompt once per epoch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

from rltrain.registry import method
from rltrain.seeds import stable_hash


class Order(Protocol):
    """Chooses the prompts of the next step by index. A curriculum is another class with the same methods."""

    def next(self) -> list[int]:
        """Indices into the training prompts, all different."""
        ...

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Receives one step's metrics, which are the same on every rank."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@method("shuffled")
class PromptOrder:
    """Random permutations, one per epoch, cut into steps of ``per_step``.

    A step may straddle two epochs. It never holds a prompt twice (two groups of one prompt would be sampled
    with the same seeds): prompts that the old epoch has put into such a step come after it in the new epoch.
    """

    def __init__(self, count: int, per_step: int, seed: int) -> None:
        if per_step < 1 or count < per_step:
            raise ValueError(
                f"a step needs {per_step} different prompts and the training set has {count}; lower "
                "rollout.prompts or give more data (data.max_prompts and data.max_prompt_tokens may have "
                "dropped some)"
            )
        self.count = count
        self.per_step = per_step
        self.seed = seed
        self._rewind()

    def next(self) -> list[int]:
        """``per_step`` different indices below ``count``."""
        step = self._permutation[self.cursor : self.cursor + self.per_step]
        self.cursor += len(step)
        missing = self.per_step - len(step)
        if missing:
            self._begin_epoch(self.epoch + 1, straddling=step)
            step = step + self._permutation[:missing]
            self.cursor = missing
        return step

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Does nothing: a random order does not depend on metrics."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the order, and the settings that the order depends on."""
        return {
            "count": self.count,
            "per_step": self.per_step,
            "seed": self.seed,
            "epoch": self.epoch,
            "cursor": self.cursor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``.

        Raises ValueError if it belongs to other data, another step size or seed.
        """
        for name in ("count", "per_step", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved order has {name} {state[name]} and this run {getattr(self, name)}: the same "
                    "prompts cannot be continued; resume with the data, rollout.prompts and seed of the "
                    "saved run, or start a new run"
                )
        if state["cursor"] > self.count or state["epoch"] < 0 or state["cursor"] < 0:
            raise ValueError(
                f"the saved order is at epoch {state['epoch']}, cursor {state['cursor']} of {self.count}: it "
                "is damaged"
            )
        self._rewind()
        while self.epoch < state["epoch"]:  # an epoch's permutation depends on the end of the previous one
            left_over = (self.count - self.cursor) % self.per_step
            straddling = self._permutation[self.count - left_over :]
            self._begin_epoch(self.epoch + 1, straddling)
            self.cursor = self.per_step - left_over if left_over else 0
        self.cursor = state["cursor"]

    def _rewind(self) -> None:
        self.cursor = 0
        self._begin_epoch(0, straddling=[])

    def _begin_epoch(self, epoch: int, straddling: list[int]) -> None:
        drawn = random.Random(stable_hash("prompt order", self.seed, epoch)).sample(
            range(self.count), self.count
        )
        taken = set(straddling)
        fresh = [index for index in drawn if index not in taken]
        head = self.per_step - len(straddling)
        behind = set(fresh[:head])
        self._permutation = fresh[:head] + [index for index in drawn if index not in behind]
        self.epoch = epoch
