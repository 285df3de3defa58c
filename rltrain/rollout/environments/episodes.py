"""Completions that are episodes: the policy writes a turn, the environment answers, and so on.

The row of an episode is the prompt, then turn 1, observation 1, turn 2 and so on. It contains the policy's
tokens exactly as they were sampled, and an observation is tokenised once, when it enters the row: the prompt
of a turn is the row so far, and no text is ever decoded and tokenised again. All episodes of a call take
their turns in lockstep, with a single call of the sampler per turn.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rltrain.protocols import Sampler
from rltrain.reward.score import Episode
from rltrain.rollout.environments import Step, Task
from rltrain.rollout.environments.pool import Failure, Opening
from rltrain.seeds import stable_hash
from rltrain.types.samples import Answer, Completion, Finish, PolicyVersion, Prompt, Request, Sampling, Span

__all__ = ["Dialogue", "EpisodePlayer", "Pool"]


class Dialogue(Protocol):
    """Turns an environment's text into tokens (``data/chat.py``)."""

    def opening(self, text: str) -> tuple[str, tuple[int, ...]]:
        """The prompt of an environment's question ``text``: (its text, its tokens)."""
        ...

    def observation(self, text: str, last: int) -> tuple[int, ...]:
        """The tokens between a turn that ended with token ``last`` and the next turn: the end of the turn,
        the message ``text``, and the start of the next turn.
        """
        ...


class Pool(Protocol):
    """``EnvironmentPool``."""

    def begin(self, tasks: Sequence[tuple[Task, int]]) -> None: ...

    def step(self, texts: Mapping[int, str]) -> None: ...

    def answers(self) -> Iterator[tuple[int, Opening | Step | Failure]]: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Row:
    """An episode in progress."""

    task: int  # position of its request
    sample: int  # place in its group
    sampling: Sampling
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)  # all turns and observations
    logprobs: list[float] = field(default_factory=list)  # 0 at the environment's tokens
    turns: list[tuple[int, int]] = field(default_factory=list)  # (first token, end) of each turn
    texts: list[str] = field(default_factory=list)
    reward: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    finish: Finish | None = None  # None while the episode goes on

    def add_turn(self, turn: Completion) -> None:
        """Appends the policy's next turn, exactly as it was sampled."""
        self.turns.append((len(self.tokens), len(self.tokens) + len(turn.token_ids)))
        self.tokens += turn.token_ids
        self.logprobs += turn.logprobs
        self.texts.append(turn.text)

    def add_observation(self, observation: Sequence[int]) -> None:
        self.tokens += observation
        self.logprobs += [0.0] * len(observation)

    def fail(self, failure: Failure) -> None:
        self.failure = f"environment_{failure.reason}: {failure.message}"
        self.finish = "aborted"

    @property
    def turn_prompt(self) -> Prompt:
        """The prompt of the next turn: the row so far."""
        return Prompt(f"{self.prompt.id}/{self.sample}", (*self.prompt.token_ids, *self.tokens), "")


