"""``rltrain plan RECIPE --measured RUN``: what a step takes by the rates of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.cli.app import app
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.timeline import Timeline

RECIPE = Path(__file__).parents[2] / "recipes/policy/grpo.yaml"
WORKERS = ("rollout.engine=vllm_server", "rollout.workers={count: 2}")
LAG = (*WORKERS, "rollout.schedule={lag: 1}", "control=[tis]")
STEPS = 8


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps of eight seconds of sampling on two workers, three of learning, and one of a push; an evaluation
    of ten seconds after each.
    """
    recipe = load_recipe(RECIPE, profile="tiny_cpu", overrides=[*LAG, "rollout.prompts=8", "rollout.n=4"])
    folder = RunFolder.create(tmp_path / "run", resolved_yaml(recipe), {"run": "1", "processes": 1})
    timeline = Timeline(folder.timeline)
    now = 1000.0
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        timeline.add("worker 0", "sample", now, now + 8)
        timeline.add("worker 1", "sample", now + 1, now + 7)
        timeline.add("learner", "wait", now, now + 0.5, step=step)
        timeline.add("learner", "learn", now + 0.5, now + 8, step=step)  # with its wait before the push
        timeline.add("learner", "push", now + 8, now + 9, version=step)
        timeline.add("worker 0", "sample", now + 9, now + 19)
        now += 19
        times = {"time/annotate": 1.0, "time/update": 2.0, "time/wait": 4.5}
        lines += [{"step": step, "rollout/tokens": 640, **times}, {"step": step, "eval/reward": 1.0}]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder.path


def plan(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", str(RECIPE), "--profile", "tiny_cpu", *arguments])


def settings(*keys: str) -> list[str]:
    return [part for key in (*keys, "rollout.prompts=8", "rollout.n=4") for part in ("--set", key)]


def test_a_step_and_the_best_split_follow_from_a_run(run: Path) -> None:
    done = plan(*settings(*LAG), "--measured", str(run), "--gpus", "8")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        "measured in steps 3 to 7: 2 workers sampled 640 tokens in 8 s (40 tokens/s each), 1 learner process "
        "learned from them in 3 s, a push took 1 s",
        "sampling and learning go on at once: a step is the slower one of the two, and the push",
        "step 9 s with 2 workers and 1 learner process (sampling 8, learning 3, push 1); "
        "bottleneck: sampling",
        # 16 worker seconds and 3 of a learner: the slower one of 16 / 6 and 3 / 2, and the push
        "best split of 8 GPUs: 2 learn, 6 sample: 3.67 s a step, by rates as measured; grading and "
        "evaluations not included",
    ]


def test_the_recipes_own_numbers_decide(run: Path) -> None:
    """Half the samples, four workers, and no overlap; as JSON."""
    keys = ["--set", "rollout.engine=vllm_server", "--set", "rollout.workers={count: 4}"]
    keys += ["--set", "rollout.prompts=4", "--set", "rollout.n=4"]
    content = json.loads(plan(*keys, "--measured", str(run), "--gpus", "4", "--json").output)
    assert content["measured"]["steps"] == [3, 7] and content["measured"]["workers"] == 2
    seconds = {name: content[f"{name}_seconds"] for name in ("sampling", "learning", "push", "step")}
    assert seconds == {"sampling": 2.0, "learning": 1.5, "push": 1.0, "step": 4.5}
    assert (content["overlaps"], content["bottleneck"], content["workers"]) == (False, "sampling", 4)
    # 8 worker seconds and 1.5 of a learner, one after the other: 8 / 3 + 1.5 of 8 / 2 + 0.75
    assert content["split"] == {"gpus": 1, "server_gpus": 3, "step_seconds": pytest.approx(8 / 3 + 2.5)}


@pytest.mark.parametrize(
    ("keys", "arguments", "error"),
    [
        ((), ["--gpus", "8"], "shares the learner's devices"),
        (LAG, ["--gpus", "8", "--gpu-gb", "80"], "predicts seconds, not memory"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    keys: tuple[str, ...], arguments: list[str], error: str, run: Path
) -> None:
    done = plan(*settings(*keys), "--measured", str(run), *arguments)
    assert done.exit_code != 0 and error in str(done.exception)


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    done = plan("--measured", str(tmp_path))
    assert done.exit_code != 0 and "no run folder with steps" in str(done.exception)


def test_a_run_of_data_has_nothing_to_divide(run: Path) -> None:
    recipe = str(RECIPE.parents[1] / "preference/dpo.yaml")
    done = CliRunner().invoke(app, ["plan", recipe, "--measured", str(run)])
    assert done.exit_code != 0 and "kind offline samples nothing" in str(done.exception)
