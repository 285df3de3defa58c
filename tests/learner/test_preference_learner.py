"""Updates from judged examples compared with plain PyTorch, and equal updates in every layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rltrain.config.schema import Degree, LearnerCore, Model, Optimizer
from rltrain.learner.degree_head import DegradedRows
from rltrain.learner.passes import last_states
from rltrain.learner.preference_learner import PreferenceLearner, lengths_of, pair_rows
from rltrain.learner.shared_prompt import build_shared
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.types.policy import TokenRows
from rltrain.types.preference import CompletionFacts, LabelBatch, PairBatch

N = 9
pytestmark = pytest.mark.filterwarnings("ignore:Seems like")  # gradients_of steps by itself


def learner_of(path: str, *, lr: float = 1e-2, **settings: Any) -> PreferenceLearner:
    optimizer = Optimizer(lr=lr, max_grad_norm=1e9)
    return PreferenceLearner(
        Model(path=path), LearnerCore(optimizer=optimizer, **settings), total_updates=10, seed=0
    )


def draw(lengths: Tensor, g: torch.Generator) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(torch.randint(5, 60, (int(n),), generator=g).tolist()) for n in lengths)


def pairs(seed: int = 0) -> tuple[TokenRows, PairBatch]:
    """Nine pairs with prompts of 1 to 9 tokens and completions of 1 to 7; two pairs share a prompt."""
    g = torch.Generator().manual_seed(seed)
    prompts = draw(torch.arange(1, N + 1), g)
    prompts = (*prompts[:-1], prompts[0])
    chosen, rejected = (draw(torch.randint(1, 8, (N,), generator=g), g) for _ in range(2))
    rows = pair_rows(prompts, chosen, rejected)
    lengths = lengths_of(rows)
    ref = -3.0 * torch.rand(2 * N, generator=g)
    facts = [
        CompletionFacts(lengths[half], ref_logp=lengths[half] * ref[half])
        for half in (slice(0, N), slice(N, None))
    ]
    return rows, PairBatch(
        facts[0], facts[1], torch.tensor([*range(N - 1), 0]), margin=torch.rand(N, generator=g)
    )


def labels() -> tuple[TokenRows, LabelBatch, TokenRows]:
    rows, batch = pairs()
    g = torch.Generator().manual_seed(5)
    labelled = TokenRows(rows.prompts[:N], rows.completions[:N])
    others = TokenRows(rows.prompts[:N], (*rows.completions[1:N], rows.completions[0]))
    facts = CompletionFacts(
        lengths_of(others), ref_logp=-9.0 * lengths_of(others) - torch.rand(N, generator=g)
    )
    label = (torch.arange(N) % 3 == 0).float()
    return labelled, LabelBatch(batch.chosen, batch.prompt, label=label, mismatched=facts), others


def objective(name: str, **hp: Any) -> PreferenceObjective:
    return PreferenceObjective(PREFERENCE_LOSSES.bind(name, hp))


def plain_log_probs(model: Any, rows: TokenRows) -> Tensor:
    """Row by row, from the model's own logits."""
    log_probs = []
    for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_probs.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(log_probs)


def weights_of(learner: PreferenceLearner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.weights()}


