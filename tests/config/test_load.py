"""Merging of base, recipe, profile and --set, and the text of every error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rltrain.config.explain import schema_keys
from rltrain.config.load import load_recipe, merge_mappings, recipe_of_model, resolved_yaml
from rltrain.config.shipped import RECIPES_FOLDER, find_recipe
from rltrain.errors import RecipeError

Write = Callable[..., Path]


def problems(path: Path, profile: str | None = None, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, profile=profile, overrides=overrides)
    return error.value.problems


def without(path: Path, line: str) -> str:
    return "\n".join(kept for kept in path.read_text().splitlines() if not kept.startswith(line)) + "\n"


# merging ----------------------------------------------------------------------------------------------------


def test_mappings_merge_by_key_and_lists_are_replaced() -> None:
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge_mappings(below, {"a": {"y": [3]}, "c": 2}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": 2}
    assert below == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_hyperparameters_of_one_method_never_reach_another() -> None:
    below = {"policy": {"name": "clip", "eps_high": 0.28}}
    assert merge_mappings(below, {"policy": {"name": "gspo"}}) == {"policy": {"name": "gspo"}}
    assert merge_mappings(below, {"policy": {"name": "clip", "eps_low": 0.1}}) == {
        "policy": {"name": "clip", "eps_high": 0.28, "eps_low": 0.1}
    }
    # A section called train is not an identity: it is a mapping, not the name of a data set.
    assert merge_mappings({"train": {"steps": 1}, "seed": 3}, {"train": {"steps": 2}}) == {
        "train": {"steps": 2},
        "seed": 3,
    }


def test_a_recipe_extends_one_base_and_overrides_it(write: Write) -> None:
    write("base/b.yaml", "rollout: {engine: vllm, n: 4}\nseed: 7\n")
    path = write("policy/r.yaml", "extends: ../base/b.yaml\n" + write().read_text())
    recipe = load_recipe(path)
    assert (recipe.rollout.engine, recipe.rollout.n, recipe.seed) == ("vllm", 8, 7)


def test_what_a_recipe_extends_may_extend_another(write: Write) -> None:
    write("base/a.yaml", "seed: 1\nrollout: {n: 2, engine: vllm}\nreport: {project: a}\n")
    write("base/b.yaml", "extends: a.yaml\nseed: 2\nrollout: {n: 4}\n")
    write("c.yaml", "extends: base/b.yaml\nseed: 3\n" + write().read_text().replace(" n: 8,", ""))
    recipe = load_recipe(write("r.yaml", "extends: c.yaml\nseed: 4\n"))
    assert (recipe.seed, recipe.rollout.n, recipe.rollout.engine, recipe.report.project) == (
        4,
        4,
        "vllm",
        "a",
    )


def test_recipes_that_extend_each_other_in_a_circle_are_named(write: Write) -> None:
    write("a.yaml", "extends: down/b.yaml\n")
    write("down/b.yaml", "extends: ../c.yaml\n")
    write("c.yaml", "extends: a.yaml\n")
    for name in ("a.yaml", "c.yaml", "down/b.yaml"):
        (problem,) = problems(write("down/x.yaml").parent.parent / name)
        assert "extend each other in a circle: " in problem
        assert all(f"{file}.yaml:1: extends " in problem for file in "abc")
    (problem,) = problems(write("self.yaml", "seed: 1\nextends: self.yaml\n"))
    assert "self.yaml:2: extends 'self.yaml': the recipes extend each other in a circle" in problem


def test_every_file_of_a_chain_is_named_where_the_last_is_missing(write: Write) -> None:
    write("b.yaml", "extends: none.yaml\n")
    (problem,) = problems(write("r.yaml", "extends: b.yaml\n"))
    assert "r.yaml:1: extends 'b.yaml': " in problem and "b.yaml:1: extends 'none.yaml': " in problem
    assert "none.yaml" in problem and "no such file" in problem


def test_a_recipe_extends_a_shipped_one_by_name(write: Write) -> None:
    recipe = load_recipe(write("r.yaml", "extends: dapo\nseed: 5\n"))
    shipped = load_recipe(RECIPES_FOLDER / "policy/dapo.yaml")
    assert recipe == shipped.model_copy(update={"seed": 5})
    assert load_recipe(write("r.yaml"), profile="tiny_cpu").model.path == ".cache/tiny-model"
    (problem,) = problems(write("r.yaml", "extends: dapoo\n"))
    assert "r.yaml:1: extends 'dapoo': no shipped recipe is called 'dapoo'; did you mean 'dapo'?" in problem


def test_names_of_shipped_recipes_are_different() -> None:
    files = [
        file
        for folder in ("policy", "preference", "process_reward", "supervised")
        for file in (RECIPES_FOLDER / folder).glob("*")
    ]
    assert len(files) == len({file.stem for file in files}) > 80
    assert all(find_recipe(file.stem) == file for file in files)


@pytest.mark.parametrize(
    ("extends", "expected"),
    [("base/none.yaml", "no such file"), ("[a]", "extends must be the path of one recipe or base")],
)
def test_extends_must_name_a_file(write: Write, extends: str, expected: str) -> None:
    (problem,) = problems(write("r.yaml", f"seed: 1\nextends: {extends}\n"))
    assert "r.yaml:2: " in problem
    assert expected in problem


# profiles ---------------------------------------------------------------------------------------------------


def test_a_profile_is_found_by_name_above_the_recipe_or_as_a_file(write: Write) -> None:
    write("profiles/tiny.yaml", "rollout: {n: 2}\n")
    path = write("policy/deep/r.yaml")
    assert load_recipe(path, profile="tiny").rollout.n == 2
    assert load_recipe(path, profile=str(write("elsewhere/p.yaml", "rollout: {n: 3}\n"))).rollout.n == 3
    assert problems(path, profile="tinny") == ("no profile is called 'tinny'; did you mean 'tiny'?",)


def test_a_profile_that_names_a_data_set_replaces_the_whole_section(write: Write) -> None:
    write("profiles/other.yaml", "data: {train: questions.jsonl}\n")
    write("profiles/shorter.yaml", "data: {max_prompt_tokens: 5}\n")
    path = write("r.yaml")
    other = load_recipe(path, profile="other").data
    shorter = load_recipe(path, profile="shorter").data
    assert (other.train, other.eval, other.max_prompt_tokens) == ("questions.jsonl", None, 1024)
    assert (shorter.train, shorter.eval, shorter.max_prompt_tokens) == ("arithmetic", "arithmetic", 5)


@pytest.mark.parametrize("name", ["lora_grpo", "lora_dpo", "qlora_dpo"])
def test_a_profile_that_names_a_model_leaves_the_adapter(name: str) -> None:
    full, tiny = (load_recipe(name, profile=profile) for profile in (None, "tiny_cpu"))
    assert tiny.model.path == ".cache/tiny-model"
    assert tiny.model.adapter == full.model.adapter is not None


@pytest.mark.parametrize(
    "key",
    [
        "loss: {policy: gspo}",
        "advantage: rloo",
        "control: [tis]",
        "reward: {functions: [exact]}",
        "learner: {updates: 4}",
        "seed: 1",
    ],
)
def test_a_profile_sets_model_data_and_sizes_and_nothing_else(write: Write, key: str) -> None:
    write("profiles/p.yaml", f"model: {{path: x}}\n{key}\n")
    (problem,) = problems(write("r.yaml"), profile="p")
    assert "p.yaml:2: " in problem
    assert "a profile replaces model, data and sizes and nothing else" in problem
    assert "--set" in problem


def test_sizes_reach_the_methods_that_the_recipe_uses_and_no_others(write: Write) -> None:
    write(
        "profiles/p.yaml", "sizes: {length: {max_tokens: 8, buffer_tokens: 2}, format: {window_tokens: 1}}\n"
    )
    path = write(
        "r.yaml",
        write()
        .read_text()
        .replace("[math_answer]", "[math_answer, {name: length, max_tokens: 100, factor: 2.0}]"),
    )
    first, second = load_recipe(path, profile="p").reward.functions
    assert first.hp == {}
    assert second.hp == {"max_tokens": 8, "factor": 2.0, "buffer_tokens": 2}


def test_sizes_are_token_counts_in_a_profile(write: Write, recipe: Path) -> None:
    write("profiles/p.yaml", "sizes: {clip: {eps_high: 0.3}}\n")
    (problem,) = problems(recipe, profile="p")
    assert "sizes.clip.eps_high: a profile may set hyperparameters that count tokens" in problem
    (problem,) = problems(write("r.yaml", "sizes: {length: {max_tokens: 8}}\n"))
    assert "sizes belongs in a profile" in problem
    write("profiles/p.yaml", "sizes: 3\n")
    assert "sizes must map a method to its sizes" in problems(recipe, profile="p")[0]


# --set ------------------------------------------------------------------------------------------------------


def test_set_comes_last_and_its_values_are_yaml(write: Write) -> None:
    write("profiles/p.yaml", "rollout: {n: 2}\n")
    recipe = load_recipe(
        write("r.yaml"),
        profile="p",
        overrides=(
            "rollout.n=3",
            "learner.optimizer.lr=1e-6",
            "eval.k=[1, 2]",
            "data.eval=null",
            "loss.policy.eps_high=0.28",
            "loss.terms=[{name: kl, coefficient: 0.5}]",
            "loss.terms.0.coefficient=0.01",
            "control.0={name: tis, cap: 3.0}",
            "control.1=mis",
            "rollout.dynamic_sampling.max_rounds=5",
        ),
    )
    assert (recipe.rollout.n, recipe.learner.optimizer.lr, recipe.eval.k, recipe.data.eval) == (
        3,
        1e-6,
        (1, 2),
        None,
    )
    assert (recipe.loss.policy.name, recipe.loss.policy.hp) == ("clip", {"eps_high": 0.28})
    assert recipe.loss.terms[0].coefficient == 0.01
    assert [control.name for control in recipe.control] == ["tis", "mis"]
    assert recipe.rollout.dynamic_sampling is not None
    assert recipe.rollout.dynamic_sampling.max_rounds == 5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=1", "--set train.stepz=1: unknown key train.stepz; did you mean 'train.steps'?"),
        (
            "lr=1",
            "--set lr=1: unknown key lr; did you mean learner.optimizer.lr or process_reward.optimizer.lr?",
        ),
        ("train.steps", "--set train.steps: expected KEY=VALUE with a dotted key, such as"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("train..steps=3", "--set train..steps=3: expected KEY=VALUE"),
        (
            "train.steps.x=1",
            "--set train.steps.x=1: train.steps is 200, it has no key 'x' below it; set train.steps itself",
        ),
        ("reward.functions.4=exact", "expected a position from 0 to 1, got '4'"),
        ("reward.functions.first=exact", "expected a position from 0 to 1, got 'first'"),
        ("train.steps=[1", "not valid YAML"),
        (
            "train.steps=many",
            "--set train.steps=many: train.steps: got 'many' (str); it should be a valid integer",
        ),
        ("extends=x.yaml", "--set extends=x.yaml: extends is read from files only"),
    ],
)
def test_an_override_that_fits_nowhere_says_so(recipe: Path, override: str, expected: str) -> None:
    (problem,) = problems(recipe, overrides=(override,))
    assert expected in problem


# errors of the schema ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "train: {steps: 200}",
            "train: {stepps: 200}",
            ":8: unknown key train.stepps; did you mean 'train.steps'?",
        ),
        (
            "n: 8,",
            "n: 8, lr: 1,",
            ":3: unknown key rollout.lr; did you mean learner.optimizer.lr or process_reward.optimizer.lr?",
        ),
        ("advantage:", "advantages:", ":5: unknown key advantages; did you mean 'advantage'?"),
        ("n: 8", "n: 0", ":3: rollout.n: got 0 (int); it should be greater than or equal to 1"),
        ("n: 8", 'n: "8"', ":3: rollout.n: got '8' (str); it should be a valid integer"),
        ("n: 8", "n: true", ":3: rollout.n: got True (bool); it should be a valid integer"),
        (
            "n: 8",
            "n: 8, trust_logp: off",
            ":3: rollout.trust_logp: got 'off' (str); it should be a valid boolean; write true or false",
        ),
        (
            "n: 8",
            "n: 8, engine: vlm",
            ":3: rollout.engine: got 'vlm', expected 'transformers', 'vllm' or 'vllm_server'; did you mean "
            "'vllm'?",
        ),
        ("lr: 1e-4", "lr: .nan", ":7: learner.optimizer.lr: got nan (float); it should be a finite number"),
        (
            "[math_answer]",
            "math_answer",
            ":4: reward.functions: got 'math_answer' (str); it should be a list",
        ),
        ("[math_answer]", "[{name: math_answer, weight: .inf}]", ":4: reward.functions.0.weight: got inf"),
        ("path: tiny", "path: 2024", ":1: model.path: got 2024 (int); it should be text; put it in quotes"),
        (
            "policy: clip",
            "policy: clip, terms: [{name: kl}]",
            ":6: loss.terms.0.coefficient is missing; expected float",
        ),
    ],
)
def test_a_refusal_names_line_key_what_arrived_and_the_remedy(
    write: Write, old: str, new: str, expected: str
) -> None:
    path = write()
    path.write_text(path.read_text().replace(old, new, 1))
    assert any(problem.startswith(f"{path}{expected}") for problem in problems(path)), problems(path)


def test_a_missing_section_says_what_belongs_in_it(write: Write, recipe: Path) -> None:
    recipe.write_text(without(recipe, "rollout"))
    assert problems(recipe) == (
        f"{recipe}: rollout is missing; expected a section with prompts, n, max_tokens",
    )


def test_every_problem_is_reported_at_once_each_with_its_own_file(write: Write) -> None:
    base = write("base/b.yaml", "sead: 1\n")
    path = write("r.yaml", "extends: base/b.yaml\n" + write().read_text().replace("steps: 200", "steps: 0"))
    lines = problems(path, overrides=("rollout.n=x",))
    assert [problem.split(": ")[0] for problem in lines] == ["--set rollout.n=x", f"{path}:9", f"{base}:1"]


# the resolved recipe ----------------------------------------------------------------------------------------


# text and integers that a recipe may hold
TEXT = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
INTEGERS = st.integers(1 - 2**63, 2**63 - 1)


@settings(
    max_examples=15, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    title=st.text(TEXT, max_size=20) | st.sampled_from(["off", "1e-6", "null", "0x1F", "yes"]),
    lr=st.floats(min_value=0, max_value=1),
    eps=st.floats(allow_nan=False, allow_infinity=False) | INTEGERS,
    columns=st.dictionaries(st.text(TEXT, max_size=5), st.text(TEXT, max_size=5), max_size=2),
)
def test_a_resolved_recipe_loads_back_equal(
    tmp_path: Path, recipe: Path, title: str, lr: float, eps: float, columns: dict[str, str]
) -> None:
    plain = load_recipe(recipe, overrides=("control=[{name: tis, cap: 3}]", "rollout.dynamic_sampling={}"))
    changed = plain.model_copy(
        update={
            "about": plain.about.model_copy(update={"title": title}),
            "learner": plain.learner.model_copy(
                update={"optimizer": plain.learner.optimizer.model_copy(update={"lr": lr})}
            ),
            "loss": plain.loss.model_copy(
                update={"policy": type(plain.loss.policy)(name="clip", eps_high=eps)}
            ),
            "data": plain.data.model_copy(update={"columns": columns}),
        }
    )
    resolved = tmp_path / "recipe.resolved.yaml"
    resolved.write_text(resolved_yaml(changed), encoding="utf-8")
    assert load_recipe(resolved) == changed


def test_a_resolved_recipe_holds_every_key(write: Write, recipe: Path) -> None:
    optional = (
        "dynamic_sampling={}",
        "adaptive_temperature={}",
        "environment={name: calculator, max_turns: 1, turn_tokens: 1}",
        "workers={count: 1}",
        "schedule={lag: 1}",
    )
    overrides = (
        *(f"rollout.{override}" for override in optional),
        "process_reward={optimizer: {lr: 1.0}}",
        "push={repo: ann/m}",
        "model.adapter={}",
    )
    text = resolved_yaml(load_recipe(recipe, overrides=overrides))
    # registered methods have no digest
    keys = [key for key in schema_keys() if key[-1] != "sha256"]
    assert [key for key in keys if f"{key[-1]}:" not in text] == []


def test_a_recipe_of_a_model_carries_what_sampling_needs() -> None:
    recipe = recipe_of_model("some/model", engine="vllm", max_prompt_tokens=20, max_tokens=30, seed=4)
    assert (recipe.model.path, recipe.rollout.engine, recipe.seed) == ("some/model", "vllm", 4)
    assert (recipe.data.max_prompt_tokens, recipe.rollout.max_tokens) == (20, 30)
