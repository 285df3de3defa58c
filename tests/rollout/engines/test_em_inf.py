"""EM-INF: logits sharpened at test time, against torch's own optimisers and autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rltrain.cli.evaluate import generate_command
from rltrain.config.load import recipe_of_model
from rltrain.errors import UserError
from rltrain.rollout.engines.transformers.em_inf import minimise_entropy
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.rollout.groups import sample_groups
from rltrain.types.samples import Prompt, Sampling


def entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def by_autograd(
    row: Tensor, threshold: float, lr: float, steps: int, kl_weight: float, kind: type[torch.optim.Optimizer]
) -> Tensor:
    leaf, start = row.clone().requires_grad_(), row.softmax(-1)
    optimizer = kind([leaf], lr=lr)  # type: ignore[call-arg]
    for _ in range(steps):
        value = entropy(leaf)
        if value < threshold:
            break
        optimizer.zero_grad()
        (value + kl_weight * (start * (start.log() - leaf.log_softmax(-1))).sum()).backward()
        optimizer.step()
    return leaf.detach()


@pytest.mark.parametrize(
    ("optimizer", "kind", "lr"), [("adam", torch.optim.Adam, 0.1), ("sgd", torch.optim.SGD, 2.0)]
)
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_each_row_goes_its_own_way_as_torchs_optimizer_takes_it(
    optimizer: str, kind: type, lr: float, kl_weight: float
) -> None:
    # rows of very different entropy: some stop at once, some in between, some not at all within 15 steps
    rows = (
        torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.1, 1.0, 2.0, 3.0, 5.0, 20.0])[:, None]
    )
    sharpened = minimise_entropy(
        rows, threshold=0.8, lr=lr, max_steps=15, kl_weight=kl_weight, optimizer=optimizer
    )  # type: ignore[arg-type]
    expected = torch.stack([by_autograd(row, 0.8, lr, 15, kl_weight, kind) for row in rows])
    assert_close(sharpened, expected, rtol=1e-4, atol=2e-4)  # Adam divides by the size of gradients near 0


def test_entropy_falls_below_the_threshold_and_the_favourite_stays() -> None:
    rows = torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
    sharpened = minimise_entropy(rows, threshold=0.3, max_steps=200)
    assert (entropy(sharpened) < 0.3).all() and (entropy(rows) > 1).all()
    assert (sharpened.argmax(-1) == rows.argmax(-1)).all()


def test_certain_rows_impossible_tokens_and_zero_steps_are_left_alone() -> None:
    certain = torch.tensor([[9.0, 0.0, 0.0]])
    assert_close(minimise_entropy(certain), certain)
    assert_close(minimise_entropy(torch.zeros(1, 3), max_steps=0), torch.zeros(1, 3))
    sharpened = minimise_entropy(torch.tensor([[0.5, 0.0, -torch.inf]]))
    assert sharpened.softmax(-1).isfinite().all() and sharpened.softmax(-1)[0, 2] == 0


def test_what_is_given_is_not_changed() -> None:
    rows = torch.randn(2, 5)
    kept = rows.clone()
    minimise_entropy(rows)
    assert torch.equal(rows, kept)


@pytest.mark.parametrize("change", [{"threshold": 0.0}, {"lr": 0.0}, {"max_steps": -1}, {"kl_weight": -1.0}])
def test_bad_arguments_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        minimise_entropy(torch.zeros(1, 3), **change)  # type: ignore[arg-type]


def test_the_engine_draws_from_the_sharpened_distribution_and_says_so(random_model: str) -> None:
    # an untrained model is near uniform, log-probs about -ln V; with 200 nats of room nothing changes, below
    # 2.5 nats tokens are likelier
    engine = TransformersEngine(
        random_model, stop_token_ids={1}, pad_token_id=0, decode=lambda ids: "", max_rows=8
    )
    engine.load(AutoModelForCausalLM.from_pretrained(random_model).named_parameters(), 0)
    plain = Sampling(n=4, temperature=1.0, max_tokens=6, seed=0)

    def logprobs(sampling: Sampling) -> list[float]:
        (group,) = sample_groups(engine, [Prompt("p", (5, 6, 7), "")], sampling, 0)
        return [value for completion in group.completions for value in completion.logprobs]

    assert logprobs(dataclasses.replace(plain, sharpen_below=200.0)) == logprobs(plain)
    before, after = logprobs(plain), logprobs(dataclasses.replace(plain, sharpen_below=2.5))
    assert sum(after) / len(after) > sum(before) / len(before) + 0.5


@pytest.mark.parametrize(("engine", "nats"), [("vllm", 0.3), ("transformers", 0.0)])
def test_the_command_refuses_what_cannot_be_had(random_model: str, engine: str, nats: float) -> None:
    recipe = recipe_of_model(random_model, engine=engine, max_prompt_tokens=8, max_tokens=4, seed=0)
    with pytest.raises(UserError, match=rf"--em-inf {nats:g} with engine {engine}"):
        generate_command(recipe, ["1+1="], 1, 1.0, nats)


def test_the_command_generates(random_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of_model(random_model, engine="transformers", max_prompt_tokens=8, max_tokens=4, seed=0)
    assert generate_command(recipe, ["1+1="], 2, 1.0, 0.3) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3
