"""The README.md of an exported model: the recipe's facts and the run's own numbers, nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import rltrain

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(recipe: Mapping[str, Any], metrics: Mapping[str, float], steps: int) -> str:
    """Card text.

    recipe: the resolved recipe as plain data (``model_dump()``). metrics: final results by name; ``_low`` and
    ``_high`` beside a name become its interval. steps: how many were taken, which may be fewer than the
    recipe planned.
    """
    sections = [
        _header(recipe),
        f"# {_title(recipe)}\n\n{_summary(recipe, steps)}",
        f"## Training\n\n{_table(('setting', 'value'), _settings(recipe, steps))}",
    ]
    if metrics:
        sections.append(f"## Results\n\n{_table(('metric', 'value', '95 % interval'), _results(metrics))}")
    sections.append(_loading())
    return "\n\n".join(sections) + "\n"


def _header(recipe: Mapping[str, Any]) -> str:
    """The Hub reads base_model and datasets as its own names: a local path is not one."""
    base, data = recipe["model"]["path"], recipe["data"]["train"]
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rltrain", _method(recipe)],
    }
    if _on_hub(base):
        facts["base_model"] = base
    if _on_hub(data):
        facts["datasets"] = [data]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False).strip()}\n---"


def _title(recipe: Mapping[str, Any]) -> str:
    return f"{Path(recipe['model']['path']).name} trained with {_method(recipe)}"


def _summary(recipe: Mapping[str, Any], steps: int) -> str:
    about = recipe["about"]
    source = f" ({about['title']})" if about["title"] else ""
    paper = (
        f" Method: [arXiv:{about['arxiv']}](https://arxiv.org/abs/{about['arxiv']}){source}."
        if about["arxiv"]
        else ""
    )
    how = "on judged completions from" if _offline(recipe) else "with reinforcement learning on"
    how = "on judged pairs of its own answers to" if _on_pairs(recipe) else how
    return (
        f"`{recipe['model']['path']}` post-trained {how} `{recipe['data']['train']}` "
        f"for {steps} steps by rltrain {rltrain.__version__}.{paper}"
    )


def _settings(recipe: Mapping[str, Any], steps: int) -> list[tuple[str, str]]:
    if _offline(recipe):
        return _offline_settings(recipe, steps)
    if _on_pairs(recipe):
        return _pair_settings(recipe, steps)
    rollout, optimizer, loss = recipe["rollout"], recipe["learner"]["optimizer"], recipe["loss"]
    rows = [
        ("steps", f"{steps} of {recipe['train']['steps']}"),
        ("prompts x completions per step", f"{rollout['prompts']} x {rollout['n']}"),
        ("sampling temperature", f"{rollout['temperature']:g}"),
        ("completion tokens, at most", str(rollout["max_tokens"])),
        (
            "rewards",
            ", ".join(f"{named['name']} x {named['weight']:g}" for named in recipe["reward"]["functions"]),
        ),
        ("advantage", _named(recipe["advantage"])),
        ("controls", ", ".join(map(_named, recipe["control"]))),
        ("policy loss", _named(loss["policy"])),
        ("loss terms", ", ".join(map(_named, loss["terms"]))),
        ("aggregate", _named(loss["aggregate"])),
        (
            "learning rate",
            f"{optimizer['lr']:g} ({optimizer['schedule']}, {optimizer['warmup_steps']} warm-up updates)",
        ),
        ("updates x epochs per step", f"{recipe['learner']['updates']} x {recipe['learner']['epochs']}"),
        ("engine", rollout["engine"]),
        ("seed", str(recipe["seed"])),
    ]
    return [(name, value) for name, value in rows if value]


def _offline_settings(recipe: Mapping[str, Any], steps: int) -> list[tuple[str, str]]:
    optimizer, data, train = recipe["learner"]["optimizer"], recipe["data"], recipe["train"]
    return [
        ("steps", str(steps)),
        ("examples per step", str(train["examples"])),
        ("loss", _named(recipe["loss"]["preference"])),
        ("reference model", recipe["model"]["reference"] or recipe["model"]["path"]),
        (
            "prompt and completion tokens, at most",
            f"{data['max_prompt_tokens']} and {data['max_completion_tokens']}",
        ),
        (
            "learning rate",
            f"{optimizer['lr']:g} ({optimizer['schedule']}, {optimizer['warmup_steps']} warm-up updates)",
        ),
        ("seed", str(recipe["seed"])),
    ]


def _pair_settings(recipe: Mapping[str, Any], steps: int) -> list[tuple[str, str]]:
    rollout, optimizer, pairs = recipe["rollout"], recipe["learner"]["optimizer"], recipe["pairs"]
    return [
        ("steps", f"{steps} of {recipe['train']['steps']}"),
        ("prompts x completions per step", f"{rollout['prompts']} x {rollout['n']}"),
        ("sampling temperature", f"{rollout['temperature']:g}"),
        ("completion tokens, at most", str(rollout["max_tokens"])),
        (
            "rewards",
            ", ".join(f"{named['name']} x {named['weight']:g}" for named in recipe["reward"]["functions"]),
        ),
        ("judge", _named(pairs["judge"])),
        ("pairs", f"{pairs['choose']}, the {pairs['verdict']} winner chosen"),
        ("loss", _named(recipe["loss"]["preference"])),
        ("reference model", recipe["model"]["reference"] or recipe["model"]["path"]),
        ("previous iterate renewed every", f"{recipe['train']['previous_every']} steps"),
        (
            "learning rate",
            f"{optimizer['lr']:g} ({optimizer['schedule']}, {optimizer['warmup_steps']} warm-up updates)",
        ),
        ("updates x epochs per step", f"{recipe['learner']['updates']} x {recipe['learner']['epochs']}"),
        ("engine", rollout["engine"]),
        ("seed", str(recipe["seed"])),
    ]


def _results(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """``name (note)`` finds its interval at ``name_low (note)`` and ``name_high (note)``."""
    bounds = {name: [_ended(name, end) for end in ("_low", "_high")] for name in metrics}
    are_bounds = {key for keys in bounds.values() for key in keys}
    rows = []
    for name, value in metrics.items():
        if name in are_bounds:
            continue
        low, high = (metrics.get(key) for key in bounds[name])
        rows.append((name, f"{value:.4g}", "" if low is None or high is None else f"{low:.4g} to {high:.4g}"))
    return rows


def _ended(name: str, end: str) -> str:
    stem, space, note = name.partition(" ")
    return f"{stem}{end}{space}{note}"


def _loading() -> str:
    return (
        "## Loading\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "path/to/this/folder"\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "```\n\n"
        "`vllm serve path/to/this/folder` serves it. The run folder's `recipe.resolved.yaml` states every "
        "setting."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _method(recipe: Mapping[str, Any]) -> str:
    """What was optimised."""
    if "preference" in recipe["loss"]:
        return recipe["loss"]["preference"]["name"]
    return f"{recipe['advantage']['name']}+{recipe['loss']['policy']['name']}"


def _offline(recipe: Mapping[str, Any]) -> bool:
    """Whether it learned from judged completions that somebody gave beforehand."""
    return "preference" in recipe["loss"] and not _on_pairs(recipe)


def _on_pairs(recipe: Mapping[str, Any]) -> bool:
    """Whether it learned from pairs of its own completions."""
    return "pairs" in recipe


def _named(method: Mapping[str, Any]) -> str:
    """``clip(eps_low=0.2, eps_high=0.28)``."""
    settings = ", ".join(f"{key}={value}" for key, value in method.items() if key != "name")
    return f"{method['name']}({settings})" if settings else method["name"]


def _on_hub(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()
