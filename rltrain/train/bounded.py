"""A rollout source whose workers sample without a break; no token is older than a number of pushes when a
step trains on it.

A thread takes the groups as workers finish them, grades them and writes them to the disk, while the learner
trains. Which of them a step trains on says ``rollout/window.py``; the journal has every step's, so that a run
can be replayed though it cannot be repeated.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from rltrain.checkpoint.journal import WaitingGroups
from rltrain.errors import UserError
from rltrain.rollout.colocated import ColocatedRollouts
from rltrain.rollout.grading import correctness
from rltrain.rollout.source import Rollouts
from rltrain.rollout.window import Draw, Window
from rltrain.seeds import stable_hash
from rltrain.types.samples import PolicyVersion, Prompt, Request, RolloutGroup, Sampling, ScoredGroup

__all__ = ["BoundedRollouts", "FreeEngine"]

_ERRORS = (UserError, RuntimeError, OSError, ValueError, LookupError, TypeError, ArithmeticError)


class FreeEngine(Protocol):
    """Workers that sample without a break; see ``rollout/engines/free_running.py``."""

    def begin(self, number: int, request: Request, policy: PolicyVersion) -> None: ...

    def give_up(self, number: int) -> None: ...

    def find_start(self, number: int) -> PolicyVersion | None: ...

    def next(self) -> tuple[int, RolloutGroup] | None: ...

    def close(self) -> None: ...


@dataclass
class BoundedRollouts:
    """Implements ``PromptedSource``. inner: draws prompts, grades, and evaluates on the same workers.

    steps: of the whole run. weights_digest: of the learner's weights; a collective. has_thread: groups are
    received in a thread; without one ``receive`` is called where a step waits, and from outside.
    """

    inner: ColocatedRollouts
    engine: FreeEngine
    window: Window
    waiting: WaitingGroups
    steps: int
    weights_digest: Callable[[], str]
    has_thread: bool = True
    _digests: dict[PolicyVersion, str] = field(default_factory=dict)
    _there: dict[int, ScoredGroup] = field(default_factory=dict)
    _unwritten: set[int] = field(default_factory=set)  # there, but of weights whose digest is not known yet
    _under_way: set[int] = field(default_factory=set)  # asked for
    _ahead: list[int] = field(default_factory=list)  # prompts that the order gave and nobody asked for
    _used: list[int] = field(default_factory=list)  # whose files the next step no longer needs
    _step: int = 1
    _has_begun: bool = False
    _error: BaseException | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _receiver: threading.Thread | None = None

    @property
    def prompts(self) -> Sequence[Prompt] | None:
        return self.inner.prompts

    def take(self, step: int, version: int) -> Rollouts:
        """The groups of ``step``. Its seconds are those that the learner waits for here.

        Raises what ended the workers, and RuntimeError for a token that is too old.
        """
        start = time.perf_counter()
        process = self.inner.graded.process
        with self._changed:
            self._step = step
            self._begin_step(version)
            dropped = self.window.dropped
            self._refill(version)
            with process.deadline("the vllm_server engine", f"to finish the groups of step {step}"):
                numbers = self._wait_for_groups(version)
            groups = [self._there.pop(number) for number in numbers]
            for number, group in zip(numbers, groups, strict=True):
                self.window.require_young(number, group)
            self.window.take(numbers)
            self._unwritten.difference_update(numbers)
            self._used += numbers
            metrics = self._notes(groups, self.window.dropped - dropped)
        seconds = {"rollout": time.perf_counter() - start, "reward": 0.0, "sync": 0.0}
        start = time.perf_counter()
        self.inner.verify()
        seconds["sync"] = time.perf_counter() - start
        numbered = tuple(dataclasses.replace(group, group=place) for place, group in enumerate(groups))
        counts = tuple(sum(correct) for group in groups if (correct := correctness(group)) is not None)
        return Rollouts(numbered, len(groups), 1, counts, seconds, metrics)

    def _notes(self, groups: Sequence[ScoredGroup], dropped: int) -> dict[str, float]:
        completions = [completion for group in groups for completion in group.completions]
        mixed = sum(len(completion.versions) > 1 for completion in completions)
        return {
            **self.inner.engine_notes(),
            "staleness/mixed": mixed / len(completions),
            "staleness/dropped_groups": float(dropped),
            "staleness/outstanding_groups": float(len(self.window.draws)),
        }

    # what is outstanding ------------------------------------------------------------------------------------

    def _begin_step(self, version: PolicyVersion) -> None:
        """The policy of ``version`` is the present one: what is of older ones may be too old now."""
        if version not in self._digests:
            self._digests[version] = self.weights_digest()
        self.window.advance(version)
        self._digests = {each: self._digests[each] for each in self.window.known if each in self._digests}
        if not self._has_begun:  # a process that was killed leaves some behind
            self._used += [number for number in self.waiting.numbers() if number <= self.window.drawn]
            self._has_begun = True
        self.waiting.remove(number for number in self._used if number not in self.window.draws)
        self._used.clear()
        for number in sorted(self._unwritten):
            self._write(number)
        for draw in list(self.window.draws.values()):
            if draw.number not in self._there and draw.number not in self._under_way:
                self._begin(draw, version)  # a run that goes on

    def _refill(self, version: PolicyVersion) -> None:
        """Asks for as many groups as can be trained on in time; drops those that cannot."""
        if not self.window.waits:
            self._drop_stale()
        for _ in range(self.window.room(self.steps - self._step + 1)):
            if not self._ahead:
                self._ahead += self.inner.order.next()
            self._begin(self.window.draw(self._ahead.pop(0)), version)

    def _begin(self, draw: Draw, version: PolicyVersion) -> None:
        """Asks for a group, unless the disk has it: with the same weights, seeds give the same tokens."""
        prompt = self.inner.prompts[draw.prompt]
        group = self.waiting.read(draw.number, prompt.id, self._digests)
        if group is not None:
            self._there[draw.number] = group
            self.window.note_arrival(draw.number, group)
            return
        draw.begun = self.window.pushes
        # the seeds of a group are those of the step that draws it in a synchronous run
        number = (draw.number - 1) // self.window.size + 1
        seed = stable_hash(self.inner.sampling.seed, "rollout", number, 0)
        sampling = dataclasses.replace(self.inner.sampling, seed=seed)
        self._under_way.add(draw.number)
        self.engine.begin(draw.number, Request(prompt, sampling, 0, sampling.n), version)
        if self.has_thread and self._receiver is None:
            self._receiver = threading.Thread(target=self._receive_all, name="rollouts", daemon=True)
            self._receiver.start()

    def _drop_stale(self) -> None:
        for draw in self.window.draws.values():
            if not draw.is_there:
                self.window.note_start(draw.number, self.engine.find_start(draw.number))
        for number in self.window.find_stale():
            self.engine.give_up(number)
            self._under_way.discard(number)
            self._there.pop(number, None)
            self._unwritten.discard(number)
            self._used.append(number)
            self.window.drop(number)

    def _wait_for_groups(self, version: PolicyVersion) -> list[int]:
        while True:
            if self._error is not None:
                raise self._error
            self._refill(version)
            chosen = self.window.choose()
            if chosen is not None:
                return chosen
            if self.has_thread:
                self._changed.wait()
            else:
                self.receive()

    # groups that arrive -------------------------------------------------------------------------------------

    def receive(self) -> bool:
        """Waits for one group, grades and keeps it; False: no more come."""
        arrival = self.engine.next()
        if arrival is None:
            return False
        number, group = arrival
        (graded,) = self.inner.graded.grade([group], self._step, {"reward": 0.0})
        with self._changed:
            if number in self.window.draws and number in self._under_way:
                self._under_way.discard(number)
                self._there[number] = graded
                self.window.note_arrival(number, graded)
                self._write(number)
            self._changed.notify_all()
        return True

    def _receive_all(self) -> None:
        try:
            while self.receive():
                pass
        except _ERRORS as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _write(self, number: int) -> None:
        """Puts a group on the disk, once the digests of its weights are known."""
        group = self._there[number]
        versions = {span.version for each in group.completions for span in each.versions}
        if versions <= self._digests.keys():
            self.waiting.write(number, group, {version: self._digests[version] for version in versions})
            self._unwritten.discard(number)
        else:
            self._unwritten.add(number)

    # what the loop calls ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """The weights may change at any time. Raises what ended the workers."""
        with self._changed:
            if self._error is not None:
                raise self._error

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        """Held-out requests go before all others, to workers that hold ``version``; nobody pushes another
        one meanwhile.
        """
        return self.inner.evaluate(prompts, sampling, version, occasion)

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None:
        """What adapts to a step's numbers does so for the groups that are drawn later."""
        self.inner.observe(metrics, entropy, sampled)

    def release_memory(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """It does not depend on what has arrived: that is on the disk."""
        with self._changed:
            state = {"window": self.window.state_dict(), "ahead_of_draws": list(self._ahead)}
            return {**self.inner.state_dict(), **state, "digests": sorted(self._digests.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._changed:
            for number in sorted(self._under_way):
                self.engine.give_up(number)
            self._under_way.clear()
            self._there.clear()
            self._unwritten.clear()
            self._used.clear()
            self._has_begun = False
            self.window.load_state_dict(state["window"])
            self._ahead[:] = state["ahead_of_draws"]
            self._digests = dict(state["digests"])
            self.inner.load_state_dict(state)

    def close(self) -> None:
        self.engine.close()
        if self._receiver is not None:
            self._receiver.join()
        if not self.window.draws:
            self.waiting.remove(self.waiting.numbers())
        self.inner.close()