class EpisodePlayer:
    """Implements ``Sampler`` with another sampler, ``sampler``, which samples the turns of each episode.

    ``Sampling.max_tokens`` limits a whole episode, observations included, and ``turn_tokens`` a turn. An
    episode ends when the environment is done (finish: that of the last turn), or unfinished ("length") after
    ``max_turns``, or where an observation and another turn of ``turn_tokens`` would not fit. decode: token
    ids to text without special tokens, for transcripts. filler: the single token of a completion whose
    environment failed before the policy wrote anything. Closing the player closes the pool, but not
    ``sampler``.
    """

    def __init__(
        self,
        sampler: Sampler,
        pool: Pool,
        dialogue: Dialogue,
        *,
        decode: Callable[[Sequence[int]], str],
        filler: int,
        max_turns: int,
        turn_tokens: int,
    ) -> None:
        self._sampler = sampler
        self._pool = pool
        self._dialogue = dialogue
        self._decode = decode
        self._filler = filler
        self._max_turns = max_turns
        self._turn_tokens = turn_tokens

    @property
    def name(self) -> str:
        return self._sampler.name

    def close(self) -> None:
        self._pool.close()

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """See ``Sampler.sample``. Each completion is an episode, and an answer's prompt is the prompt of its
        episodes.

        All episodes take their turns in lockstep, so all answers come at the end. A turn's seed derives from
        the seed of the sampling, the prompt, the sample and the turn.
        """
        rows = [
            _Row(task, sample, request.sampling, request.prompt)
            for task, request in enumerate(requests)
            for sample in range(request.first, request.first + request.count)
        ]
        prompts = self._begin(rows, requests)
        for turn in range(self._max_turns):
            playing = [place for place, row in enumerate(rows) if row.finish is None]
            if not playing:
                break
            if turn == 0:
                sampled = self._first_turn([rows[place] for place in playing], requests, prompts, policy)
            else:
                sampled = self._next_turn([rows[place] for place in playing], turn, policy)
            for place, completion in zip(playing, sampled, strict=True):
                rows[place].add_turn(completion)

            self._pool.step({place: rows[place].texts[-1] for place in playing})
            outcomes = dict(self._pool.answers())
            is_last = turn + 1 == self._max_turns
            for place, completion in zip(playing, sampled, strict=True):
                self._apply_outcome(rows[place], outcomes[place], completion.finish, is_last=is_last)
        self._pool.end()

        episodes = iter([self._completion(row, policy) for row in rows])
        return iter(
            [
                Answer(task, prompts[task], tuple(itertools.islice(episodes, request.count)))
                for task, request in enumerate(requests)
            ]
        )

    def _begin(self, rows: Sequence[_Row], requests: Sequence[Request]) -> list[Prompt]:
        """Starts every episode; returns the prompt of each request."""
        tasks = [
            Task(request.prompt.id, request.prompt.text, dict(request.prompt.columns)) for request in requests
        ]
        seeds = [stable_hash(row.sampling.seed, row.prompt.id, row.sample, "environment") for row in rows]
        self._pool.begin([(tasks[row.task], seed) for row, seed in zip(rows, seeds, strict=True)])
        openings = dict(self._pool.answers())
        texts: dict[int, str | None] = {}  # by task; None: the task's own prompt
        for place, row in enumerate(rows):
            opening = openings[place]
            if isinstance(opening, Failure):
                row.fail(opening)
                continue
            assert isinstance(opening, Opening)
            if texts.setdefault(row.task, opening.text) != opening.text:
                problem = "the environment asks samples of one task different things"
                row.fail(Failure("error", f"{problem}; reset must depend on the task alone"))

        prompts = [
            self._opening_prompt(request.prompt, texts.get(task)) for task, request in enumerate(requests)
        ]
        for row in rows:
            row.prompt = prompts[row.task]
        return prompts

    def _opening_prompt(self, prompt: Prompt, opening: str | None) -> Prompt:
        if opening is None:
            return prompt
        text, token_ids = self._dialogue.opening(opening)
        return dataclasses.replace(prompt, text=text, token_ids=token_ids, messages=None)

    def _first_turn(
        self,
        playing: Sequence[_Row],
        requests: Sequence[Request],
        prompts: Sequence[Prompt],
        policy: PolicyVersion,
    ) -> list[Completion]:
        """Samples all first turns of a request at once, so that they share its prefill."""
        tasks = sorted({row.task for row in playing})
        first: list[Request] = []
        for task in tasks:
            sampling = requests[task].sampling
            turn = dataclasses.replace(sampling, max_tokens=min(self._turn_tokens, sampling.max_tokens))
            first.append(dataclasses.replace(requests[task], prompt=prompts[task], sampling=turn))

        sampled: dict[int, tuple[Completion, ...]] = {}
        for answer in self._sampler.sample(first, policy):
            sampled[tasks[answer.request]] = answer.completions
        return [sampled[row.task][row.sample - requests[row.task].first] for row in playing]

    def _next_turn(self, playing: Sequence[_Row], turn: int, policy: PolicyVersion) -> list[Completion]:
        """Continues every episode from its own tokens."""
        later: list[Request] = []
        for row in playing:
            seed = stable_hash(row.sampling.seed, "turn", turn)
            sampling = dataclasses.replace(row.sampling, n=1, max_tokens=self._turn_tokens, seed=seed)
            later.append(Request(row.turn_prompt, sampling, 0, 1))

        sampled = {answer.request: answer.completions[0] for answer in self._sampler.sample(later, policy)}
        return [sampled[place] for place in range(len(playing))]

    def _apply_outcome(
        self, row: _Row, outcome: Opening | Step | Failure, finish: Finish, *, is_last: bool
    ) -> None:
        """Adds the environment's answer to the row, or ends the episode."""
        if isinstance(outcome, Failure):
            row.fail(outcome)
            return
        assert isinstance(outcome, Step)
        row.reward += outcome.reward
        row.parts = outcome.parts
        if outcome.done:
            row.finish = finish
            return
        observation = () if is_last else self._dialogue.observation(outcome.observation, row.tokens[-1])
        if is_last or len(row.tokens) + len(observation) + self._turn_tokens > row.sampling.max_tokens:
            row.finish = "length"
        else:
            row.add_observation(observation)

    def _completion(self, row: _Row, policy: PolicyVersion) -> Completion:
        assert row.finish is not None
        source = row.sampling.source
        episode = Episode(row.reward, row.parts, tuple(row.texts), row.failure)
        if not row.tokens:
            return Completion(
                (self._filler,), (0.0,), "aborted", "", (Span(0, 1, policy),), source, episode=episode
            )
        return Completion(
            tuple(row.tokens),
            tuple(row.logprobs),
            row.finish,
            self._decode(row.tokens),
            (Span(0, len(row.tokens), policy),),
            source,
            tuple(row.turns),
            episode,
        )