def gradients_of(path: str, *arguments: Any, **settings: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """By plain SGD: a step of size 1 subtracts the gradient from a weight."""
    learner = learner_of(path, **settings)
    before = weights_of(learner)
    learner.trained.backend.optimizer.step = lambda *_, **__: _descend(learner)  # type: ignore[method-assign]
    stats = learner.update_examples(*arguments)
    return {name: before[name] - value for name, value in learner.weights()}, stats.metrics


@torch.no_grad()
def _descend(learner: PreferenceLearner) -> None:
    for parameter in learner.trained.unwrapped_model.parameters():
        if parameter.grad is not None:
            parameter -= parameter.grad


@pytest.mark.parametrize("share", ["auto", "never"])
def test_one_update_is_what_plain_pytorch_computes(random_model: str, share: str) -> None:
    rows, batch = pairs()
    gradients, metrics = gradients_of(
        random_model, rows, batch, objective("dpo", beta=0.3), share_prompt=share
    )
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    logp = plain_log_probs(model, rows)
    assert batch.chosen.ref_logp is not None and batch.rejected.ref_logp is not None
    z = 0.3 * ((logp[:N] - batch.chosen.ref_logp) - (logp[N:] - batch.rejected.ref_logp))
    loss = torch.nn.functional.softplus(-z).mean()  # -ln sigmoid(z)
    loss.backward()
    assert metrics["loss/total"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["loss/accuracy"] == pytest.approx((z > 0).float().mean().item())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=2e-3)


def test_an_update_copies_its_batch_to_the_device_once(
    random_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, passes = [], []
    move, run = PairBatch.to, PreferenceObjective.__call__
    monkeypatch.setattr(PairBatch, "to", lambda batch, device: moved.append(device) or move(batch, device))
    monkeypatch.setattr(
        PreferenceObjective, "__call__", lambda self, *parts: passes.append(1) or run(self, *parts)
    )
    rows, batch = pairs()
    learner = learner_of(random_model, tokens_per_micro_batch=64)
    learner.update_examples(rows, batch, objective("dpo", beta=0.3))
    assert len(passes) > 2 and moved == [learner.device]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("share", ["auto", "never"])
def test_log_probs_are_the_models_own_in_every_layout(random_model: str, layout: str, share: str) -> None:
    rows, _ = pairs()
    learner = learner_of(random_model, layout=layout, share_prompt=share, tokens_per_micro_batch=40)
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            learner.log_probs(rows, sides=2), plain_log_probs(model, rows), atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("share", ["auto", "never"])
def test_entropies_come_with_the_log_probs_in_one_pass(random_model: str, share: str) -> None:
    rows, _ = pairs()
    learner = learner_of(random_model, share_prompt=share, tokens_per_micro_batch=40)
    logp, entropy = learner.log_probs_and_entropy(rows, sides=2)
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    expected = []
    for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(-(logps.exp() * logps).sum())
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.stack(expected), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logp, learner.log_probs(rows, sides=2))


LAYOUTS = [
    {"tokens_per_micro_batch": 40},
    {"tokens_per_micro_batch": 40, "share_prompt": "never"},
    {"tokens_per_micro_batch": 1},  # every pair by itself
    {"layout": "packed", "tokens_per_micro_batch": 60},
    {"head_chunk": 3},
]


@pytest.mark.parametrize("settings", LAYOUTS, ids=str)
@pytest.mark.parametrize("loss", ["dpo", "mmpo", "napo", "rpo"])
def test_no_layout_changes_an_update_of_pairs(random_model: str, loss: str, settings: dict[str, Any]) -> None:
    hp = {"mmpo": {"gamma": 1.3}}.get(loss, {})
    rows, batch = pairs()
    expected, metrics = gradients_of(random_model, rows, batch, objective(loss, **hp))
    gradients, again = gradients_of(random_model, rows, batch, objective(loss, **hp), **settings)
    assert again == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("settings", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[3]], ids=str)
def test_no_layout_changes_an_update_of_labelled_completions(
    random_model: str, settings: dict[str, Any]
) -> None:
    # z0 is a mean over the whole batch: a mean per micro-batch would differ between layouts.
    rows, batch, others = labels()
    expected, metrics = gradients_of(random_model, rows, batch, objective("kto"), others)
    gradients, again = gradients_of(random_model, rows, batch, objective("kto"), others, **settings)
    assert metrics["loss/z0"] > 0 and again == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, atol=2e-5, rtol=2e-3)


