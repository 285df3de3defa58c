"""A rollout source that samples ahead: step t trains on samples of the weights after step t - 1 - lag.

While a version of the weights is current, the source samples the step that is due when ``lag`` more steps are
taken. So no completion mixes versions, and what is sampled depends on nothing but the order of the steps: not
on how fast an engine is, nor on whether the learner waits for it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rltrain.errors import UserError
from rltrain.rollout.source import Rollouts
from rltrain.train.journaled import JournaledRollouts
from rltrain.types.samples import Prompt, Sampling, ScoredGroup

__all__ = ["LaggedRollouts"]

_ERRORS = (UserError, RuntimeError, OSError, ValueError, LookupError, TypeError, ArithmeticError)


@dataclass
class LaggedRollouts:
    """Implements ``RolloutSource``. inner: whose files hold what was sampled ahead, for a resumed run.

    steps: of the whole run; nothing is sampled beyond. overlaps: the engine samples while the learner goes
    on; only for an engine in processes of its own. has_thread: in a thread of this process, which joins no
    collective and so needs a single rank; otherwise a controller does, and ``settle`` joins its pushes.
    """

    inner: JournaledRollouts
    lag: int
    steps: int
    overlaps: bool = False
    has_thread: bool = True
    _ahead: dict[int, Rollouts] = field(default_factory=dict)
    _sampling: _Sampling | _Asked | None = None

    @property
    def prompts(self) -> Sequence[Prompt] | None:
        return self.inner.prompts

    def take(self, step: int, version: int) -> Rollouts:
        """The rollouts of ``step``, sampled ``lag`` steps ago; samples those that are due ``lag`` steps from
        now, with the weights of ``version``.

        Its seconds are those that the learner waits for here.
        """
        start = time.perf_counter()
        self.settle()
        first = max([step - 1, *self._ahead]) + 1
        for number in range(first, min(step + self.lag, self.steps) + 1):
            waits = number == step or not self.overlaps or number < min(step + self.lag, self.steps)
            sample = self.inner.begin(number, version, draws=not self.overlaps)
            if waits:
                self._ahead[number] = sample()
            else:
                self._sampling = (_Sampling if self.has_thread else _Asked)(number, sample)
        rollouts = self._ahead.pop(step)
        if self.lag == 0:
            return rollouts
        return dataclasses.replace(rollouts, seconds={"rollout": time.perf_counter() - start})

    def settle(self) -> None:
        """Returns when nothing is sampled any more, so that the weights may change. Raises what ended it."""
        if self._sampling is not None:
            sampling = self._sampling
            self._sampling = None
            self._ahead[sampling.step] = sampling.wait()

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        self.settle()
        return self.inner.evaluate(prompts, sampling, version, occasion)

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None:
        """What adapts to a step's numbers does so for the next step that is sampled, ``lag`` steps later."""
        self.settle()
        self.inner.observe(metrics, entropy, sampled)

    def release_memory(self) -> None:
        if self._sampling is None:
            self.inner.release_memory()

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        origins = [[step, self.inner.origins[step]] for step in sorted(self._ahead)]
        return {**self.inner.state_dict(), **({"ahead": origins} if self.lag else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where the journal no longer has what was sampled ahead: its weights are gone."""
        self._ahead.clear()
        for step, origin in state.get("ahead", ()):
            rollouts = self.inner.find(step, origin)
            if rollouts is None:
                raise UserError(
                    f"{self.inner.journal.path(step)} is not what was sampled for step {step} before the "
                    "checkpoint, by weights that are gone; put the file back, or resume from an earlier "
                    "checkpoint"
                )
            self._ahead[step] = rollouts
        self.inner.load_state_dict(state)

    def close(self) -> None:
        """What is still sampled is for nothing: the engine's end, or the process's, ends it."""
        self.inner.close()


@dataclass(frozen=True)
class _Asked:
    """A step that a controller samples."""

    step: int
    wait: Callable[[], Rollouts]


class _Sampling:
    """A step that is sampled in a thread, which does not keep the process alive."""

    def __init__(self, step: int, sample: Callable[[], Rollouts]) -> None:
        self.step = step
        self._future: Future[Rollouts] = Future()
        threading.Thread(
            target=self._run, args=(sample,), name=f"rollouts of step {step}", daemon=True
        ).start()

    def _run(self, sample: Callable[[], Rollouts]) -> None:
        try:
            self._future.set_result(sample())
        except _ERRORS as error:
            self._future.set_exception(error)
        finally:
            if not self._future.done():  # the thread prints it
                self._future.set_exception(RuntimeError("sampling ended by a fault of the program"))

    def wait(self) -> Rollouts:
        return self._future.result()
