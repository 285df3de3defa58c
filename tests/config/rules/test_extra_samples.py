"""Rules about sources and teachers: rows that no method can use, and methods whose rows no source samples,
are refused when the recipe is loaded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.config.load import load_recipe
from rltrain.config.plan import plan
from rltrain.config.rules.registries import EXTRA_SAMPLES
from support.checking import refused, warnings

EPISODES = "rollout.environment={name: calculator, max_turns: 2, turn_tokens: 4}"
AEPO = ("rollout.extra_samples=[aepo]", "control=[{name: aepo, form: rows}]")


@pytest.mark.parametrize(
    ("overrides", "expected", "remedy"),
    [
        (
            ["rollout.extra_samples=[tempred]"],
            "rollout.extra_samples.0: no extra sample is called 'tempred'",
            "choose from aepo, answer, reference",
        ),
        (
            [*AEPO, "rollout.extra_samples.0.taget=0.5"],
            "extra sample 'aepo' has no hyperparameter 'taget'",
            "did you mean 'target'?",
        ),
        (
            ["rollout.extra_samples=[aepo, aepo]", AEPO[1]],
            "aepo is listed 2 times in rollout.extra_samples",
            "keep one",
        ),
        (
            [*AEPO, "rollout.trust_logp=true"],
            "rollout.trust_logp would use",
            "set rollout.trust_logp to false",
        ),
        (["rollout.extra_samples=[aepo]"], "nothing weighs them", "add aepo to control"),
        (
            [AEPO[1]],
            "control.0 aepo works on rows that only the aepo source samples",
            "add aepo to rollout.extra_samples",
        ),
        (
            ["rollout.extra_samples=[reference]"],
            "which distinguishes sources can use, and group_norm does not",
            "set advantage to one that does (aapo, grao, optimal_value)",
        ),
        (
            ["rollout.extra_samples=[answer]"],
            "rollout.extra_samples.0 answer adds rows",
            "or drop the source",
        ),
        (
            ["advantage=aapo", "loss.policy=reinforce"],
            "only the reference source samples",
            "add reference to rollout.extra_samples",
        ),
        (
            ["advantage=grao", "loss.policy=reinforce", "loss.aggregate=seq_mean_token_mean"],
            "only the answer source samples",
            "add answer to rollout.extra_samples",
        ),
        (
            [
                "rollout.extra_samples=[answer]",
                "advantage=grao",
                "loss.policy=reinforce",
                "loss.aggregate=seq_mean_token_mean",
                EPISODES,
            ],
            "in rollout.environment calculator a completion is an episode",
            "drop the source or the environment",
        ),
    ],
)
def test_a_source_and_what_uses_its_rows_come_together(
    recipe: Path, overrides: list[str], expected: str, remedy: str
) -> None:
    problems = refused(recipe, *overrides)
    assert any(expected in problem and remedy in problem for problem in problems), problems


@pytest.mark.parametrize(
    "overrides",
    [
        AEPO,
        [*AEPO, "rollout.extra_samples.0.target=0.75", "rollout.dynamic_sampling={}"],
        ["rollout.extra_samples=[reference]", "advantage=aapo", "loss.policy=reinforce"],
        [
            "rollout.extra_samples=[{name: answer, column: solution}]",
            "advantage=grao",
            "loss.policy=reinforce",
            "loss.aggregate=seq_mean_token_mean",
        ],
    ],
)
def test_what_belongs_together_passes_without_a_word(recipe: Path, overrides: list[str]) -> None:
    assert warnings(recipe, *overrides) == ()


def test_a_teacher_without_a_use_and_a_use_without_a_teacher_are_said(recipe: Path) -> None:
    distilled = "loss.terms=[{name: kdrl, coefficient: 0.002}]"
    assert warnings(recipe, distilled, "model.teacher=big") == ()
    assert any(
        "loss.terms.0 kdrl learns from a teacher, but model.teacher is null" in warning
        for warning in warnings(recipe, distilled)
    )
    assert any(
        "no function of the recipe needs teacher_logp" in warning
        for warning in warnings(recipe, "model.teacher=big")
    )


@pytest.mark.parametrize(
    ("overrides", "name", "rows", "grading"),
    [
        (AEPO, "aepo", "48", "1,200"),  # a quarter of 24 prompts x 8; (192 + 48) x 10 s / 2 workers
        ([*AEPO, "rollout.extra_samples.0.share=0.01"], "aepo", "8", "1,000"),  # at least one prompt
        (["rollout.extra_samples=[reference]", "advantage=aapo"], "reference", "192", "1,920"),
        (["rollout.extra_samples=[{name: reference, n: 3}]", "advantage=aapo"], "reference", "72", "1,320"),
        (["rollout.extra_samples=[answer]", "advantage=grao"], "answer", "24", "1,080"),
    ],
)
def test_the_plan_counts_the_rows_of_a_source(
    recipe: Path, overrides: list[str], name: str, rows: str, grading: str
) -> None:
    values = {line.name: line.value for line in plan(load_recipe(recipe, overrides=overrides))}
    assert (values[f"rollout: {name} rows per step"], values["reward: grading per step, at most"]) == (
        rows,
        grading,
    )


@pytest.mark.parametrize("name", EXTRA_SAMPLES.names())
def test_every_source_cites_its_paper_and_documents_its_settings(name: str) -> None:
    spec = EXTRA_SAMPLES.spec(name)
    assert f"arXiv:{spec.arxiv}" in spec.doc
    assert [key for key in spec.hyperparameters if f"``{key}``" not in spec.doc] == []