def test_the_order_of_pairs_changes_nothing(random_model: str) -> None:
    rows, batch = pairs()
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    row_order = [*order, *(N + pair for pair in order)]
    prompts = tuple(rows.prompts[row] for row in row_order)
    reordered = TokenRows(prompts, tuple(rows.completions[row] for row in row_order))
    expected, _ = gradients_of(random_model, rows, batch, objective("dpo"), tokens_per_micro_batch=40)
    gradients, _ = gradients_of(
        random_model, reordered, batch.rows(order), objective("dpo"), tokens_per_micro_batch=40
    )
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, atol=2e-5, rtol=2e-3)


def test_a_shared_prompt_is_read_once_and_the_sides_do_not_see_each_other(random_model: str) -> None:
    rows, batch = pairs()
    learner = learner_of(random_model)
    stats = learner.update_examples(rows, batch, objective("dpo"))
    separate = sum(map(len, rows.prompts)) + sum(map(len, rows.completions))
    assert stats.shared and stats.tokens == separate - sum(map(len, rows.prompts[:N]))
    micro_batch = build_shared(rows, [[3, N + 3]])
    p = len(rows.prompts[3])
    c = len(rows.completions[3])
    r = len(rows.completions[N + 3])
    # The last token of each completion predicts nothing.
    assert micro_batch.input_ids.shape == (1, p + c - 1 + r - 1)
    assert micro_batch.position_ids[0].tolist() == [*range(p + c - 1), *range(p, p + r - 1)]
    mask = micro_batch.attention_mask[0, 0]  # type: ignore[index]
    assert not mask[p + c - 1 :, p : p + c - 1].any() and mask[p + c - 1 :, :p].all()


def test_the_reference_itself_gives_log_two_and_ties(random_model: str) -> None:
    rows, batch = pairs()
    learner = learner_of(random_model, lr=0.0)
    chosen, rejected = learner.log_probs(rows, sides=2).chunk(2)
    at_start = dataclasses.replace(
        batch,
        chosen=dataclasses.replace(batch.chosen, ref_logp=chosen),
        rejected=dataclasses.replace(batch.rejected, ref_logp=rejected),
    )
    stats = learner.update_examples(rows, at_start, objective("dpo"))
    assert stats.metrics["loss/total"] == pytest.approx(0.6931471805599453, abs=1e-7)


def test_a_loss_that_compares_with_other_prompts_needs_their_rows(random_model: str) -> None:
    rows, batch, _ = labels()
    with pytest.raises(ValueError, match="mismatched rows are missing"):
        learner_of(random_model).update_examples(rows, batch, objective("kto"))


def test_a_nan_skips_the_update_and_keeps_the_weights(random_model: str) -> None:
    rows, batch = pairs()
    learner = learner_of(random_model)
    before = weights_of(learner)
    broken = dataclasses.replace(
        batch, chosen=dataclasses.replace(batch.chosen, ref_logp=torch.full((N,), torch.nan))
    )
    stats = learner.update_examples(rows, broken, objective("dpo"))
    assert not stats.stepped and learner.version == 0
    assert all(torch.equal(value, before[name]) for name, value in learner.weights())


# the degree head --------------------------------------------------------------------------------------------


def degree_learner(path: str, **settings: Any) -> PreferenceLearner:
    return PreferenceLearner(
        Model(path=path),
        LearnerCore(optimizer=Optimizer(lr=1e-2, max_grad_norm=1e9), **settings),
        total_updates=10,
        seed=0,
        degree=Degree(weight=0.5, levels=3, lr=1e-1),
    )


def degraded_rows() -> DegradedRows:
    """Of pairs(): the chosen completion without its first d tokens, d the degree."""
    rows, _ = pairs()
    degree = torch.tensor([min(place % 3, len(rows.completions[place]) - 1) for place in range(N)])
    texts = tuple(rows.completions[place][int(cut) :] for place, cut in enumerate(degree))
    return DegradedRows(texts, degree)


