"""Coefficients that change: the papers' numbers, their ranges, and exact resumption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rltrain.control import COEFFICIENTS
from rltrain.control.coefficient import Controller

FACTS = json.loads(
    Path(__file__).parents[1].joinpath("known_answers", "terms.json").read_text(encoding="utf-8")
)
CASES = {case["id"]: case for case in FACTS["cases"] if case["quantity"] == "coefficient"}


def make(reference: str | dict[str, Any], steps: int = 100) -> Controller:
    reference = {"name": reference} if isinstance(reference, str) else reference
    hp = {key: value for key, value in reference.items() if key != "name"}
    bound = COEFFICIENTS.bind(reference["name"], hp)
    return bound(**dict.fromkeys(bound.spec.inputs, steps))


def value(case: dict[str, Any], controller: Controller) -> float:
    told: Any = controller.inputs()[case["input"]] if "input" in case else controller()
    return told


@pytest.mark.parametrize("name", CASES)
def test_the_known_answer_comes_out(name: str) -> None:
    case = CASES[name]
    values: list[float] = []
    if "each_alone" in case:  # one observation each, from the start
        for observation in case["each_alone"]:
            controller = make(case["coefficient"])
            controller.observe({case["metric"]: observation})
            values.append(value(case, controller))
    elif "at_steps" in case:
        controller = make(case["coefficient"], case.get("total_steps", 100))
        for step in range(max(case["at_steps"]) + 1):
            if step in case["at_steps"]:
                values.append(value(case, controller))
            controller.observe({case["metric"]: 0.5})
    else:
        controller = make(case["coefficient"])
        for observation in case["observed"]:
            controller.observe({case["metric"]: observation})
            values.append(value(case, controller))
    assert values == pytest.approx(case["expected"], rel=1e-9)


METRICS = {"learner/entropy_mean": 0.3, "loss/clamped_entropy_nats": 0.3, "loss/kl": 0.02}
WALKS = {
    "target_entropy": {"step": 0.03, "high": 0.2},
    "entropy_band": {"entropy_low": 0.4, "entropy_high": 0.6, "rate": 0.01, "pull": 0.1, "warmup_steps": 3},
    "annealed": {},
    "epo_schedule": {},
    "stage": {"begin": 0.02, "end": 0.05},
    "kl_target": {"every": 2, "decay": 0.5},
}


def test_every_controller_is_walked_here() -> None:
    assert set(WALKS) == set(COEFFICIENTS.names())


def wave(step: int) -> dict[str, float]:
    return {name: base * (1 + math.sin(step)) for name, base in METRICS.items()}


@pytest.mark.parametrize("name", WALKS)
def test_a_saved_controller_goes_on_as_if_never_stopped(name: str) -> None:
    def step(controller: Controller, number: int) -> tuple[float, dict[str, Any]]:
        controller.observe(wave(number))
        return controller(), dict(controller.inputs())

    uninterrupted = make({"name": name, **WALKS[name]})
    expected = [step(uninterrupted, number) for number in range(14)]
    first = make({"name": name, **WALKS[name]})
    for number in range(7):
        step(first, number)
    second = make({"name": name, **WALKS[name]})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [step(second, number) for number in range(7, 14)] == expected[7:]
    coefficients = {coefficient for coefficient, _ in expected}
    inputs = {str(term_inputs) for _, term_inputs in expected}
    assert len(coefficients | inputs) > 2  # it moves at all


@pytest.mark.parametrize("name", ["target_entropy", "entropy_band", "kl_target", "epo_schedule"])
def test_a_step_without_a_finite_number_moves_nothing(name: str) -> None:
    controller = make({"name": name, **WALKS[name]})
    controller.observe(METRICS)
    before = controller()
    controller.observe(dict.fromkeys(METRICS, math.nan))
    assert controller() == before


@pytest.mark.parametrize("name", ["target_entropy", "entropy_band", "kl_target", "epo_schedule"])
def test_a_metric_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"coefficient {name} needs the metric '.*', which the step does not have"
    ):
        make({"name": name, **WALKS[name]}).observe({"learner/entropy": 1.0})


@pytest.mark.parametrize(("observation", "bound"), [(0.0, 0.1), (5.0, 4e-5)])
def test_the_band_keeps_its_range(observation: float, bound: float) -> None:
    controller = make({"name": "entropy_band", "entropy_low": 0.2, "entropy_high": 0.5, "rate": 1.0})
    for _ in range(5):
        controller.observe({"loss/clamped_entropy_nats": observation})
    assert controller() == bound


def test_without_a_band_the_coefficient_stays() -> None:
    controller = make("entropy_band")
    controller.observe({"loss/clamped_entropy_nats": 7.0})
    assert controller() == 2e-4


def test_the_first_step_of_epo_has_no_history_and_the_second_has_the_first_steps_entropy() -> None:
    controller = make("epo_schedule")
    assert "history" not in controller.inputs()
    controller.observe({"learner/entropy_mean": 0.4})
    assert controller.inputs()["history"] == 0.4
    controller.observe({"learner/entropy_mean": 0.8})
    assert controller.inputs()["history"] == pytest.approx(0.6)


def turns(*entropies: float) -> dict[str, float]:
    return {"learner/entropy_mean": 9.0} | {
        f"learner/entropy_turn_{number}": entropy for number, entropy in enumerate(entropies)
    }


def test_epo_keeps_a_history_of_each_turn_over_the_steps_that_reached_it() -> None:
    controller = make({"name": "epo_schedule", "history": "turn"})
    assert "history" not in controller.inputs()
    controller.observe(turns(0.4, 0.2))
    controller.observe(turns(0.8, math.nan, 0.6))
    assert controller.inputs()["history"] == pytest.approx([0.6, 0.2, 0.6])
    resumed = make({"name": "epo_schedule", "history": "turn"})
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    for later in (controller, resumed):
        later.observe(turns(0.9))
        assert later.inputs()["history"] == pytest.approx([0.7, 0.2, 0.6])
    with pytest.raises(ValueError, match=r"needs the metrics learner/entropy_turn_\*.*history: step"):
        controller.observe({"learner/entropy_mean": 1.0})


def test_a_checkpoint_from_before_turns_had_a_history_is_read() -> None:
    state = make("epo_schedule").state_dict()
    del state["turns"]
    resumed = make("epo_schedule")
    resumed.load_state_dict(state)
    assert resumed.inputs() == make("epo_schedule").inputs()


def test_a_schedule_is_not_made_longer() -> None:
    state = make("epo_schedule", steps=100).state_dict()
    with pytest.raises(ValueError, match=r"ends at 100, and train\.steps is 200"):
        make("epo_schedule", steps=200).load_state_dict(state)
    make({"name": "epo_schedule", "schedule": "constant"}, steps=200).load_state_dict(state)


def test_a_small_error_of_the_kl_leaves_its_weight_alone() -> None:
    # |0.0101 / 0.01 - 1| = 0.01 < 0.02
    controller = make({"name": "kl_target", "every": 1})
    controller.observe({"loss/kl": 0.0101})
    assert controller() == 0.01


@pytest.mark.parametrize(("kl", "factor"), [(0.0, 1e-4), (10.0, 100.0)])
@pytest.mark.parametrize("start", [0.01, 0.5])
def test_the_kl_weight_stays_inside_its_bounds_times_its_start(
    kl: float, factor: float, start: float
) -> None:
    # released: a fixed coefficient times a factor in [1e-4, 100] that begins at 1
    controller = make(
        {"name": "kl_target", "start": start, "every": 1, "decay": 0.0, "rate": 1.0, "cap": 9.0}
    )
    for _ in range(20):
        controller.observe({"loss/kl": kl})
    assert controller() == pytest.approx(start * factor)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"name": "target_entropy", "low": 0.5, "high": 0.1}, "low 0.5, start 0, high 0.1"),
        ({"name": "entropy_band", "entropy_low": 0.1}, "give all three"),
        (
            {"name": "entropy_band", "entropy_low": 0.3, "entropy_high": 0.1, "rate": 1.0},
            "entropy_low 0.3, entropy_high 0.1",
        ),
        ({"name": "annealed", "floor": 1.0}, "floor 1, start 0.005"),
        ({"name": "kl_target", "target": 0.0}, "must be positive"),
        ({"name": "kl_target", "start": 0.0}, "must be positive"),
        ({"name": "kl_target", "low": 2.0}, "low 2, one 1, high 100"),
    ],
)
def test_hyperparameters_that_contradict_each_other_are_refused(named: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(named)
