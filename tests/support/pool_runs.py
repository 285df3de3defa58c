"""Runs of a policy that is a table of next-token log-probs, over a pool of fake workers."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rltrain.rollout.engines.vllm_pool import VllmPool
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.packed import pack_groups, unpack_sampled
from rltrain.rollout.pool.members import MemberState
from rltrain.rollout.pool.pool import PoolRules, WorkerPool
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.types.samples import Prompt, RolloutGroup, Sampling
from support.fake_pool import FakeHome, Ranks, make_engine, make_weights, wait_until
from support.fake_server import VOCABULARY

PROMPTS = [Prompt(f"p{place}", (20 + place, 40 + place), "") for place in range(6)]
STEPS = 3
SAMPLES = 4


@dataclass
class Outcome:
    """What a run trained on, and what it came to."""

    weights: str
    samples: list[tuple[int, ...]] = field(default_factory=list)


class Pool:
    """The workers of a test and the engine over them."""

    def __init__(
        self, homes: dict[str, FakeHome], ranks: Mapping[str, Any] | None = None, **rules: Any
    ) -> None:
        self.homes = homes
        self.lines: list[str] = []
        settings = {"patience": 60.0, "alive": 0.5, "poll": 0.02, "retry": 0.05, "busy": 0.05} | rules
        self.engine, self.pool = make_engine(
            homes, PoolRules(VOCABULARY, **settings), self.lines.append, **(ranks or {})
        )

    @property
    def members(self) -> dict[str, Any]:
        return self.pool.members

    def state(self, name: str) -> MemberState:
        return self.pool.members[name].state

    def run(self, work: Any) -> Any:
        assert self.engine.loop is not None
        return self.engine.loop.run(work).result()

    def wait_for_all(self) -> None:
        usable = (MemberState.ATTACHED, MemberState.SERVING)
        wait_until(lambda: all(self.state(name) in usable for name in self.homes))


@contextlib.contextmanager
def open_pool(count: int, alive_seconds: float = 5.0, **rules: Any) -> Iterator[Pool]:
    homes = {f"worker {place}": FakeHome(alive_seconds) for place in range(count)}
    pool = Pool(homes, **rules)
    try:
        yield pool
    finally:
        pool.engine.close()


def train(pool: Pool, seed: int, at_step: Callable[[int], None] = lambda step: None) -> Outcome:
    return train_engine(pool.engine, seed, at_step)


def train_engine(
    engine: VllmPool,
    seed: int,
    at_step: Callable[[int], None] = lambda step: None,
    rank: int = 0,
    ranks: Ranks | None = None,
) -> Outcome:
    """A policy gradient on the table: tokens of completions with large ids become likelier."""
    weights = make_weights(seed)
    sync = Sync([engine], {}, sample=4, full_every=1, seed=0)
    sync.push(lambda dtype: weights.items(), 0, expect_change=False)
    samples: list[tuple[int, ...]] = []
    for step in range(1, STEPS + 1):
        at_step(step)
        sampling = Sampling(SAMPLES, 1.0, 12, stable_hash(seed, "rollout", step))
        share = PROMPTS if ranks is None else PROMPTS[rank::2]
        groups = sample_groups(engine, share, sampling, step - 1)
        if ranks is not None:
            parts = ranks.gather(rank, [pack_groups(groups, {})])
            groups = [group for part in parts for group in unpack_sampled(part, {})]
            groups.sort(key=lambda group: group.prompt.id)
        sync.verify()
        samples += [completion.token_ids for group in groups for completion in group.completions]
        update(weights, groups)
        sync.push(lambda dtype: weights.items(), step, expect_change=True)
    return Outcome(digest(weights), samples)


def update(weights: dict[str, Tensor], groups: list[RolloutGroup]) -> None:
    for group in groups:
        scores = [sum(completion.token_ids) / VOCABULARY for completion in group.completions]
        mean = sum(scores) / SAMPLES
        for score, completion in zip(scores, group.completions, strict=True):
            last = group.prompt.token_ids[-1]
            for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
                step = 0.01 * (score - mean) * (1 + logprob / 10)
                weights["table"][last, token] += step
                weights["bias"][token] += step / 10
                last = token


def digest(weights: dict[str, Tensor]) -> str:
    sums = hashlib.sha256()
    for name in sorted(weights):
        sums.update(weights[name].numpy().tobytes())
    return sums.hexdigest()


def require_conserved(pool: WorkerPool) -> None:
    """Every request was answered once, or its samples were asked for again."""
    wait_until(lambda: pool.counts.asked == pool.counts.answered + pool.counts.returned)
    assert all(not member.leases for member in (*pool.members.values(), *pool.holders()))