@pytest.mark.parametrize("budget", [64, 4096])
def test_the_degree_heads_update_is_what_plain_pytorch_computes(random_model: str, budget: int) -> None:
    rows, batch = pairs()
    degraded = degraded_rows()
    learner = degree_learner(random_model, tokens_per_micro_batch=budget)
    head = learner.trained.unwrapped_model.degree_head
    assert float(head.weight.abs().sum() + head.bias.abs().sum()) == 0
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
    before = weights_of(learner)
    start = head.weight.detach().clone()
    learner.trained.backend.optimizer.step = lambda *_, **__: _descend(learner)  # type: ignore[method-assign]
    metrics = learner.update_examples(rows, batch, objective("dpo", beta=0.3), degraded=degraded).metrics
    gradients = {name: before[name] - value for name, value in learner.weights()}

    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    weight = start.clone().requires_grad_()
    logp = plain_log_probs(model, rows)
    assert batch.chosen.ref_logp is not None and batch.rejected.ref_logp is not None
    z = 0.3 * ((logp[:N] - batch.chosen.ref_logp) - (logp[N:] - batch.rejected.ref_logp))
    states = [
        model.base_model(torch.tensor([prompt + text])).last_hidden_state[0, -2]  # predicts the last token
        for prompt, text in zip(rows.prompts[:N], degraded.completions, strict=True)
    ]
    logits = torch.stack(states) @ weight.T
    preference = torch.nn.functional.softplus(-z).mean()
    degree = torch.nn.functional.cross_entropy(logits, degraded.degree)
    (preference + 0.5 * degree).backward()
    assert metrics["loss/preference"] == pytest.approx(preference.item(), rel=1e-5)
    assert metrics["loss/degree"] == pytest.approx(degree.item(), rel=1e-5)
    assert metrics["loss/total"] == pytest.approx((preference + 0.5 * degree).item(), rel=1e-5)
    right = (logits.argmax(1) == degraded.degree).float().mean().item()
    assert metrics["loss/degree_accuracy"] == pytest.approx(right)
    assert not any("degree" in name for name in gradients)  # no model that is written or pushed has the head
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=2e-3)
    torch.testing.assert_close(start - head.weight.detach(), weight.grad, atol=2e-5, rtol=2e-3)


def test_the_degree_head_has_a_learning_rate_of_its_own_and_goes_on_where_it_was(random_model: str) -> None:
    rows, batch = pairs()
    degraded = degraded_rows()
    learner = degree_learner(random_model)
    first = learner.update_examples(rows, batch, objective("dpo"), degraded=degraded).metrics
    assert first["loss/degree"] == pytest.approx(math.log(3))  # a new head finds all degrees alike
    head = learner.trained.unwrapped_model.degree_head
    assert float(head.weight.detach().abs().max()) == pytest.approx(1e-1, rel=1e-3)  # Adam's first step
    assert learner.lr == 1e-2

    tensors = {name: value.clone() for name, value in learner.optimizer_state()}
    resumed = degree_learner(random_model)
    resumed.model.load_state_dict({name: value.clone() for name, value in learner.model.state_dict().items()})
    resumed.restore(tensors, learner.state())
    for _ in range(2):
        expected = learner.update_examples(rows, batch, objective("dpo"), degraded=degraded).metrics
        assert resumed.update_examples(rows, batch, objective("dpo"), degraded=degraded).metrics == expected
    assert expected["loss/degree"] < math.log(3)


def test_the_last_states_are_those_that_predict_the_last_tokens(random_model: str) -> None:
    rows, _ = pairs()
    learner = learner_of(random_model, tokens_per_micro_batch=32)
    states = last_states(learner.trained, rows)
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    with torch.no_grad():
        expected = [
            model.base_model(torch.tensor([prompt + completion])).last_hidden_state[0, -2]
            for prompt, completion in zip(rows.prompts, rows.completions, strict=True)
        ]
    torch.testing.assert_close(states, torch.stack(expected), atol=1e-5, rtol=1e-4)
