"""Writes docs/methods.md and README's counts from the methods' declarations and the recipes.

    python scripts/methods_table.py [--check]

A row per registered method has its name in a recipe, its paper, its formula (the paragraph "Formula:" of its
docstring), its function, the recipes that use it, and the result of one of them at laptop scale
(``scripts/measure_recipes.py``). ``--check`` changes nothing and exits with 1 if a file would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rltrain.advantage import ADVANTAGES
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.registry import MethodSpec, Registry

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- counts: made by scripts/methods_table.py -->"
END = "<!-- end of counts -->"
# Recipe that the others with the same measure are compared with.
BASELINES = {"pass@1": "policy/grpo", "accuracy": "preference/dpo"}
INTRODUCTION = """# Methods

Made by `scripts/methods_table.py`. A recipe writes the name under the key in parentheses; hyperparameters
go next to it (`policy: {{name: clip, eps_high: 0.28}}`). Where a paper and its authors' code differ, the
paper's form is the default and the released one is an option. AEPO, GTPO, COPO and RAPO are names of other
papers' methods as well; the arXiv id tells which one is meant. KL to the reference has the estimators k2
and k3 as a term, and k1 in the reward (`kl_coef`).

**Formulas** are those of the functions' docstrings, which say the rest. R is a completion's reward, `mean`
and `std` are over the prompt's graded completions, A the advantage, y a completion of `|y|` tokens, `ln pi`
the log-prob of a token, or of a whole completion `y|x`. `r = pi / pi_old`, `rho = pi_old / pi_engine`, H is a
token's entropy in nats, `sg[x]` has no gradient, `1[x]` is 1 where x holds and else 0, and `whiten` subtracts
the mean over the step and divides by the standard deviation. Of a pair w is chosen and l rejected;
`u = ln pi(y|x) - ln pi_ref(y|x)`, `z = beta (u_w - u_l)`, and e is the `flip_rate`. An aggregate adds up the
losses l of the tokens of B completions.

**Measured** is a smoke test, not a ranking: the method's own recipe under `tiny_cpu`, one seed, {steps}
steps (150 for data sets), with the result on held-out prompts or pairs and the mean entropy (nats) of the
samples in the first and last tenth of the steps. **Bold** results can be told from the baseline's: their 95 %
interval lies outside it (a loss: outside its value before training). `recipes/measured.json` has every run
and interval. All started from one model, which `rltrain tiny-model` makes. The baselines:

{baselines}
"""
# Methods of other trainers that a user may look for here, with their arXiv ids and why there is none.
NOT_HERE: tuple[tuple[str, str, str], ...] = (
    (
        "TPO",
        "2405.16681",
        "learns from a third answer beside each pair; without it, it is `dpo_reference_free` or `simpo`",
    ),
    (
        "k1 as a loss term",
        "",
        "its gradient's expectation is 0: `kl_coef` of `reinforce_pp` has it in the reward",
    ),
    ("AlphaPO", "2501.03884", "a power of the likelihood in SimPO, for which only a peer's code is public"),
    ("WPO", "2406.11827", "weights pairs by the policy's own likelihood, which no statistic here computes"),
    ("GAE and value losses", "1506.02438", "need a critic, which no method here trains"),
)
_SPO = (
    "how many of the chosen answer's key phrases (RAKE) were taken out, predicted by a linear head on the "
    "policy; for any loss on pairs of a data set | `weight CE(head, degree)`"
)
BESIDE = f"""## Beside a loss (`loss.degree`)

