"""The top of a run's page: what ran, what it changed, and what it cost."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rltrain.analysis.curves import Curves, Spread
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.config.load import schema_of
from rltrain.report.names import metric

_LESS_IS_BETTER = ("eval/loss", "eval/brier", "eval/ece", "eval/ungraded")
_MORE_IS_BETTER = (
    *("eval/pass@", "eval/avg@", "eval/accuracy", "eval/reward", "eval/margin"),
    *("reward/", "loss/accuracy"),
)
_MEASURES = ("eval/pass@", "eval/avg@", "eval/accuracy", "eval/reward", "eval/margin", "eval/loss")
_FURTHER_MEASURES = ("eval/brier", "eval/ece", "eval/entropy", "eval/sampled_entropy", "eval/tokens")
_TRAINING = {
    "reward/mean": "training reward",
    "loss/accuracy": "training accuracy",
    "learner/entropy_mean": "training entropy",
    "rollout/length_mean": "training length",
}


@dataclass(frozen=True)
class Change:
    """A measure before and after training."""

    name: str
    unit: str
    before: Spread | None
    after: Spread
    better: int  # 1: the change is for the better, -1: for the worse, 0: neither, or it has no direction
    apart: bool  # whether the two intervals have no value in common


@dataclass(frozen=True)
class Setting:
    """A key of the recipe. default: None where the schema has none, or the recipe cannot be read."""

    key: str
    value: str
    default: str | None


@dataclass(frozen=True)
class RunFacts:
    title: str
    facts: tuple[tuple[str, str], ...]  # (label, value)
    settings: tuple[Setting, ...]  # keys that differ from the defaults
    is_current: bool  # whether this version of rltrain reads the recipe, so that defaults are known


def read_facts(folder: RunFolder) -> RunFacts:
    """What the run's recipe and environment say. Files that are not there leave their facts out."""
    recipe = _read_mapping(folder.recipe)
    environment = _read_mapping(folder.environment)
    about = recipe.get("about") or {}
    settings, is_current = changed_settings(recipe)
    facts = {
        "method": _method(recipe),
        "paper": f"arXiv:{about['arxiv']}" if about.get("arxiv") else "",
        "model": _value(recipe, "model.path"),
        "data": " -> held-out ".join(
            dict.fromkeys(filter(None, (_value(recipe, "data.train"), _value(recipe, "data.eval"))))
        ),
        "engine": _value(recipe, "rollout.engine"),
        "seed": _value(recipe, "seed"),
        "date": _start_date(environment, folder.environment),
        "rltrain": " ".join(filter(None, (environment.get("rltrain"), environment.get("commit")))),
        "command": environment.get("command", ""),
        "machine": ", ".join(
            filter(None, (environment.get("platform"), _count_cpus(environment), environment.get("device")))
        ),
        "packages": ", ".join(
            f"{name} {version}" for name, version in environment.get("packages", {}).items()
        ),
    }
    return RunFacts(
        str(about.get("title") or folder.path.name),
        tuple((label, value) for label, value in facts.items() if value),
        settings,
        is_current,
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return content if isinstance(content, dict) else {}


def _value(recipe: Mapping[str, Any], key: str) -> str:
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return "" if value is None else str(value)


def _method(recipe: Mapping[str, Any]) -> str:
    """Advantage, controls, loss and terms, by name."""
    loss = recipe.get("loss") or {}
    refs = [
        recipe.get("advantage"),
        *(recipe.get("control") or ()),
        loss.get("policy"),
        loss.get("preference"),
    ]
    refs += loss.get("terms") or ()
    names = [ref.get("name") if isinstance(ref, Mapping) else ref for ref in refs]
    return " + ".join(str(name) for name in names if name)


def _start_date(environment: Mapping[str, Any], path: Path) -> str:
    """When the run started: what it noted, or the time of its file."""
    if "started" in environment:
        return str(environment["started"])
    if not path.is_file():
        return ""
    moment = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC (of the file)"


def _count_cpus(environment: Mapping[str, Any]) -> str:
    return f"{environment['cpus']} CPUs" if environment.get("cpus") else ""


def changed_settings(recipe: Mapping[str, Any]) -> tuple[tuple[Setting, ...], bool]:
    """Keys whose values are not the schema's defaults, and True; every key and False if the schema does not
    read the recipe.
    """
    schema = schema_of(recipe)
    try:
        known = schema.model_validate(recipe)
    except ValidationError:
        return tuple(Setting(key, value, None) for key, value in sorted(_flatten(recipe))), False
    changed = dict(_flatten(known.model_dump(mode="json", exclude_defaults=True)))
    defaults = dict(_flatten(_defaults(schema)))
    settings = (
        Setting(key, value, defaults.get(key))
        for key, value in changed.items()
        if defaults.get(key) != value and not key.startswith("about.")
    )
    return tuple(settings), True


def _defaults(schema: Any) -> dict[str, Any]:
    """The defaults of a section and of the sections below it, as far as they have any."""
    values: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            values[name] = default.model_dump(mode="json") if hasattr(default, "model_dump") else default
        elif hasattr(field.annotation, "model_fields"):
            values[name] = _defaults(field.annotation)
    return values


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value, default=str)


