"""recipes/sources.json: what the authors' scripts say, key by key. A recipe has the same value, or says in
the comment at its top why it has another. A number of ours that no source states is listed as "unstated",
with where it comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rltrain.config.load import load_recipe

ROOT = Path(__file__).parents[2] / "recipes"
# recipe -> what its source says, or a sentence on why there is none
SOURCES: dict[str, list[dict[str, Any]] | str] = json.loads((ROOT / "sources.json").read_text("utf-8"))
FOLDERS = ("policy", "preference", "process_reward", "supervised")
NAMES = sorted(
    str(path.relative_to(ROOT).with_suffix(""))
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.yaml")
)
WITH_SOURCE = sorted(name for name, entries in SOURCES.items() if not isinstance(entries, str))
COMMENT = "# Differs from the source (recipes/sources.json):\n"
SAME = "same"
RESULT = "about.expected"  # its values are quotations: the text contains them


def value_at(recipe: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; in a list of methods, a part of the key is a method's name. Raises KeyError
    with the part that does not exist.
    """
    value: Any = recipe
    for part in key.split("."):
        if isinstance(value, list):
            value = {method["name"]: method for method in value}
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(f"{key}: there is no {part!r}")
        value = value[part]
    return value


def reasons_in(text: str) -> list[str]:
    """The bullets of the comment at the top of a recipe, each as one line."""
    if not text.startswith(COMMENT):
        return []
    bullets: list[str] = []
    for line in text.removeprefix(COMMENT).splitlines():
        if line.startswith("# - "):
            bullets.append(line.removeprefix("# - "))
        elif line.startswith("#   "):
            bullets[-1] += f" {line.removeprefix('#   ')}"
        else:
            break
    return bullets


def differences(recipe: Mapping[str, Any], text: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything in which a recipe and its source differ, or are declared to, against the other."""
    problems = []
    reasons = reasons_in(text)
    entries = [entry for entry in entries if "unstated" not in entry]
    for entry in entries:
        name = entry.get("key") or entry["feature"]
        if entry["ours"] != SAME and f"{name}: {entry['ours']}" not in reasons:
            problems.append(f"{name}: the recipe's comment does not say: {entry['ours']}")
        if "key" not in entry:
            continue
        ours = value_at(recipe, entry["key"])
        agrees = entry["value"] in " ".join(ours.split()) if name == RESULT else ours == entry["value"]
        if agrees != (entry["ours"] == SAME):
            problems.append(f"{name}: {ours!r} here, {entry['value']!r} in the source, said: {entry['ours']}")
    stated = {f"{entry.get('key') or entry['feature']}: {entry['ours']}" for entry in entries}
    problems += [f"not in sources.json: {reason}" for reason in reasons if reason not in stated]
    return problems


def test_every_recipe_names_its_source_or_says_why_there_is_none() -> None:
    assert sorted(SOURCES) == NAMES
    assert all(entries for entries in SOURCES.values())
    assert len(WITH_SOURCE) >= 70


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_a_recipe_has_its_sources_values_or_says_why_not(name: str) -> None:
    path = ROOT / f"{name}.yaml"
    entries = SOURCES[name]
    assert not isinstance(entries, str)
    recipe = load_recipe(path).model_dump(mode="json")
    assert differences(recipe, path.read_text("utf-8"), entries) == []


@pytest.mark.parametrize("name", sorted(set(SOURCES) - set(WITH_SOURCE)))
def test_a_recipe_without_a_source_declares_no_difference_from_one(name: str) -> None:
    assert reasons_in((ROOT / f"{name}.yaml").read_text("utf-8")) == []


def numbers_of_methods(recipe: Mapping[str, Any]) -> Iterator[str]:
    """The dotted keys of the numbers that a recipe writes beside its methods' names."""
    methods = {"advantage": recipe.get("advantage")}
    methods |= {f"loss.{name}": recipe["loss"].get(name) for name in ("policy", "preference")}
    for key, listed in (("control", recipe.get("control")), ("loss.terms", recipe["loss"].get("terms"))):
        methods |= {f"{key}.{method['name']}": method for method in listed or ()}
    for key, method in methods.items():
        for name, value in (method or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield f"{key}.{name}"


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_every_number_of_a_method_and_the_learning_rate_have_a_source_or_none_states_them(name: str) -> None:
    entries = SOURCES[name]
    assert not isinstance(entries, str)
    recipe = load_recipe(ROOT / f"{name}.yaml").model_dump(mode="json")
    listed = {entry.get("key") for entry in entries}
    assert {*numbers_of_methods(recipe), "learner.optimizer.lr"} - listed == set()
    unstated = [entry["key"] for entry in entries if "unstated" in entry]
    for key in unstated:
        value_at(recipe, key)  # it is still there
    assert len(set(unstated)) == len(unstated)


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_evidence_can_be_looked_up(name: str) -> None:
    entries = SOURCES[name]
    assert not isinstance(entries, str)
    for entry in entries:
        if "unstated" in entry:
            assert set(entry) == {"key", "unstated"} and entry["unstated"]
            continue
        kind = "key" if "key" in entry else "feature"
        assert set(entry) - {"note"} == {kind, "value", "address", "commit", "ours"}
        assert entry["ours"]
        if entry["address"].startswith("arXiv "):
            assert re.fullmatch(r"arXiv \d{4}\.\d{5}:.+", entry["address"])
            assert entry["commit"] is None
        else:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+:[\w./-]+", entry["address"])
            assert re.fullmatch(r"[0-9a-f]{7,40}", entry["commit"])


TEXT = COMMENT + "# - loss.lr: twice as much there; the run is\n#   longer here\nextends: x\n"
RECIPE = {"loss": {"lr": 0.5, "terms": [{"name": "kl", "beta": 1.0}]}, "about": {"expected": "50 on\nAIME"}}


@pytest.mark.parametrize(
    ("key", "value", "ours", "problem"),
    [
        ("loss.lr", 1.0, "twice as much there; the run is longer here", None),
        (
            "loss.lr",
            0.5,
            "twice as much there; the run is longer here",
            "loss.lr: 0.5 here, 0.5 in the source",
        ),
        ("loss.lr", 1.0, "another reason", "loss.lr: the recipe's comment does not say: another reason"),
        ("loss.terms.kl.beta", 1.0, SAME, None),
        ("loss.terms.kl.beta", 2.0, SAME, "loss.terms.kl.beta: 1.0 here, 2.0 in the source"),
        (RESULT, "50 on AIME", SAME, None),
        (RESULT, "52 on AIME", SAME, "about.expected: '50 on\\nAIME' here"),
    ],
)
def test_a_difference_that_nobody_declared_is_seen(
    key: str, value: Any, ours: str, problem: str | None
) -> None:
    declared = {"key": "loss.lr", "value": 1.0, "ours": "twice as much there; the run is longer here"}
    entry = {"key": key, "value": value, "ours": ours}
    problems = differences(RECIPE, TEXT, [declared, entry])
    assert (problems == []) if problem is None else any(said.startswith(problem) for said in problems)


def test_a_declaration_without_evidence_and_a_key_that_is_gone_are_seen() -> None:
    reason = "loss.lr: twice as much there; the run is longer here"
    assert differences(RECIPE, TEXT, []) == [f"not in sources.json: {reason}"]
    for key in ("loss.rate", "loss.terms.entropy.beta"):
        with pytest.raises(KeyError, match="there is no"):
            differences(RECIPE, "extends: x\n", [{"key": key, "value": 1.0, "ours": SAME}])