| name | arXiv | what | formula | function | recipes | measured |
|---|---|---|---|---|---|---|
| SPO | 2409.17791 | {_SPO} | `loss/preference/spo.py:spo_degree` | preference/spo | \
[study](studies/preference.md#degrees-of-degraded-answers) |
"""
SOURCES = """## Where a recipe's numbers come from

From `recipes/sources.json`, which has file, commit and value of each. **As there**: the recipe has the
source's value. **Not as there**: the comment at the recipe's top says why. **No source**: numbers of the
method, and learning rates, that no source states. Recipes that are not listed have no public source; the
file says why.

| recipe | sources | as there | not as there | no source |
|---|---|---|---|---|
"""
# Methods that are a part of many recipes or of several papers' -> the recipe whose result their row has.
MEASURED_BY = {
    ("advantage", "none"): "policy/em_ft",
    ("loss.policy", "clip"): "policy/grpo",
    ("loss.policy", "reinforce"): "policy/rloo",
    ("loss.terms", "entropy"): "policy/entropy_bonus",
    ("loss.aggregate", "seq_mean_token_sum"): "policy/rloo",
    ("loss.preference", "nll"): "supervised/sft",
}
FOLDERS = ("policy", "preference", "process_reward", "supervised")
KINDS: tuple[tuple[str, str, Registry], ...] = (
    ("Advantages", "advantage", ADVANTAGES),
    ("Controls: statistics over the whole step or optimizer batch", "control", TOKEN_CONTROLS),
    ("Policy losses", "loss.policy", POLICY_LOSSES),
    ("Additive terms", "loss.terms", LOSS_TERMS),
    ("Coefficients of terms that move", "loss.terms.coefficient", COEFFICIENTS),
    ("Aggregates", "loss.aggregate", AGGREGATES),
    ("Preference and process-reward losses", "loss.preference", PREFERENCE_LOSSES),
)


def recipes_by_method(key: str) -> dict[str, list[str]]:
    """Recipes by the name of the method that they use under ``key``."""
    recipes: dict[str, list[str]] = {}
    folders = [ROOT / "recipes" / name for name in FOLDERS]
    for path in sorted(path for folder in folders for path in folder.glob("*.yaml")):
        for name in _names(yaml.safe_load(path.read_text(encoding="utf-8")), key.split(".")):
            recipe = path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
            if recipe not in recipes.setdefault(name, []):
                recipes[name].append(recipe)
    return recipes


def _names(data: Any, keys: list[str]) -> Iterator[str]:
    if isinstance(data, list):
        for item in data:
            yield from _names(item, keys)
    elif keys:
        if isinstance(data, dict) and keys[0] in data:
            yield from _names(data[keys[0]], keys[1:])
    elif isinstance(data, str):
        yield data
    elif isinstance(data, dict) and "name" in data:
        yield data["name"]


def measured_recipe(key: str, spec: MethodSpec, recipes: list[str]) -> str | None:
    """The recipe whose result the method's row has: of its name, else of its paper, else the only one."""
    recipes_of_paper = [
        recipe for recipe in recipes if spec.arxiv and recipe_header(recipe).get("arxiv") == spec.arxiv
    ]
    recipes_of_name = [recipe for recipe in recipes if recipe.partition("/")[2] == spec.name]
    only_recipe = recipes if len(recipes) == 1 else []
    named = MEASURED_BY.get((key, spec.name))
    return named or next(iter(recipes_of_name or recipes_of_paper or only_recipe), None)


def measured_effect(recipe: str | None, record: dict[str, Any]) -> str:
    """The recipe's result, bold where it can be told from the baseline's; empty if it was not measured."""
    if recipe not in record:
        return ""
    text = effect_text(record[recipe])
    return f"**{text}**" if differs_from_baseline(record[recipe], record) else text


def differs_from_baseline(result: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether the 95 % interval after training lies outside the baseline's.

    A measure without a baseline is compared with the same run before training.
    """
    baseline = BASELINES.get(result["measure"])
    low, high = result["before"][1:] if baseline is None else record[baseline]["after"][1:]
    return result["after"][1] > high or result["after"][2] < low


def effect_text(result: dict[str, Any]) -> str:
    digits = 4 if result["measure"] == "loss" else 2
    before = result["before"][0]
    after = result["after"][0]
    text = f"{result['measure']} {before:.{digits}f} to {after:.{digits}f}"
    if "entropy" in result:
        text += f", entropy {result['entropy'][0]:.2f} to {result['entropy'][1]:.2f}"
    return text


def baseline_text(name: str, result: dict[str, Any]) -> str:
    low, high = result["after"][1:]
    return f"- `{name}`: {effect_text(result)}; {result['measure']} after training in [{low:.2f}, {high:.2f}]"


def recipe_header(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")).get("about", {})


def first_sentence(text: str) -> str:
    """The text up to the first full stop outside brackets that does not belong to "et al."."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        is_stop = text[place : place + 2].strip() == "." and not text[:place].endswith(" et al")
        if is_stop and depth == 0:
            return text[:place]
    return text


def summarize(doc: str) -> str:
    """The docstring's first sentence for a table cell, without the citation that has its own column."""
    paragraph = " ".join(doc.split("\n\n")[0].split()).replace("``", "`")
    citation = r" \(arXiv:\d{4}\.\d{5}\)|(, as in|,| in)? ?arXiv:\d{4}\.\d{5}"
    return re.sub(citation, "", first_sentence(paragraph)).strip(" ,").replace("|", "\\|")


def formula(doc: str) -> str:
    """The docstring's paragraph "Formula:" for a table cell. Raises ValueError unless there is one."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in doc.split("\n\n")]
    formulas = [text.removeprefix("Formula: ") for text in paragraphs if text.startswith("Formula: ")]
    if len(formulas) != 1:
        raise ValueError(f"the docstring has {len(formulas)} paragraphs 'Formula: ...', expected 1: {doc}")
    return formulas[0].replace("``", "`").replace("|", "\\|")


def row(key: str, spec: MethodSpec, recipes: list[str], record: dict[str, Any]) -> str:
    location = f"`{spec.module.removeprefix('rltrain.').replace('.', '/')}.py:{spec.attribute}`"
    effect = measured_effect(measured_recipe(key, spec, recipes), record)
    listed = recipes if len(recipes) <= 4 else [*recipes[:3], f"{len(recipes) - 3} more"]
    return (
        f"| `{spec.name}` | {spec.arxiv or ''} | {summarize(spec.doc)} | {formula(spec.doc)} | "
        f"{location} | {', '.join(listed)} | {effect} |"
    )


def methods_page() -> str:
    measured = json.loads((ROOT / "recipes" / "measured.json").read_text(encoding="utf-8"))
    record = measured["recipes"]
    baselines = "\n".join(baseline_text(name, record[name]) for name in BASELINES.values())
    parts = [INTRODUCTION.format(steps=measured["conditions"]["steps"], baselines=baselines)]
    for title, key, registry in KINDS:
        users = recipes_by_method(key)
        rows = [row(key, spec, users.get(name, []), record) for name, spec in sorted(registry.specs.items())]
        head = (
            f"## {title} (`{key}`)\n\n| name | arXiv | what | formula | function | recipes | measured "
            "|\n|---|---|---|---|---|---|---|\n"
        )
        parts.append(head + "\n".join(rows) + "\n")
    parts += [BESIDE, sources_section()]
    refused = "\n".join(f"| {name} | {arxiv} | {reason} |" for name, arxiv, reason in NOT_HERE)
    parts.append(f"## Not here, on purpose\n\n| method | arXiv | reason |\n|---|---|---|\n{refused}\n")
    return "\n".join(parts)


def sources_section() -> str:
    """A row for each recipe with a public source: its addresses, and what became of each of its values."""
    recorded = json.loads((ROOT / "recipes" / "sources.json").read_text(encoding="utf-8"))
    return SOURCES + "".join(
        sources_row(recipe, entries) for recipe, entries in recorded.items() if not isinstance(entries, str)
    )


def sources_row(recipe: str, entries: list[dict[str, Any]]) -> str:
    stated = [entry for entry in entries if "unstated" not in entry]
    places = dict.fromkeys(
        entry["address"].partition(":")[0]
        if entry["commit"] is None
        # of a repository, the commit makes the place
        else f"{entry['address'].partition(':')[0]}@{entry['commit']}"
        for entry in stated
    )
    copied = [entry.get("key") or entry["feature"] for entry in stated if entry["ours"] == "same"]
    changed = [entry.get("key") or entry["feature"] for entry in stated if entry["ours"] != "same"]
    unstated = [entry["key"] for entry in entries if "unstated" in entry]
    cells = [", ".join(sorted(names)).replace("|", "\\|") for names in (copied, changed, unstated)]
    return f"| {recipe} | {', '.join(places)} | {' | '.join(cells)} |\n"


def counts() -> str:
    """README's list of families, with the number of methods and recipes of each."""
    folders = {folder: len(list((ROOT / "recipes" / folder).glob("*.yaml"))) for folder in FOLDERS}
    lines = [
        f"- {len(registry.specs)} {title.partition(':')[0].lower()} (`{key}`)"
        for title, key, registry in KINDS
    ]
    recipes = ", ".join(f"{number} in `recipes/{folder}`" for folder, number in folders.items())
    return "\n".join([*lines, f"- {sum(folders.values())} recipes: {recipes}"])


def pages() -> dict[Path, str]:
    """What each file that this script writes should contain."""
    readme = ROOT / "README.md"
    head, tail = readme.read_text(encoding="utf-8").split(BEGIN)
    return {
        ROOT / "docs" / "methods.md": methods_page(),
        readme: f"{head}{BEGIN}\n\n{counts()}\n\n{END}{tail.split(END)[1]}",
    }


def write_pages(contents: dict[Path, str], script: str, *, check: bool) -> None:
    """Writes each file, or with ``check`` exits with a message if one differs."""
    for path, text in contents.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what {script} writes; run it")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    write_pages(pages(), "scripts/methods_table.py", check=arguments.check)


if __name__ == "__main__":
    main()
