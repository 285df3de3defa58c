"""Whole runs on sampled pairs: they learn, resume bit for bit, keep the right previous iterate, and
refuse what they cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rltrain.cli.evaluate import eval_command
from rltrain.cli.soup import soup_command
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.plan import plan
from rltrain.config.rules import check
from rltrain.config.schema import OnlinePairsRecipe
from rltrain.errors import RecipeError, UserError
from rltrain.train import online_pairs
from support.resumed_runs import SEVENS, TWO_HALVES, differing, killed_in, lines

ROOT = Path(__file__).parents[2]
# Besides, a prompt order in its second epoch (20 prompts, 8 per step), and with previous_every 2 an iterate
# older than the checkpoint.
SETTINGS = (*TWO_HALVES, "data.max_prompts=20")


def recipe_of(name: str, *overrides: str) -> OnlinePairsRecipe:
    recipe = check(
        load_recipe(ROOT / f"recipes/preference/{name}.yaml", profile="tiny_cpu", overrides=overrides)
    ).recipe
    assert isinstance(recipe, OnlinePairsRecipe)
    return recipe


@pytest.fixture
def start(random_model: str) -> Callable[..., int]:
    """``start(folder, "online_dpo", "a.b=1")`` runs ``rltrain train`` in this process."""

    def call(folder: Path, name: str, *overrides: str) -> int:
        settings = [f"model.path={random_model}", f"reward.functions=['{SEVENS}']", *SETTINGS, *overrides]
        return train_command(recipe_of(name, *settings), folder, [], "auto")

    return call


def assert_same_run(left: Path, right: Path) -> None:
    assert lines(left) == lines(right)
    assert (left / "transcripts.jsonl").read_bytes() == (right / "transcripts.jsonl").read_bytes()
    assert not differing(
        left, right, "model/model.safetensors", "checkpoints/step-6/training/optimizer.safetensors"
    )
    assert (left / "model/README.md").read_bytes() == (right / "model/README.md").read_bytes()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("online_dpo", ()),
        # checkpoints fall on the first and the second step of an iteration
        pytest.param("nash_mp", ("checkpoint.every=1", "loss.preference.beta=0.5"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("killed", [5, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_run(
    name: str, overrides: tuple[str, ...], killed: int, start: Any, tmp_path: Path
) -> None:
    if name == "online_dpo" and killed == 4:
        killed = 2  # before there is a checkpoint
    assert start(tmp_path / "whole", name, *overrides) == 0
    killed_in(killed, online_pairs, "annotate_pairs", lambda: start(tmp_path / "resumed", name, *overrides))
    assert start(tmp_path / "resumed", name, *overrides) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_online_dpo_raises_the_reward_it_judges_by(start: Any, tmp_path: Path) -> None:
    assert (
        start(
            tmp_path / "run",
            "online_dpo",
            "rollout.prompts=16",
            "learner.optimizer.schedule=constant",
            "checkpoint.every=0",
        )
        == 0
    )
    steps = [line for line in lines(tmp_path / "run") if "pairs/count" in line]
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"] + 0.1
    assert all(line["rollout/mismatch_abs"] < 1e-4 for line in steps)  # the engine held the learner's weights
    assert {line["control/masked"] for line in steps} == {
        0.0
    }  # beside the mismatch, as in every run; pairs have no controls
    assert steps[0]["loss/preference"] == pytest.approx(
        math.log(2), rel=0.2
    )  # near its own reference on the first two updates
    assert (
        steps[0]["pairs/compared"] == 16 * 6 and steps[0]["pairs/count"] <= 16
    )  # 4 x 3 / 2 comparisons of a prompt, one pair
    assert [line["learner/version"] for line in steps[:3]] == [2, 4, 6]
    card = (tmp_path / "run/model/README.md").read_text()
    assert (
        "on judged pairs of its own answers to" in card
        and "| judge | reward |" in card
        and "trained with dpo" in card
    )


def test_one_wrong_worker_is_told_from_the_others(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every completion is scored again, as the judge and the metrics need its log-prob anyway."""
    collate = online_pairs.collate

    def collate_wrong(groups: Any) -> Any:
        rows, batch = collate(groups)
        wrong = (torch.arange(batch.mask.shape[0]) % 4 == 3)[:, None]
        assert batch.rollout_logp is not None
        return rows, batch.replace(rollout_logp=batch.rollout_logp + 0.5 * wrong)

    def name_workers(groups: Any) -> list[str]:
        return [f"worker {row % 4}" for row in range(sum(len(group.completions) for group in groups))]

    monkeypatch.setattr(online_pairs, "collate", collate_wrong)
    monkeypatch.setattr(online_pairs, "row_workers", name_workers)
    settings = ("rollout.mismatch_warn=0.3", "rollout.mismatch_stop=9", "train.steps=1", "checkpoint.every=0")
    assert start(tmp_path / "run", "online_dpo", *settings) == 0
    (line,) = (line for line in lines(tmp_path / "run") if "pairs/count" in line)
    apart = [line[f"rollout/worker_mismatch/worker-{number}"] for number in range(4)]
    assert max(apart[:3]) < 1e-5
    assert apart[3] == pytest.approx(0.5, abs=1e-5)
    output = "".join(capfd.readouterr())
    assert "worker-3 0.5" in output and "worker-2" not in output


