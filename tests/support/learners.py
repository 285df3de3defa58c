"""Learners of a table of next-token log-probs whose workers sample ahead of them, with what they keep from
one process to the next: a checkpoint after every step, and the journal.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.checkpoint.journal import Journal, WaitingGroups
from rltrain.checkpoint.run_folder import RunFolder, write_atomic
from rltrain.process import ALONE
from rltrain.reward.score import Score
from rltrain.rollout.colocated import ColocatedRollouts, GradedSampler
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.pool.homes import Connector, RemoteHome
from rltrain.rollout.source import Rollouts
from rltrain.rollout.window import Window
from rltrain.rollout.worker.client import WorkerClient
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.train.bounded import BoundedRollouts
from rltrain.train.journaled import JournaledRollouts
from rltrain.train.lagged import LaggedRollouts
from rltrain.train.sampled_run import KeptWeights
from rltrain.types.samples import Completion, Prompt, RolloutGroup, Sampling, ScoredGroup
from support.fake_pool import SECRET, make_weights, wait_until
from support.pool_runs import PROMPTS, SAMPLES, Pool, digest, update

__all__ = [
    "GO",
    "SAMPLING",
    "Learner",
    "TableSource",
    "colocated",
    "do_nothing",
    "error_of",
    "learn_here",
    "read_saved",
]

TOKENS = 12
GO = "go"
SAMPLING = Sampling(SAMPLES, 1.0, TOKENS, 3)


class Grader:
    def score(self, groups: Any) -> list[list[Score]]:
        return [[Score(0.0)] * len(group.completions) for group in groups]


class Order:
    def next(self) -> list[int]:
        return list(range(len(PROMPTS)))

    def observe(self, metrics: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def do_nothing() -> None: ...


def colocated(pool: Pool, sync: Sync) -> ColocatedRollouts:
    graded = GradedSampler(pool.engine, Grader(), ALONE)
    return ColocatedRollouts(
        graded, Order(), PROMPTS, SAMPLING, len(PROMPTS), 1, sync.verify, do_nothing, do_nothing
    )


class Learner:
    """A policy gradient on a table, whose weights of every version are kept."""

    def __init__(self, pool: Pool) -> None:
        self.weights = make_weights(3)
        self.past: dict[int, dict[str, Tensor]] = {}
        self.sync = Sync([pool.engine], {}, sample=4, full_every=1, seed=0)

    def push(self, version: int, *, dies: bool = False) -> None:
        """dies: the process ends when a part of the weights is sent."""
        self.past[version] = {name: weight.clone() for name, weight in self.weights.items()}

        def stream(dtype: Any) -> Iterator[tuple[str, Tensor]]:
            for name, weight in self.weights.items():
                yield name, weight
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

        self.sync.push(KeptWeights(stream), version, expect_change=version > 0)

    def digest(self) -> str:
        return digest(self.weights)


def error_of(last: int, completion: Completion, past: Mapping[int, Mapping[str, Tensor]]) -> float:
    """The largest difference, in nats, of a log-prob from that of the version which the token names."""
    logits = {version: (each["table"] + each["bias"]).double() for version, each in past.items()}
    worst = 0.0
    for span in completion.versions:
        for place in range(span.start, span.stop):
            row = torch.log_softmax(logits[span.version][last], 0)
            last = completion.token_ids[place]
            worst = max(worst, abs(float(row[last]) - completion.logprobs[place]))
    return worst


@dataclass
class TableSource:
    """Implements ``PromptedSource`` on the engine over a pool. at_sampling: called before each step's."""

    engine: Any
    sync: Sync
    seed: int
    at_sampling: Callable[[int], None] = lambda step: None
    asked: list[tuple[int, int]] = field(default_factory=list)
    prompts: Sequence[Prompt] = tuple(PROMPTS)

    def take(self, step: int, version: int) -> Rollouts:
        self.asked.append((step, version))
        self.at_sampling(step)
        sampling = Sampling(SAMPLES, 1.0, TOKENS, stable_hash(self.seed, "rollout", step))
        groups = tuple(
            ScoredGroup(group.group, group.prompt, group.completions, (Score(0.0),) * SAMPLES)
            for group in sample_groups(self.engine, self.prompts, sampling, version)
        )
        self.sync.verify()
        return Rollouts(groups, len(groups), 1, (), {})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        raise NotImplementedError

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None: ...

    def settle(self) -> None: ...

    def release_memory(self) -> None: ...

    def close(self) -> None: ...


def learn_here(
    folder: Path,
    urls: Sequence[str],
    schedule: str,
    steps: int,
    oldest: int = 2,
    dies_in_push: int | None = None,
    waits_after: int | None = None,
) -> None:
    """Trains in this process, from the checkpoint in ``folder`` on where there is one. schedule: "lag" or
    "bounded", of ``oldest`` versions. dies_in_push: of this step, the process's end. waits_after: this step,
    until the file ``GO`` is in ``folder``.
    """
    torch.set_num_threads(1)
    connector = Connector(lambda url, token: WorkerClient(url, token), lambda info, url: None)
    homes: Any = {f"worker {place}": RemoteHome(url, SECRET, connector) for place, url in enumerate(urls)}
    pool = Pool(homes, None, **({"update": "in_flight"} if schedule == "bounded" else {}))
    learner = Learner(pool)
    run = RunFolder(folder)
    inner: Any
    if schedule == "lag":
        table = TableSource(pool.engine, learner.sync, 3)
        inner = JournaledRollouts(table, Journal(run), ALONE, learner.digest)
        source: Any = LaggedRollouts(inner, oldest, steps, overlaps=True)
    else:
        inner = BoundedRollouts(
            colocated(pool, learner.sync),
            pool.engine.run_freely(),
            Window(oldest, len(PROMPTS), waits=True),
            WaitingGroups(run),
            steps,
            learner.digest,
        )
        source = JournaledRollouts(inner, Journal(run), ALONE, learner.digest)

    done = 0
    if saved := read_saved(folder):
        done, learner.weights, learner.past = saved["step"], saved["weights"], saved["past"]
        source.load_state_dict(saved["state"])
    learner.push(done)
    for step in range(done + 1, steps + 1):
        groups = source.take(step, step - 1).groups
        update(learner.weights, [RolloutGroup(each.group, each.prompt, each.completions) for each in groups])
        source.settle()
        learner.push(step, dies=step == dies_in_push)
        state = {"step": step, "weights": learner.weights, "past": learner.past}
        _save(folder, {**state, "state": source.state_dict()})
        if step == waits_after:
            wait_until((folder / GO).exists)
    source.close()
    pool.engine.close()


def _save(folder: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(folder / "checkpoint.pt", buffer.getvalue())


def read_saved(folder: Path) -> dict[str, Any] | None:
    """The checkpoint; None: there is none."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else None
