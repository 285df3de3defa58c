"""Completions that are episodes: the policy writes a turn, the environment answers, and so on. Tokens in, tokens out.

A row of an episode is the prompt, then turn 1, observation 1, turn 2 and so on. The policy's own tokens stand in it exactly as they were
sampled and an observation is tokenised once, when it is put in: the prompt of a turn is the row so far, and nothing is ever decoded
and tokenised again. All episodes of a call take their turns in lockstep, one ``generate`` of the engine per turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rltrain.protocols import EngineState, RolloutEngine
from rltrain.rollout.environment_pool import Failure
from rltrain.rollout.environments import Step, Task
from rltrain.seeds import stable_hash
from rltrain.types import Completion, Episode, Finish, Prompt, RolloutGroup, Sampling

__all__ = ["Dialogue", "EpisodeEngine", "Pool"]


class Dialogue(Protocol):
    """How an environment's text becomes tokens (``data/chat.py``)."""

    def opening(self, text: str) -> tuple[str, tuple[int, ...]]:
        """A prompt made of what the environment asks: its text, and its tokens."""
        ...

    def observation(self, text: str, last: int) -> tuple[int, ...]:
        """What stands between a turn that ended with token ``last`` and the next: its end, the message, the start of the next."""
        ...


class Pool(Protocol):
    """``EnvironmentPool``."""

    def reset(self, tasks: Sequence[tuple[Task, int]]) -> Sequence[str | Failure | None]: ...

    def step(self, texts: Mapping[int, str]) -> Mapping[int, Step | Failure]: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Row:
    """One episode being played."""

    number: int  # in the pool
    task: int  # position of its prompt
    sample: int
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)  # all turns and observations
    logprobs: list[float] = field(default_factory=list)  # 0 where the environment wrote
    turns: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reward: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    finish: Finish | None = None  # None: still playing

    def write(self, turn: Completion) -> None:
        """The policy's next turn, exactly as it was sampled."""
        self.turns.append((len(self.tokens), len(self.tokens) + len(turn.token_ids)))
        self.tokens += turn.token_ids
        self.logprobs += turn.logprobs
        self.texts.append(turn.text)

    def read(self, observation: Sequence[int]) -> None:
        self.tokens += observation
        self.logprobs += [0.0] * len(observation)

    def fail(self, failure: Failure) -> None:
        self.failure, self.finish = f"environment_{failure.reason}: {failure.message}", "aborted"

    @property
    def so_far(self) -> Prompt:
        """What the policy reads before its next turn."""
        return Prompt(f"{self.prompt.id}/{self.sample}", (*self.prompt.token_ids, *self.tokens), "")


