"""The README.md of an exported model: facts from the recipe and numbers from the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import rltrain

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(recipe: Mapping[str, Any], metrics: Mapping[str, float], steps: int) -> str:
    """The text of the card.

    recipe: the resolved recipe as plain data (``model_dump()``). metrics: final results by name; the metrics
    with ``_low`` and ``_high`` appended to a name become its interval. steps: the number taken, which may be
    smaller than the recipe planned.
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
    """The YAML header. The Hub reads base_model and datasets as names on the Hub: a local path is left
    out.
    """
    base = recipe["model"]["path"]
    data = recipe["data"]["train"]
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rltrain", _method(recipe)],
    }
    if _is_hub_name(base):
        facts["base_model"] = base
    if _is_hub_name(data):
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
    how = "with reinforcement learning on"
    if _is_offline(recipe):
        how = "on judged completions from"
    if _is_pair_run(recipe):
        how = "on judged pairs of its own answers to"
    return (
        f"`{recipe['model']['path']}` post-trained {how} `{recipe['data']['train']}` "
        f"for {steps} steps by rltrain {rltrain.__version__}.{paper}"
    )


def _settings(recipe: Mapping[str, Any], steps: int) -> list[tuple[str, str]]:
    if _is_offline(recipe):
        return _offline_settings(recipe, steps)
    if _is_pair_run(recipe):
        return _pair_settings(recipe, steps)
    rollout = recipe["rollout"]
    optimizer = recipe["learner"]["optimizer"]
    loss = recipe["loss"]
    rows = [
        ("steps", f"{steps} of {recipe['train']['steps']}"),
        ("prompts x completions per step", f"{rollout['prompts']} x {rollout['n']}"),
        ("sampling temperature", f"{rollout['temperature']:g}"),
        ("completion tokens, at most", str(rollout["max_tokens"])),
        (
            "rewards",
            ", ".join(f"{named['name']} x {named['weight']:g}" for named in recipe["reward"]["functions"]),
        ),
        ("advantage", _method_text(recipe["advantage"])),
        ("controls", ", ".join(map(_method_text, recipe["control"]))),
        ("policy loss", _method_text(loss["policy"])),
        ("loss terms", ", ".join(map(_method_text, loss["terms"]))),
        ("aggregate", _method_text(loss["aggregate"])),
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
    optimizer = recipe["learner"]["optimizer"]
    data = recipe["data"]
    train = recipe["train"]
    return [
        ("steps", str(steps)),
        ("examples per step", str(train["examples"])),
        ("loss", _method_text(recipe["loss"]["preference"])),
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
    rollout = recipe["rollout"]
    optimizer = recipe["learner"]["optimizer"]
    pairs = recipe["pairs"]
    return [
        ("steps", f"{steps} of {recipe['train']['steps']}"),
        ("prompts x completions per step", f"{rollout['prompts']} x {rollout['n']}"),
        ("sampling temperature", f"{rollout['temperature']:g}"),
        ("completion tokens, at most", str(rollout["max_tokens"])),
        (
            "rewards",
            ", ".join(f"{named['name']} x {named['weight']:g}" for named in recipe["reward"]["functions"]),
        ),
        ("judge", _method_text(pairs["judge"])),
        ("pairs", f"{pairs['choose']}, the {pairs['verdict']} winner chosen"),
        ("loss", _method_text(recipe["loss"]["preference"])),
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
    """Rows of the results table; the interval of ``name (note)`` is in ``name_low (note)`` and ``name_high
    (note)``.
    """
    bounds = {name: [_append_to_name(name, end) for end in ("_low", "_high")] for name in metrics}
    bound_names = {key for keys in bounds.values() for key in keys}
    rows = []
    for name, value in metrics.items():
        if name in bound_names:
            continue
        low, high = (metrics.get(key) for key in bounds[name])
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        rows.append((name, f"{value:.4g}", interval))
    return rows


def _append_to_name(name: str, end: str) -> str:
    """``end`` appended to a name, before the note in parentheses behind it."""
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
    """The method: a preference loss, or an advantage and a policy loss."""
    if "preference" in recipe["loss"]:
        return recipe["loss"]["preference"]["name"]
    return f"{recipe['advantage']['name']}+{recipe['loss']['policy']['name']}"


def _is_offline(recipe: Mapping[str, Any]) -> bool:
    """Whether the run learned from completions that were judged before it started."""
    return "preference" in recipe["loss"] and not _is_pair_run(recipe)


def _is_pair_run(recipe: Mapping[str, Any]) -> bool:
    """Whether the run learned from pairs of its own completions."""
    return "pairs" in recipe


def _method_text(method: Mapping[str, Any]) -> str:
    """A method with its settings, like ``clip(eps_low=0.2, eps_high=0.28)``."""
    settings = ", ".join(f"{key}={value}" for key, value in method.items() if key != "name")
    return f"{method['name']}({settings})" if settings else method["name"]


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()
