"""The tables of methods: whole sentences, formulas, and a result for each method."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest

from support.scripts import script

BASELINE = {"measure": "pass@1", "before": [0.4, 0.37, 0.43], "after": [0.64, 0.62, 0.67]}


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return script("methods_table")


def result(after: list[float]) -> dict[str, Any]:
    return BASELINE | {"after": after}


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("Longest first (DAPO, arXiv:2503.14476). More.", "Longest first (DAPO)"),
        (
            "Sampling (for engines: Yao et al. 2025): weight 1. More.",
            "Sampling (for engines: Yao et al. 2025): weight 1",
        ),
        ("AEPO, from a branch (arXiv:2510.08141): A becomes B.", "AEPO, from a branch: A becomes B"),
        ("An exponent in (0, 1]: ``q``. beta as in ``dpo``.", "An exponent in (0, 1]: `q`"),
        ("``p(y|x)``, as in arXiv:2110.14168. More.\n\nmore", "`p(y\\|x)`"),
        ("Scales by 0.5 at most, arXiv:2110.14168.\nMore.", "Scales by 0.5 at most"),
    ],
)
def test_a_summary_is_the_whole_first_sentence(table: ModuleType, doc: str, summary: str):
    assert table.summarize(doc) == summary


def test_no_summary_is_cut_inside_brackets(table: ModuleType):
    for _, _, registry in table.KINDS:
        for spec in registry.specs.values():
            summary = table.summarize(spec.doc)
            assert summary and "arXiv" not in summary, spec.name
            assert summary.count("(") + summary.count("[") == summary.count(")") + summary.count("]"), (
                spec.name
            )


def test_a_result_within_the_baselines_interval_says_nothing(table: ModuleType):
    record = {"policy/grpo": BASELINE}
    assert not table.differs_from_baseline(BASELINE, record)
    assert not table.differs_from_baseline(result([0.66, 0.65, 0.70]), record)
    assert table.differs_from_baseline(result([0.71, 0.68, 0.74]), record)
    assert table.differs_from_baseline(result([0.45, 0.40, 0.49]), record)


def test_a_measure_without_a_baseline_is_compared_with_its_start(table: ModuleType):
    loss = {"measure": "loss", "before": [0.4, 0.3, 0.5], "after": [0.2, 0.1, 0.25]}
    assert table.differs_from_baseline(loss, {})
    assert not table.differs_from_baseline(loss | {"after": [0.3, 0.2, 0.4]}, {})


def test_a_result_is_bold_if_it_can_be_told_from_the_baselines(table: ModuleType):
    record = {"policy/grpo": BASELINE, "policy/other": result([0.71, 0.68, 0.74])}
    assert table.measured_effect("policy/grpo", record) == "pass@1 0.40 to 0.64"
    assert table.measured_effect("policy/other", record) == "**pass@1 0.40 to 0.71**"
    assert table.measured_effect("policy/unmeasured", record) == ""


def test_a_formula_is_one_paragraph(table: ModuleType):
    assert (
        table.formula("What. More.\n\nFormula: ``|R|\n/ 2``, R the\nreward\n\nMore.")
        == "`\\|R\\| / 2`, R the reward"
    )
    for doc in ("What.", "What.\n\nFormula: ``R``\n\nFormula: ``A``"):
        with pytest.raises(ValueError, match="expected 1"):
            table.formula(doc)


def test_every_method_has_a_measured_result(table: ModuleType):
    record = json.loads((table.ROOT / "recipes" / "measured.json").read_text(encoding="utf-8"))["recipes"]
    for _, key, registry in table.KINDS:
        users = table.recipes_by_method(key)
        for name, spec in registry.specs.items():
            recipe = table.measured_recipe(key, spec, users.get(name, []))
            assert recipe in record, (
                f"{key} {name}: run scripts/measure_recipes.py {recipe or 'a recipe with it'}"
            )
