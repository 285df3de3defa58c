"""The README.md of an exported model: facts from the recipe and numbers from the run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

import rltrain

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Published:
    """What the card of a model on the Hub says besides.

    repository: its name there. environment: of the run (environment.json). recipe: the YAML of the resolved
    recipe, which lies beside the card. license: of the base model; None: unknown. curves: file of the curves;
    None: there is none. adapter: whether the model is a LoRA adapter of its base.
    """

    repository: str
    environment: Mapping[str, Any]
    recipe: str
    license: str | None = None
    curves: str | None = None
    adapter: bool = False


def model_card(
    recipe: Mapping[str, Any], metrics: Mapping[str, float], steps: int, published: Published | None = None
) -> str:
    """The text of the card.

    recipe: the resolved recipe as plain data (``model_dump()``). metrics: final results by name; the metrics
    with ``_low`` and ``_high`` appended to a name become its interval. steps: the number taken, which may be
    smaller than the recipe planned. published: for a model on the Hub; None: the card of a local folder.
    """
    sections = [
        _header(recipe, metrics, published),
        f"# {_title(recipe)}\n\n{_summary(recipe, steps)}",
        f"## Training\n\n{_table(('setting', 'value'), _settings(recipe, steps))}",
    ]
    if metrics:
        sections.append(f"## Results\n\n{_table(('metric', 'value', '95 % interval'), _results(metrics))}")
    if published is not None and published.curves is not None:
        sections.append(f"![curves of the run]({published.curves})")
    if published is None:
        sections.append(_loading("path/to/this/folder"))
    else:
        loading = _adapter_loading if published.adapter else _loading
        sections += [loading(published.repository, recipe["model"]["path"]), _repetition(published)]
    return "\n\n".join(sections) + "\n"


def _header(recipe: Mapping[str, Any], metrics: Mapping[str, float], published: Published | None) -> str:
    """The YAML header. The Hub reads base_model and datasets as names on the Hub: a local path is left
    out.
    """
    base = recipe["model"]["path"]
    data = recipe["data"]["train"]
    is_adapter = published is not None and published.adapter
    facts: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rltrain", _method(recipe)],
    }
    if published is not None and published.license is not None:
        facts["license"] = published.license
    if _is_hub_name(base):
        facts["base_model"] = base
        facts["base_model_relation"] = "adapter" if is_adapter else "finetune"
    if _is_hub_name(data):
        facts["datasets"] = [data]
    if results := _eval_results(recipe, metrics):
        card = ModelCardData(model_name=_title(recipe), eval_results=results)
        facts["model-index"] = card.to_dict()["model-index"]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False).strip()}\n---"


def _eval_results(recipe: Mapping[str, Any], metrics: Mapping[str, float]) -> list[EvalResult]:
    """The last evaluation for the Hub's tables, which hold one number each: the interval and the value before
    training are in the metric's name.
    """
    data = recipe["data"]
    origin = data["eval"] or data["train"]
    name = origin if _is_hub_name(origin) else Path(origin).stem
    results = []
    for metric, value in metrics.items():
        if not metric.startswith("eval/") or " " in metric or metric.endswith(("_low", "_high")):
            continue
        if not math.isfinite(value):
            continue
        low, high = (metrics.get(f"{metric}_{end}") for end in ("low", "high"))
        before = metrics.get(f"{metric} (before)")
        words = [metric.removeprefix("eval/")]
        words += [] if low is None or high is None else [f"95 % interval {low:.4g} to {high:.4g}"]
        words += [] if before is None else [f"before training {before:.4g}"]
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=name,
                dataset_config=data["eval_subset"] or data["subset"],
                dataset_split=data["eval_split"],
                metric_type=metric.removeprefix("eval/"),
                metric_value=round(value, 6),
                metric_name=", ".join(words),
            )
        )
    return results


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


def _loading(place: str, base: str = "") -> str:
    del base  # the model is whole
    return (
        "## Loading\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        "```\n\n"
        f"`vllm serve {place}` serves it; `peft.get_peft_model(model, LoraConfig(...))` puts an adapter on "
        "it. The run's `recipe.resolved.yaml` states every setting."
    )


def _adapter_loading(place: str, base: str) -> str:
    return (
        "## Loading\n\n"
        f"An adapter of `{base}`:\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        "```\n\n"
        f"`vllm serve {base} --enable-lora --lora-modules {Path(place).name}={place}` serves it; "
        "`model.merge_and_unload()` makes a whole model of both. The run's `recipe.resolved.yaml` states "
        "every setting."
    )


def _repetition(published: Published) -> str:
    environment = published.environment
    commit = environment.get("commit")
    version = environment.get("rltrain", rltrain.__version__)
    rows = [
        ("rltrain", version if commit is None else f"{version}, commit {commit}"),
        ("started", environment.get("started", "")),
        ("Python", environment.get("python", "")),
        *environment.get("packages", {}).items(),
    ]
    known = [(name, str(value)) for name, value in rows if value]
    return (
        "## Repeat it\n\n"
        f"{_table(('software', 'version'), known)}\n\n"
        "`rltrain train recipe.resolved.yaml` with the file beside this card, which is:\n\n"
        f"<details><summary>recipe.resolved.yaml</summary>\n\n```yaml\n{published.recipe.strip()}\n```\n\n"
        "</details>"
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