def test_the_previous_iterate_is_the_one_that_the_recipe_keeps(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step's first update the policy still is what sampled: its own log-probs tell which iterate
    stands beside it.
    """
    distance: list[float] = []
    annotated = online_pairs.annotate_pairs

    def spying(run: Any, step: Any) -> Any:
        rows, batch = annotated(run, step)
        now = run.learner.log_probs(rows, sides=2)
        before = torch.cat([batch.chosen.previous_logp, batch.rejected.previous_logp])
        distance.append(float((now - before).abs().max()))
        return rows, batch

    monkeypatch.setattr(online_pairs, "annotate_pairs", spying)
    few = (
        "train.steps=4",
        "checkpoint.every=0",
        "eval.every=0",
        "eval.at_start=false",
        "learner.updates=1",
        "learner.optimizer.schedule=constant",
    )
    assert start(tmp_path / "every", "inpo_online", *few) == 0
    assert start(tmp_path / "second", "nash_mp", *few) == 0
    assert start(tmp_path / "hot", "inpo_online", *few, "rollout.temperature=0.7", "train.steps=1") == 0
    every, second, hot = distance[:4], distance[4:8], distance[8:]
    assert max(every) < 1e-4
    assert (
        max(second[0], second[2]) < 1e-4 and min(second[1], second[3]) > 1e-2
    )  # the centre stays for the second step
    assert hot[0] < 1e-4  # at temperature 1 whatever the samples were drawn at


def test_a_step_without_pairs_takes_no_update_and_says_so(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = ("reward.functions=[none]", "train.steps=2", "checkpoint.every=0", "eval.every=0")
    assert start(tmp_path / "run", "online_dpo", *nothing) == 0
    steps = [line for line in lines(tmp_path / "run") if "pairs/count" in line]
    assert [(line["pairs/count"], line["pairs/tied"], line["learner/version"]) for line in steps] == [
        (0, 8, 0)
    ] * 2
    assert "no pairs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["online_dpo", "inpo_online", "nash_mp", "osp_online"])
def test_every_recipe_takes_steps_that_move_the_weights(
    name: str, start: Any, tmp_path: Path, random_model: str
) -> None:
    few = ("train.steps=2", "checkpoint.every=0", "eval.every=0", "learner.optimizer.schedule=constant")
    assert start(tmp_path / "run", name, *few, "rollout.n=8", "rollout.prompts=16") == 0
    steps = [line for line in lines(tmp_path / "run") if "pairs/count" in line]
    assert all(
        math.isfinite(line["loss/total"]) and line["learner/grad_norm"] > 0 and line["pairs/count"] > 0
        for line in steps
    )
    assert steps[-1]["learner/version"] == 4
    assert (
        eval_command(
            str(tmp_path / "run/model"),
            recipe_of(name, f"model.path={random_model}", *SETTINGS),
            tmp_path / "eval.json",
        )
        == 0
    )


# what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("online_dpo", "pairs.judge=rewards", "no judge is called 'rewards'; did you mean 'reward'"),
        (
            "online_dpo",
            "pairs.judge.nois=0.1",
            "judge 'reward' has no hyperparameter 'nois'; did you mean 'noise'",
        ),
        ("online_dpo", "pairs.choose=best", "pairs.choose: got 'best'"),
        ("online_dpo", "loss.preference=kto", "kto does not compare two completions"),
        ("online_dpo", "loss.preference=mmpo", "gamma has no default"),
        ("online_dpo", "loss.preference=clo", "needs column:is_target_language from a data set"),
        ("online_dpo", "train.previous_every=2", "reads no previous iterate"),
        ("online_dpo", "rollout.n=1", "a pair takes two completions"),
        ("online_dpo", "rollout.extra_samples=[answer]", "pairs are made of single answers"),
        ("online_dpo", "rollout.trust_logp=true", "take no log-probs from the engine"),
        (
            "online_dpo",
            "learner.tokens_per_micro_batch=47",
            r"2 x \(data.max_prompt_tokens 16 \+ rollout.max_tokens 8\) = 48",
        ),
        (
            "online_dpo",
            "reward.functions=[{name: exact, weight: 0}]",
            "every weight in reward.functions is 0",
        ),
        ("online_dpo", "reward.functions=[exakt]", "no reward is called 'exakt'"),
        ("online_dpo", "model.teacher=x", "have no teacher"),
        ("online_dpo", "advantage=rloo", "unknown key advantage"),
        ("osp_online", "pairs.verdict=drawn", "strengths that are no answers of the judge"),
    ],
)
def test_the_recipe_is_checked_before_anything_is_loaded(name: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(name, override)


def test_what_bends_the_derivation_is_warned_of() -> None:
    recipe = load_recipe(
        ROOT / "recipes/preference/inpo_online.yaml",
        overrides=["pairs.choose=best_worst", "rollout.temperature=0.7"],
    )
    assert [
        ("independent pairs" in warning, "at temperature 1" in warning) for warning in check(recipe).warnings
    ] == [
        (True, False),
        (False, True),
    ]


def test_the_plan_counts_pairs_and_comparisons() -> None:
    values = {line.name: line.value for line in plan(recipe_of("osp_online"))}
    # 24 prompts x 8: seven against the first, 28 pairs of each
    assert (values["pairs: comparisons per step"], values["pairs: per step, at most"]) == ("168", "672")
    assert {line.name: line.value for line in plan(recipe_of("nash_mp"))}[
        "frozen models: log-probs"
    ] == "ref_logp previous_logp"


# soup -------------------------------------------------------------------------------------------------------


def test_a_soup_is_a_model_of_mean_weights(
    tiny_models: Any, random_model: str, random_tied_model: str, tmp_path: Path
) -> None:
    other = str(tiny_models.make_random_model(tmp_path / "other", tied=False, seed=1))
    assert soup_command([random_model, other], [0.75, 0.25], tmp_path / "soup") == 0
    first, second, mixed = (
        load_file(Path(path) / "model.safetensors") for path in (random_model, other, str(tmp_path / "soup"))
    )
    assert all(
        torch.allclose(
            mixed[name].float(), 0.75 * first[name].float() + 0.25 * second[name].float(), atol=1e-6
        )
        for name in first
    )
    assert f"0.75 x `{random_model}` + 0.25 x `{other}`" in (tmp_path / "soup/README.md").read_text()
    assert soup_command([random_tied_model, random_tied_model], [], tmp_path / "same") == 0
    unmixed = load_file(tmp_path / "same/model.safetensors")
    assert all(
        torch.equal(unmixed[name], weight)
        for name, weight in load_file(Path(random_tied_model) / "model.safetensors").items()
    )
    with pytest.raises(UserError, match=r"sum to 0\.9"):
        soup_command([random_model, other], [0.5, 0.4], tmp_path / "no")
    with pytest.raises(UserError, match="a soup of 2 models and 1 weights"):
        soup_command([random_model, other], [0.5], tmp_path / "no")
    with pytest.raises(UserError, match="differ in which weights are tied"):
        soup_command([random_model, random_tied_model], [], tmp_path / "no")


@pytest.mark.slow
def test_salsa_is_pulled_to_a_soup_from_its_first_step(
    start: Any, tiny_models: Any, random_model: str, tmp_path: Path
) -> None:
    other = str(tiny_models.make_random_model(tmp_path / "other", tied=False, seed=1))
    assert soup_command([random_model, other], [], tmp_path / "soup") == 0
    settings = [
        f"model.path={random_model}",
        f"model.reference={tmp_path / 'soup'}",
        f"reward.functions=['{SEVENS}']",
    ]
    few = ("train.steps=1", "rollout.prompts=8", "eval.prompts=4", "learner.optimizer.lr=1e-3")
    recipe = check(
        load_recipe(ROOT / "recipes/preference/salsa.yaml", profile="tiny_cpu", overrides=[*settings, *few])
    ).recipe
    assert train_command(recipe, tmp_path / "run", [], "never") == 0
    [step] = [line for line in lines(tmp_path / "run") if "loss/kl" in line]
    assert step["loss/kl"] > 1e-3