class EpisodeEngine:
    """``engine`` whose completions are episodes; otherwise the engine itself. Implements ``RolloutEngine``.

    In ``generate``, ``Sampling.max_tokens`` bounds a whole episode, observations included, and ``turn_tokens`` one turn. An episode ends
    with the environment (finish: as its last turn's), or unfinished ("length") after ``max_turns``, or where an observation and
    another turn of ``turn_tokens`` would not fit. decode: token ids to text without special tokens, for transcripts. filler: the
    token that stands for a completion whose environment failed before the policy wrote anything.
    """

    state: EngineState  # these four are the engine's own, by __getattr__
    version: int | None
    dtype: torch.dtype
    fingerprint_rtol: float

    def __init__(
        self,
        engine: RolloutEngine,
        pool: Pool,
        dialogue: Dialogue,
        *,
        decode: Callable[[Sequence[int]], str],
        filler: int,
        max_turns: int,
        turn_tokens: int,
    ) -> None:
        self._engine, self._pool, self._dialogue, self._decode, self._filler = engine, pool, dialogue, decode, filler
        self._max_turns, self._turn_tokens = max_turns, turn_tokens

    def __getattr__(self, name: str) -> Any:
        """State, version and whatever else the engine has."""
        return getattr(self._engine, name)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._engine.load(weights, version)

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, float]:
        return self._engine.fingerprint(names)

    def sleep(self) -> None:
        self._engine.sleep()

    def wake(self) -> None:
        self._engine.wake()

    def close(self) -> None:
        self._pool.close()
        self._engine.close()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[RolloutGroup]:
        """See ``RolloutEngine.generate``. A group's prompt is what its episodes were asked. Seeds: (sampling, prompt, sample, turn)."""
        rows = [
            _Row(index * sampling.n + sample, index, sample, prompt) for index, prompt in enumerate(prompts) for sample in range(sampling.n)
        ]
        asked = self._begin(rows, prompts, sampling)
        for turn in range(self._max_turns):
            playing = [row for row in rows if row.finish is None]
            if not playing:
                break
            written = self._first_turn(playing, asked, sampling, version) if turn == 0 else self._turn(playing, turn, sampling, version)
            for row, completion in zip(playing, written, strict=True):
                row.write(completion)
            answers = self._pool.step({row.number: row.texts[-1] for row in playing})
            for row, completion in zip(playing, written, strict=True):
                self._take(row, answers[row.number], completion.finish, sampling, last=turn + 1 == self._max_turns)
        self._pool.end()
        return [
            RolloutGroup(index, prompt, tuple(self._completion(row, sampling, version) for row in rows if row.task == index))
            for index, prompt in enumerate(asked)
        ]

    def _begin(self, rows: Sequence[_Row], prompts: Sequence[Prompt], sampling: Sampling) -> list[Prompt]:
        """Start every episode; the prompts they begin with, one per task."""
        tasks = [Task(prompt.id, prompt.text, dict(prompt.columns)) for prompt in prompts]
        seeds = [stable_hash(sampling.seed, prompts[row.task].id, row.sample, "environment") for row in rows]
        openings = self._pool.reset([(tasks[row.task], seed) for row, seed in zip(rows, seeds, strict=True)])
        asked: dict[int, str | None] = {}
        for row, opening in zip(rows, openings, strict=True):
            if isinstance(opening, Failure):
                row.fail(opening)
            elif asked.setdefault(row.task, opening) != opening:
                row.fail(Failure("error", "the environment asks samples of one task different things; reset must depend on the task alone"))
        found = [self._asked(prompt, asked.get(index)) for index, prompt in enumerate(prompts)]
        for row in rows:
            row.prompt = found[row.task]
        return found

    def _asked(self, prompt: Prompt, opening: str | None) -> Prompt:
        if opening is None:
            return prompt
        text, token_ids = self._dialogue.opening(opening)
        return dataclasses.replace(prompt, text=text, token_ids=token_ids, messages=None)

    def _first_turn(self, playing: Sequence[_Row], asked: Sequence[Prompt], sampling: Sampling, version: int) -> list[Completion]:
        """All samples of a prompt from one request, as without an environment: they share its prefill."""
        tasks = sorted({row.task for row in playing})
        first = dataclasses.replace(sampling, max_tokens=min(self._turn_tokens, sampling.max_tokens))
        groups = self._engine.generate([asked[task] for task in tasks], first, version)
        written = {task: group.completions for task, group in zip(tasks, groups, strict=True)}
        return [written[row.task][row.sample] for row in playing]

    def _turn(self, playing: Sequence[_Row], turn: int, sampling: Sampling, version: int) -> list[Completion]:
        """Every episode goes on from its own tokens."""
        seed = stable_hash(sampling.seed, "turn", turn)
        later = dataclasses.replace(sampling, n=1, max_tokens=self._turn_tokens, seed=seed)
        return [group.completions[0] for group in self._engine.generate([row.so_far for row in playing], later, version)]

    def _take(self, row: _Row, answer: Step | Failure, finish: Finish, sampling: Sampling, *, last: bool) -> None:
        """What the environment made of the turn, and whether there is another."""
        if isinstance(answer, Failure):
            row.fail(answer)
            return
        row.reward += answer.reward
        row.parts = answer.parts
        if answer.done:
            row.finish = finish
            return
        observation = () if last else self._dialogue.observation(answer.observation, row.tokens[-1])
        if last or len(row.tokens) + len(observation) + self._turn_tokens > sampling.max_tokens:
            row.finish = "length"
        else:
            row.read(observation)

    def _completion(self, row: _Row, sampling: Sampling, version: int) -> Completion:
        assert row.finish is not None
        episode = Episode(row.reward, row.parts, tuple(row.texts), row.failure)
        if not row.tokens:
            return Completion((self._filler,), (0.0,), "aborted", "", version, sampling.arm, episode=episode)
        text = self._decode(row.tokens)
        return Completion(tuple(row.tokens), tuple(row.logprobs), row.finish, text, version, sampling.arm, tuple(row.turns), episode)
