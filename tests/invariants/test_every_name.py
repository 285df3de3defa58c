"""Every registered method with a real learner: micro-batches, layout, padding and the order of rows change
nothing.

The tests compare the gradient that reaches the optimizer and every metric, in float32 arithmetic;
``test_layout.py`` compares the losses alone to the last digits of float64, and
``test_every_name_on_ranks.py`` runs the same cases on two processes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from rltrain.learner import packing
from support.method_cases import (
    EXAMPLES,
    ROWS,
    Outcome,
    PolicySpread,
    PreferenceSpread,
    apart,
    every_policy_case,
    preference_cases,
)

POLICY_CASES = every_policy_case()
FOUR_ROWS = 64  # tokens: a row has at most 17
SHUFFLED = True
LAYOUTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "whole": (not SHUFFLED, {}),
    "four rows at a time": (not SHUFFLED, {"tokens_per_micro_batch": FOUR_ROWS, "share_prompt": "never"}),
    "four rows at a time, prompts shared": (SHUFFLED, {"tokens_per_micro_batch": FOUR_ROWS}),
    "padded on the left": (SHUFFLED, {"tokens_per_micro_batch": FOUR_ROWS, "share_prompt": "never"}),
    "row by row": (SHUFFLED, {"tokens_per_micro_batch": 1}),
    "packed": (not SHUFFLED, {"layout": "packed"}),
    "four rows at a time, packed": (SHUFFLED, {"layout": "packed", "tokens_per_micro_batch": FOUR_ROWS}),
}


@pytest.fixture(scope="module")
def models(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The policy, and other weights for its reference and teacher. One layer: there are many names."""
    folder = tmp_path_factory.mktemp("models")
    policy, other = (
        str(tiny_models.make_random_model(folder / str(seed), seed=seed, layers=1)) for seed in (0, 1)
    )
    return policy, other


def spreads(make: Callable[..., Any], size: int, *models: str) -> dict[str, Any]:
    orders = {
        SHUFFLED: torch.randperm(size, generator=torch.Generator().manual_seed(0)),
        not SHUFFLED: torch.arange(size),
    }
    return {
        name: make(*models, orders[shuffled], **settings) for name, (shuffled, settings) in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def policies(models: tuple[str, str]) -> dict[str, PolicySpread]:
    return spreads(PolicySpread, ROWS, *models)


@pytest.fixture(scope="module")
def preferences(models: tuple[str, str]) -> dict[str, PreferenceSpread]:
    return spreads(PreferenceSpread, EXAMPLES, *models)


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any], Any], dict[str, Outcome]]:
    """A function that returns the outcomes of a case by layout."""

    def run_layouts(spread: dict[str, Any], case: Any) -> dict[str, Outcome]:
        outcomes_by_layout = {}
        for name, outcome in spread.items():
            with monkeypatch.context() as patch:
                patch.setitem(
                    packing.build.__kwdefaults__,
                    "padding_side",
                    "left" if name == "padded on the left" else "right",
                )
                outcomes_by_layout[name] = outcome.outcome(case)
        return outcomes_by_layout

    return run_layouts


def assert_same_outcomes(outcomes_by_layout: dict[str, Outcome]) -> None:
    reference = outcomes_by_layout["whole"]
    assert reference.gradient.isfinite().all() and reference.gradient.norm() > 1e-3
    for layout, outcome in outcomes_by_layout.items():
        assert apart(reference.gradient, outcome.gradient) < 1e-5, layout
        assert outcome.metrics == pytest.approx(reference.metrics, rel=1e-4, abs=2e-6), layout


@pytest.mark.parametrize("name", POLICY_CASES)
def test_no_layout_changes_an_update_of_the_policy(
    name: str, policies: dict[str, PolicySpread], outcomes: Callable[..., dict[str, Outcome]]
) -> None:
    case = POLICY_CASES[name]
    outcomes_by_layout = outcomes(policies, case)
    assert_same_outcomes(outcomes_by_layout)
    metrics = outcomes_by_layout["whole"].metrics
    for control in case.controls:  # it had something to do
        assert max(value for key, value in metrics.items() if f"{control}_touched" in key) > 0
    if any(controller for _, controller in case.terms):  # it told the second step something else
        told = [key for key in metrics if key.startswith(("coefficient of", "history of", "smoothing of"))]
        assert any(metrics[key] != metrics.get(key.replace("step 1", "step 0")) for key in told)


@pytest.mark.parametrize("name", preference_cases())
def test_no_layout_changes_an_update_from_preferences(
    name: str, preferences: dict[str, PreferenceSpread], outcomes: Callable[..., dict[str, Outcome]]
) -> None:
    assert_same_outcomes(outcomes(preferences, name))
