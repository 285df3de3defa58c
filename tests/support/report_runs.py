"""Run folders as a run leaves them, for the tests of pages: metrics, transcripts, recipe and environment."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rltrain.report.sinks import JsonLines
from rltrain.timeline import Timeline

RECIPE = """\
about: {title: "GRPO <b>small</b>", arxiv: "2402.03300"}
seed: 3
model: {path: models/tiny}
data: {train: arithmetic, eval: arithmetic}
rollout: {engine: transformers, prompts: 4, n: 2, max_tokens: 8}
reward: {functions: [{name: math_answer}]}
advantage: {name: group_norm}
loss: {policy: {name: clip}, aggregate: {name: token_mean}}
learner: {optimizer: {lr: 0.0001}, tokens_per_micro_batch: 512}
train: {steps: 100}
"""
ENVIRONMENT = {"rltrain": "0.2.0", "commit": "abc123", "started": "2026-11-30 02:00 UTC", "cpus": 2}


def evaluation(step: int, accuracy: float) -> dict[str, float]:
    bounds = {"eval/pass@1_low": accuracy - 0.05, "eval/pass@1_high": accuracy + 0.05}
    return {"eval/pass@1": accuracy, "eval/reward": accuracy, **bounds, "time/eval": 1.0}


def training_step(step: int, *, gain: float = 0.3, shift: float = 0.0) -> dict[str, float]:
    entropy = 0.1 + math.exp(-step / 40) + 0.02 * math.sin(step)
    reward = 0.9 - gain * math.exp(entropy) * 0.7 + shift
    return {
        "rollout/completions": 8.0,
        "rollout/tokens": 32.0,
        "rollout/length_mean": 4.0,
        "rollout/mismatch_abs": 1e-6,
        "reward/mean": reward,
        "reward/correct": reward,
        "learner/entropy_mean": entropy,
        "learner/entropy_p10": 0.01,
        "learner/entropy_p90": 2 * entropy,
        "advantage/logp_covariance": 0.2,
        "control/clip_cov_touched": 0.02,
        "learner/trained_tokens": 64.0,
        "time/rollout": 1.0,
        "time/update": 0.5,
        "time/step": 1.5,
        "time/tokens_per_second": 21.0,
        "memory/process": 0.5,
        "memory/process_peak": 0.75,
    }


def completion(text: str, score: float | None, **fields: Any) -> dict[str, Any]:
    """A completion as ``Transcripts`` writes it; None: ungraded after a timeout."""
    parts = {} if score is None else {"math_answer": score, "correct": score}
    return {
        "text": text,
        "score": score,
        "parts": parts,
        "ungraded": "timeout" if score is None else None,
        "finish": "stop",
        "tokens": len(text),
        "version": 0,
        "source": 0,
        **fields,
    }


def group(step: int, name: str, *completions: dict[str, Any], stage: str = "rollout") -> dict[str, Any]:
    return {
        "step": step,
        "stage": stage,
        "group": 0,
        "prompt_id": name,
        "prompt": f"What is {name}?",
        "completions": list(completions),
    }


def write_run(folder: Path, steps: int = 100, shift: float = 0.0) -> Path:
    """A run with an evaluation every 25 steps, one number that is not finite, and four kept prompts."""
    folder.mkdir(parents=True)
    (folder / "recipe.resolved.yaml").write_text(RECIPE)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    metrics = JsonLines(folder / "metrics.jsonl")
    metrics.log(0, evaluation(0, 0.4))
    for step in range(1, steps + 1):
        kl = math.nan if step == 2 else 0.01
        metrics.log(step, training_step(step, shift=shift) | {"loss/kl": kl})
        if step % 25 == 0:
            metrics.log(step, evaluation(step, 0.4 + 0.3 * step / steps + shift))
    metrics.close()

    timeline = Timeline(folder / "timeline.jsonl")
    for step in range(10):
        start = 1000.0 + 6 * step
        timeline.add("worker", "sample", start, start + 4, requests=2)
        timeline.add("learner", "wait", start, start + 4, step=step + 1)
        timeline.add("learner", "learn", start + 4, start + 5, step=step + 1)
        timeline.add("pushes", "push", start + 5, start + 6, version=step + 1)

    transcripts = JsonLines(folder / "transcripts.jsonl")
    numbers = {
        "text": ["1", "2", ""],
        "entropy": [0.1, 2.0, None],
        "weight": [1.0, 0.0, 1.0],
        "touched": [1.0, 0.0, 0.0],
        "version": [3, 3, 4],
        "clip": [0.0, 2.0, 0.0],
    }
    shown = completion("12", 0.0, token_numbers=numbers) | {"tokens": 5}
    transcripts.append(group(1, "1+1", shown, completion("</script><b>4</b>", 0.0)))
    transcripts.append(group(1, "2+2", completion("4", 1.0), completion("no idea", None)))
    two_turns = {"turns": ["look it up", "it is 6"], "finish": "length"}
    transcripts.append(group(50, "3+3", completion("it is 6", 1.0, **two_turns), completion("7", 0.0)))
    transcripts.append(group(100, "1+1", completion("2", 1.0), completion("2", 1.0)))
    transcripts.close()
    return folder
