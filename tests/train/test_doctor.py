"""``rltrain doctor``: weights at rest, and a verdict per line."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from rltrain.build import rollout as build_rollout
from rltrain.cli.doctor import doctor_command
from rltrain.config.load import load_recipe
from rltrain.config.schema import OnlinePairsRecipe, OnlineRecipe
from rltrain.learner.pair_learner import PairLearner
from rltrain.rollout.engines.transformers import engine as transformers_engine
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.train.doctor import (
    START,
    STEPS,
    WEIGHTS,
    diagnose,
    diagnose_error,
    freeze_recipe,
    online_with_every_row_trained,
    pairs_with_every_row_trained,
    slope,
)
from rltrain.train.memory import Memory
from rltrain.train.mismatch import MismatchGuard

RECIPES = Path(__file__).parents[2] / "recipes"
GRPO, ONLINE_DPO = RECIPES / "policy/grpo.yaml", RECIPES / "preference/online_dpo.yaml"
GUARD = MismatchGuard(warn=1e-4, stop=1e-3, patience=3)
ROOMY = Memory("memory", 1.0, 2.0)


def recipe_of(model: str, *overrides: str) -> OnlineRecipe:
    small = ("rollout.prompts=4", "rollout.n=2", "loss.terms=[]")
    recipe = load_recipe(GRPO, profile="tiny_cpu", overrides=[f"model.path={model}", *small, *overrides])
    assert isinstance(recipe, OnlineRecipe)
    return recipe


def pair_recipe_of(model: str, *overrides: str) -> OnlinePairsRecipe:
    small = ("rollout.prompts=4", "rollout.n=3", "reward.workers=1")
    recipe = load_recipe(
        ONLINE_DPO, profile="tiny_cpu", overrides=[f"model.path={model}", *small, *overrides]
    )
    assert isinstance(recipe, OnlinePairsRecipe)
    return recipe


def steps_of(mismatch: list[float], **other: float) -> list[dict[str, float]]:
    constant = {
        "rollout/mismatch_max": 1e-5,
        "sync/difference": 0.0,
        "sync/checked": 11.0,
        "time/reward": 0.1,
        "rollout/completions": 8.0,
        "rollout/length_max": 8.0,
        "learner/trained_rows": 8.0,
    }
    return [
        constant
        | {"rollout/mismatch_abs": value}
        | {name.replace("__", "/"): number for name, number in other.items()}
        for value in mismatch
    ]


def verdicts(steps: list[dict[str, float]], memory: Memory = ROOMY) -> dict[str, bool | None]:
    findings = diagnose(recipe_of("model"), steps, GUARD, [memory], judged=False)
    assert len(findings) == 5
    return {finding.question: finding.is_fine for finding in findings}


def test_slope_is_that_of_a_straight_line() -> None:
    assert slope([3.0, 5.0, 7.0]) == pytest.approx(2.0)
    assert slope([4.0]) == 0.0


def test_each_fault_spoils_its_own_line_only() -> None:
    flat = [1e-6] * 5
    assert all(verdicts(steps_of(flat)).values())
    for steps, memory, line in (
        (steps_of([2e-4] * 5), ROOMY, "engine and learner agree on log-probs"),
        (
            steps_of([0.0, 2e-5, 4e-5, 6e-5, 8e-5]),
            ROOMY,
            "their difference stays flat",
        ),  # rises by 8e-5; half the threshold is 5e-5
        (steps_of(flat, reward__ungraded__math_answer=1.0), ROOMY, "rewards answer in time"),
        (
            steps_of(flat, time__reward=901.0),
            ROOMY,
            "rewards answer in time",
        ),  # more than half of the deadline, 1800 s
        (steps_of(flat), Memory("memory", 1.9, 2.0), "memory suffices"),
        (steps_of(flat, learner__trained_rows=0.0), ROOMY, "memory suffices"),  # no gradient, no answer
    ):
        answers = verdicts(steps, memory)
        assert [name for name, fine in answers.items() if not fine] == [line]


def test_a_grader_that_declines_to_judge_is_no_failure() -> None:
    assert all(verdicts(steps_of([0.0] * 3, **{"reward/ungraded/none": 3.0})).values())


def test_a_run_at_rest_keeps_the_recipe_but_for_what_moves_or_writes() -> None:
    recipe = recipe_of(
        "model",
        "rollout.trust_logp=true",
        "checkpoint.every=5",
        "learner.optimizer.schedule=cosine",
        "report.sinks=[wandb]",
    )
    still = freeze_recipe(recipe, 7)
    assert (still.learner.optimizer.lr, still.train.steps, still.checkpoint.every, still.report.sinks) == (
        0.0,
        7,
        0,
        (),
    )
    assert (
        still.rollout.prompts == recipe.rollout.prompts
        and still.loss == recipe.loss
        and still.learner.updates == recipe.learner.updates
    )
    assert not still.rollout.trust_logp  # with several updates nothing would measure the mismatch


def test_at_rest_nothing_is_left_out_of_the_gradient_pass() -> None:
    still = online_with_every_row_trained(
        freeze_recipe(recipe_of("model", "rollout.dynamic_sampling={max_rounds: 3}"), 2)
    )
    assert (
        isinstance(still, OnlineRecipe)
        and not still.learner.skip_idle_rows
        and still.rollout.dynamic_sampling is None
    )
    pairs = pairs_with_every_row_trained(freeze_recipe(pair_recipe_of("model", "pairs.tolerance=0.1"), 2))
    assert isinstance(pairs, OnlinePairsRecipe) and (pairs.pairs.verdict, pairs.pairs.tolerance) == (
        "drawn",
        0.0,
    )  # ties are pairs
    assert pairs.loss.preference.name == "dpo" and pairs.pairs.judge.name == "reward"


def test_a_judge_that_is_slow_or_silent_spoils_its_line() -> None:
    recipe = pair_recipe_of("model")
    for seconds, count, unjudged, fine in (
        (0.1, 4.0, 1.0, True),
        (901.0, 4.0, 0.0, False),
        (0.1, 0.0, 4.0, False),
    ):
        judged = {
            "time__judge": seconds,
            "pairs__compared": 12.0,
            "pairs__count": count,
            "pairs__unjudged": unjudged,
        }
        answers = {
            finding.question: finding.is_fine
            for finding in diagnose(recipe, steps_of([1e-6] * 3, **judged), GUARD, [ROOMY], judged=True)
        }
        assert answers["the judge answers in time"] is fine
        assert answers["memory suffices"] is (count > 0)


@pytest.mark.parametrize(
    ("error", "question", "said"),
    [
        (WeightMismatchError("lm_head.weight differs"), WEIGHTS, "lm_head.weight differs"),
        (torch.OutOfMemoryError("CUDA out of memory"), "GPU memory suffices", "CUDA out of memory"),
        (
            RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:118"),
            "GPU memory suffices",
            "RuntimeError: CUDA Error",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"),
            "memory suffices",
            "RuntimeError: DefaultCPUAllocator: can't",
        ),
        (MemoryError(), "memory suffices", "MemoryError"),
        (ValueError("No room for the KV cache"), STEPS, "ValueError: No room for the KV cache"),
    ],
)
def test_what_ends_the_run_answers_its_question_and_the_others_were_not_reached(
    error: Exception, question: str, said: str
) -> None:
    findings = diagnose_error(error, STEPS, judged=False)
    [failed] = [finding for finding in findings if finding.is_fine is False]
    assert failed.question == question and failed.measured.startswith(said)
    others = [finding for finding in findings if finding is not failed]
    assert len(others) >= 4 and {(finding.is_fine, finding.measured) for finding in others} == {
        (None, "not reached")
    }
    assert not any(finding.is_fine for finding in findings)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_healthy_recipe_passes_and_leaves_nothing(
    random_model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Every reward is 0 and so is every advantage: without a word all rows would skip the gradient pass.
    assert doctor_command(recipe_of(random_model, "learner.updates=2", "reward.functions=[none]"), 3) == 0
    verdict = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok", "FAIL"))]
    assert [line[:4] for line in verdict] == ["ok  "] * (6 + torch.cuda.is_available())
    assert "ungraded of 24: none" in verdict[4]  # 3 steps of 4 prompts with 2 completions
    assert "with gradients of 8 rows a step" in verdict[5]
    assert int(re.search(r"in (\d+) processes", verdict[5])[1]) >= 3  # two reward workers are counted
    assert not list(folder.glob("rltrain-doctor-*"))


def test_log_probs_of_another_temperature_fail_with_exit_code_1(
    random_model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = transformers_engine.sample_tokens_

    def raw(
        logits: torch.Tensor, uniform: torch.Tensor, temperature: float, adaptive: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        untouched = torch.log_softmax(logits.float(), dim=-1)
        tokens, _ = ours(logits, uniform, temperature, adaptive)
        return tokens, untouched.gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(transformers_engine, "sample_tokens_", raw)
    assert (
        doctor_command(recipe_of(random_model, "rollout.temperature=1.3"), 5) == 1
    )  # more than the patience: it never stops early
    assert "FAIL  engine and learner agree on log-probs" in capsys.readouterr().out


def test_weights_that_do_not_arrive_fail_with_the_weights_name(
    random_model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = transformers_engine.TransformersEngine.load

    def halves_the_head(self: Any, weights: Any, version: int) -> None:
        load(
            self,
            ((name, weight / 2 if name == "lm_head.weight" else weight) for name, weight in weights),
            version,
        )

    monkeypatch.setattr(transformers_engine.TransformersEngine, "load", halves_the_head)
    assert doctor_command(recipe_of(random_model), 2) == 1
    assert (
        "FAIL  the engine holds the learner's weights" in (out := capsys.readouterr().out)
        and "lm_head.weight" in out
    )
    assert (
        sum(line.startswith("-  ") and line.endswith("not reached") for line in out.splitlines())
        == 4 + torch.cuda.is_available()
    )


def test_an_engine_that_does_not_start_leaves_every_other_question_open(
    random_model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_engine(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no room for the KV cache")

    monkeypatch.setattr(build_rollout, "build_engine", no_engine)
    assert doctor_command(recipe_of(random_model), 2) == 1
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok", "FAIL", "-"))]
    assert out[0].split() == [
        "FAIL",
        *START.split(),
        *["RuntimeError:", "no", "room", "for", "the", "KV", "cache"],
    ]
    assert [line.startswith("- ") for line in out[1:]] == [True] * (5 + torch.cuda.is_available())
    assert not list(folder.glob("rltrain-doctor-*"))


def test_a_pair_recipe_runs_its_own_loop_with_its_judge_and_its_loss(
    random_model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: list[str] = []
    update = PairLearner.update_pairs

    def seen(self: Any, rows: Any, batch: Any, objective: Any) -> Any:
        losses.append(f"{objective.loss.name} beside {sorted(self.frozen)}")
        return update(self, rows, batch, objective)

    monkeypatch.setattr(PairLearner, "update_pairs", seen)
    assert (
        doctor_command(pair_recipe_of(random_model, "reward.functions=[none]"), 2) == 0
    )  # every comparison a tie
    out = capsys.readouterr().out
    assert losses == ["dpo beside ['ref_logp']"] * 2
    assert (
        "24 comparisons, 0 without a verdict" in out
    )  # 2 steps of 4 prompts with 3 completions, each with each
    assert re.search(
        r"ok +memory suffices .* with gradients of [34] pairs a step", out
    )  # two of a prompt's answers may be equal


def test_graders_that_are_too_slow_fail_with_the_count(
    random_model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grader = folder / "slow.py"
    grader.write_text(
        "import time\n\ndef slow(inputs):\n    time.sleep(2 * any('7' in text for text in "
        "inputs.completions))\n"
        "    return [0.5] * len(inputs.completions)\n"
    )
    assert (
        doctor_command(
            recipe_of(random_model, f"reward.functions=['{grader}:slow']", "reward.seconds=0.3"), 2
        )
        == 1
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if "rewards answer" in line)
    assert line.startswith("FAIL") and "timeout" in line