# before and after -------------------------------------------------------------------------------------------


def list_changes(curves: Curves) -> list[Change]:
    """Held-out measures before the first step and at the end, with their intervals; then means of the first
    and the last tenth of the steps.
    """
    changes = []
    for name in _ordered_measures(curves):
        after = curves.final(name)
        if after is not None:
            changes.append(_change(name, name.partition("/")[2], curves.first(name), after))
    for name, label in _TRAINING.items():
        values = curves.series(name)[1]
        if len(values) > 1:
            tenth = max(1, len(values) // 10)
            before = statistics.fmean(values[:tenth])
            after = statistics.fmean(values[-tenth:])
            changes.append(_change(name, label, _plain(before), _plain(after)))
    return changes


def _ordered_measures(curves: Curves) -> list[str]:
    names = sorted({name for line in curves.evals for name in line if name.startswith("eval/")})
    chosen = (*_MEASURES, *_FURTHER_MEASURES)
    ordered = [
        name
        for start in chosen
        for name in names
        if name == start or ("@" in start and name.startswith(start))
    ]
    return [name for name in ordered if not name.endswith(("_low", "_high"))]


def _change(name: str, label: str, before: Spread | None, after: Spread) -> Change:
    difference = 0.0 if before is None else after.value - before.value
    better = direction_of(name) * ((difference > 0) - (difference < 0))
    apart = before is not None and (after.low > before.high or after.high < before.low)
    return Change(label, metric(name).unit, before, after, better, apart)


def direction_of(name: str) -> int:
    """1 if more of the metric is better, -1 if less is, 0 if neither can be said."""
    return 1 if name.startswith(_MORE_IS_BETTER) else -1 if name.startswith(_LESS_IS_BETTER) else 0


def _plain(value: float) -> Spread:
    return Spread(value, math.nan, math.nan)


# cost -------------------------------------------------------------------------------------------------------


def list_costs(curves: Curves) -> list[tuple[str, float, str]]:
    """(what, amount, unit) of the whole run; unit "s" is wall-clock time."""

    def total(name: str) -> float:
        return sum(curves.series(name)[1])

    costs = [("steps", float(len(curves.steps)), ""), ("training time", total("time/step"), "s")]
    costs += [
        (label, total(name), unit)
        for label, name, unit in (
            ("evaluation time", "time/eval", "s"),
            ("completions sampled", "rollout/completions", ""),
            ("tokens sampled", "rollout/tokens", ""),
            ("tokens read in gradient passes", "learner/trained_tokens", ""),
            ("updates left out as not finite", "learner/skipped_updates", ""),
        )
        if total(name)
    ]
    rate = curves.series("time/tokens_per_second")[1]
    return [*costs, *([("tokens a second, median step", statistics.median(rate), "")] if rate else [])]
