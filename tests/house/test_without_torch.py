"""What a process that only draws, samples, grades and plays needs is imported without torch."""

from __future__ import annotations

import json
import subprocess
import sys

WITHOUT_TORCH = (
    "rltrain.types.samples",  # prompt, completion, score, group
    "rltrain.protocols",
    "rltrain.config.capacity.report",  # does a recipe fit a cluster
    "rltrain.cli.plan",
    "rltrain.data.order",  # draw order, and its curriculum
    "rltrain.data.gain_rl",
    "rltrain.data.prompts",
    "rltrain.rollout.grading",
    "rltrain.rollout.groups",
    "rltrain.rollout.environments",
    "rltrain.rollout.environments.calculator",
    "rltrain.rollout.environments.episodes",
    "rltrain.rollout.environments.pool",
    "rltrain.rollout.environments.worker",
    "rltrain.reward.score",  # what graders read and answer
    "rltrain.reward.pool",
    "rltrain.reward.worker",
)


def test_modules_that_need_no_tensors_import_no_torch() -> None:
    code = (
        "import importlib, json, sys\n"
        "loads = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    loads[name] = 'torch' in sys.modules\n"
        "print(json.dumps(loads))"
    )
    command = [sys.executable, "-c", code, json.dumps(WITHOUT_TORCH)]
    loads = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [name for name, with_torch in loads.items() if with_torch] == []
