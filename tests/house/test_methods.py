"""What a registered method owes: a source, a known answer, and (a policy loss) a recipe that uses it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rltrain.advantage import ADVANTAGES
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES

ROOT = Path(__file__).parents[2]
# by the key under which a file of known_answers/ names a method of this kind
REGISTRIES = {
    **{
        "advantage": ADVANTAGES,
        "control": TOKEN_CONTROLS,
        "policy": POLICY_LOSSES,
        "term": LOSS_TERMS,
        "aggregate": AGGREGATES,
    },
    "preference": PREFERENCE_LOSSES,
    "coefficient": COEFFICIENTS,
}
METHODS = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.names()]

# Methods without an arXiv paper, with where they come from; the docstring says it too.
TEXTBOOK = {
    ("advantage", "none"): "by definition",
    ("policy", "reinforce"): "Williams 1992",
    ("term", "entropy"): "Williams and Peng 1991",
    ("aggregate", "seq_mean_token_sum"): "textbook",
    ("control", "tis"): "Ionides 2008",
    ("control", "mis"): "IcePop",
    ("control", "geometric_rejection"): "verl",
    ("control", "divergence_rejection"): "verl",
    ("preference", "cdpo"): "Mitchell 2023",
}


def recipes() -> dict[str, dict[str, Any]]:
    return {
        path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "recipes" / "policy").glob("*.yaml"))
    }


def named(reference: Any) -> str:
    """A method reference in a recipe is a name, or a mapping that has one."""
    return reference if isinstance(reference, str) else reference["name"]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_has_a_source(kind: str, name: str):
    spec = REGISTRIES[kind].spec(name)
    if (kind, name) in TEXTBOOK:
        assert spec.arxiv is None, "listed as without a paper, but has an arXiv id"
        assert TEXTBOOK[kind, name] in spec.doc
    else:
        assert spec.arxiv is not None and re.fullmatch(r"\d{4}\.\d{5}", spec.arxiv), (
            f"{spec.module}: {name} cites no arXiv id"
        )
        assert f"arXiv:{spec.arxiv}" in spec.doc, "the docstring cites the paper"


def test_the_list_of_methods_without_a_paper_has_no_dead_entry():
    assert set(METHODS) >= set(TEXTBOOK)


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_has_a_known_answer(kind: str, name: str):
    files = sorted((ROOT / "tests" / "known_answers").glob("*.json"))
    cases = [case for file in files for case in json.loads(file.read_text(encoding="utf-8"))["cases"]]
    assert any(kind in case and named(case[kind]) == name for case in cases), (
        f"add a case for {name} to a file of tests/known_answers/"
    )


def test_every_policy_loss_has_a_recipe():
    used = {named(recipe["loss"]["policy"]) for recipe in recipes().values() if "loss" in recipe}
    assert set(POLICY_LOSSES.names()) <= used


def preference_recipes() -> dict[str, Any]:
    """By file, the loss that a recipe for judged completions names."""
    files = [
        path
        for folder in ("preference", "process_reward", "supervised")
        for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))
    ]
    loaded = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    return {
        name: recipe["loss"]["preference"]
        for name, recipe in loaded.items()
        if "preference" in recipe.get("loss", {})
    }


def test_every_preference_loss_has_a_recipe():
    assert set(PREFERENCE_LOSSES.names()) <= {named(reference) for reference in preference_recipes().values()}


def test_preference_recipes_name_registered_losses_with_their_hyperparameters():
    for file, reference in preference_recipes().items():
        keys = set() if isinstance(reference, str) else set(reference) - {"name"}
        assert keys <= PREFERENCE_LOSSES.spec(named(reference)).hyperparameters.keys(), file


def test_recipes_name_registered_methods_with_their_hyperparameters():
    ours = {"name", "coefficient"}
    for file, recipe in recipes().items():
        loss = recipe.get("loss", {})
        references = [
            ("advantage", recipe.get("advantage")),
            ("policy", loss.get("policy")),
            ("aggregate", loss.get("aggregate")),
        ]
        references += [("control", control) for control in recipe.get("control", ())] + [
            ("term", term) for term in loss.get("terms", ())
        ]
        changing = [
            term["coefficient"]
            for term in loss.get("terms", ())
            if not isinstance(term["coefficient"], int | float)
        ]
        references += [("coefficient", name) for name in changing]
        for kind, reference in references:
            if reference is not None:
                keys = set() if isinstance(reference, str) else set(reference) - ours
                assert keys <= REGISTRIES[kind].spec(named(reference)).hyperparameters.keys(), file


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_says_what_it_does(kind: str, name: str):
    spec = REGISTRIES[kind].spec(name)
    assert len(spec.doc) > 60
    undocumented = [key for key in spec.hyperparameters if not re.search(rf"\b{key}\b", spec.doc)]
    assert not undocumented, (
        f"{spec.module}: the docstring of {name} does not mention {', '.join(undocumented)}"
    )


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_has_a_formula(kind: str, name: str):
    formulas = [
        paragraph
        for paragraph in REGISTRIES[kind].spec(name).doc.split("\n\n")
        if paragraph.startswith("Formula: ")
    ]
    assert len(formulas) == 1, f"the docstring of {name} needs one paragraph 'Formula: ``...``'"
    assert formulas[0].count("``") >= 2 and formulas[0].count("``") % 2 == 0
