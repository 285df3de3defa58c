"""What the controller's process costs: it draws, samples, grades, and sends a step's completions to rank 0.

    python scripts/bench_controller.py [--json FILE] [--completions N] [--steps N]

The workers are those of ``bench_server.py``, which answer at once; a reward process grades by a user's
function. One JSON object:

completions_per_s: from ``take`` until rank 0 holds the groups, median over steps of ``--completions``.
pool_s, reward_s: of it, what the controller spends sampling and grading.
in_flight, peak_mib: completions under way at once, and the controller's largest memory since its start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_server import TOKENS, WORKERS, CannedHome

from rltrain.build.controller import ControllerSetup, start_controller
from rltrain.build.tiny_model import character_tokenizer
from rltrain.config.load import load_recipe
from rltrain.data.chat import StopTokens
from rltrain.data.tokenization import Tokenization
from rltrain.process import ALONE
from rltrain.rollout.controller import Controller, unpack_rollouts
from rltrain.rollout.worker.flags import worker_settings
from rltrain.rollout.worker.guard import SHORTEST_TOKEN, TOKEN
from rltrain.types.samples import Prompt

RECIPE = Path(__file__).parents[1] / "recipes/policy/grpo.yaml"
GROUP = 8
REWARD = """
from rltrain.reward.score import Score

def half(inputs):
    return [Score(float(place % 2)) for place in range(len(inputs.completions))]
"""


def make_setup(folder: Path, homes: Sequence[CannedHome], completions: int) -> ControllerSetup:
    tokenizer = character_tokenizer()
    (folder / "half.py").write_text(REWARD)
    urls = ", ".join(f"'unix:{home.path}'" for home in homes)
    overrides = (
        "rollout.engine=vllm_server",
        f"rollout.workers={{urls: [{urls}]}}",
        f"rollout.prompts={completions // GROUP}",
        f"rollout.n={GROUP}",
        f"rollout.max_tokens={TOKENS}",
        "rollout.dynamic_sampling=null",
        f"reward.functions=['{folder / 'half.py'}:half']",
        "reward.workers=1",
    )
    recipe: Any = load_recipe(RECIPE, profile="tiny_cpu", overrides=overrides)
    ends: Any = tokenizer.eos_token_id
    stop = StopTokens((ends,), ends, True)
    prompts = tuple(Prompt(f"p{place}", (5, 6, 7, 8), "1+1=") for place in range(completions // GROUP))
    return ControllerSetup(
        data=recipe.data,
        rollout=recipe.rollout,
        reward=recipe.reward,
        settings=worker_settings(recipe.model, recipe.data, recipe.rollout, "float32", on_gpu=False),
        tokenization=Tokenization(tokenizer, stop, len(tokenizer)),
        prompts=prompts,
        known={prompt.id: prompt for prompt in prompts},
        seed=0,
        deadline_seconds=600.0,
        rewards_log=folder / "rewards.log",
        timeline=folder / "timeline.jsonl",
    )


def take(controller: Controller, step: int, setup: ControllerSetup, completions: int) -> dict[str, float]:
    """Seconds of a step."""
    start = time.perf_counter()
    packed, _ = controller.call("take", step, 0)
    rollouts = unpack_rollouts(packed, setup.known)
    seconds = time.perf_counter() - start
    assert sum(len(group.completions) for group in rollouts.groups) == completions
    return {"all": seconds, **rollouts.seconds}


def hold_all(homes: Sequence[CannedHome], controller: Controller, completions: int) -> int:
    """Completions that are under way at once in a step, which rank 0 does not wait for."""
    for home in homes:
        home.ask("hold")
    controller.ask("take", 1, 0)
    under_way = 0
    while under_way < completions and controller.process.poll() is None:
        time.sleep(0.05)
        under_way = sum(home.ask("count") for home in homes)
    return under_way


def peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def measure(folder: Path, completions: int, steps: int) -> dict[str, float]:
    tokenizer = character_tokenizer()
    ids = [place for place in range(TOKENS + 8) if place not in tokenizer.all_special_ids]
    answer = [ids[place % len(ids)] for place in range(TOKENS)]
    homes = [CannedHome(folder / f"{place}", completions // WORKERS, ids=answer) for place in range(WORKERS)]
    setup = make_setup(folder, homes, completions)
    controller, _ = start_controller(setup, ALONE)
    assert controller is not None
    try:
        served = controller.call("begin_push", False)
        controller.call("end_push", 0, list(served), {}, {})
        under_way = hold_all(homes, controller, completions)
        for home in homes:
            home.ask("free")
        kind, value = controller.wait()
        assert kind == "result", value
        rows = [take(controller, step, setup, completions) for step in range(2, steps + 2)]
        peak = peak_mib(controller.process.pid)
    finally:
        controller.close()
        for home in homes:
            home.close()
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {
        "completions_per_s": completions / medians["all"],
        "pool_s": medians["rollout"],
        "reward_s": medians["reward"],
        "in_flight": float(under_way),
        "peak_mib": peak,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--completions", type=int, default=10_000, metavar="N", help="of a step")
    parser.add_argument("--steps", type=int, default=5, metavar="N")
    chosen = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ[TOKEN] = "x" * SHORTEST_TOKEN
    results: dict[str, Any] = {"machine": platform.platform(), "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        results |= measure(Path(name), chosen.completions // GROUP * GROUP, chosen.steps)
    results["load"] = round(os.getloadavg()[0], 1)
    rounded = {key: round(each, 3) if isinstance(each, float) else each for key, each in results.items()}
    text = json.dumps(rounded, indent=1)
    print(text)
    if chosen.json is not None:
        chosen.json.write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
