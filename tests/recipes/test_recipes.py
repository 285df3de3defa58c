"""Every YAML file under recipes/: it checks out at its own scale and under every profile, and says
where it comes from.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rltrain.config.fragments import check_fragment, kind_of
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.config.rules import CheckedRecipe, check
from rltrain.config.schema import OfflineRecipe, OnlinePairsRecipe
from rltrain.errors import RecipeError

ROOT = Path(__file__).parents[2] / "recipes"
FILES = sorted(ROOT.rglob("*.yaml"))
RECIPES = [path for path in FILES if kind_of(path) == "recipe"]
OFFLINE = [path for path in RECIPES if isinstance(load_recipe(path), OfflineRecipe)]
PAIRS = [path for path in RECIPES if isinstance(load_recipe(path), OnlinePairsRecipe)]
PROFILES = sorted(path.stem for path in FILES if kind_of(path) == "profile")


def name_of(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


def checked(path: Path, profile: str | None) -> CheckedRecipe:
    return check(load_recipe(path, profile=profile))


def test_the_first_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "gmpo",
        "rloo",
        "reinforce_pp",
        "gsm8k_calculator",
    }
    assert PROFILES == ["one_gpu", "small_cpu", "tiny_cpu"]


@pytest.mark.parametrize("profile", [None, *PROFILES])
@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_checks_out_and_loads_back_from_its_resolved_form(
    path: Path, profile: str | None, tmp_path: Path
) -> None:
    recipe = checked(path, profile).recipe
    resolved = tmp_path / "recipe.resolved.yaml"
    resolved.write_text(resolved_yaml(recipe))
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_at_its_own_scale_gives_no_warning(path: Path) -> None:
    assert checked(path, None).warnings == ()


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_says_what_it_reproduces(path: Path) -> None:
    about = checked(path, None).recipe.about
    assert about.arxiv is not None
    assert re.fullmatch(r"\d{4}\.\d{5}", about.arxiv)
    assert about.title
    assert about.expected


@pytest.mark.parametrize("path", OFFLINE, ids=name_of)
def test_the_tiny_profile_leaves_the_loss_on_judged_completions_alone(path: Path) -> None:
    full, tiny = checked(path, None).recipe, checked(path, "tiny_cpu").recipe
    assert isinstance(full, OfflineRecipe)
    assert isinstance(tiny, OfflineRecipe)
    assert (tiny.model.path, tiny.data.train, tiny.data.columns) == (
        ".cache/tiny-model",
        "arithmetic_pairs",
        {},
    )
    assert (tiny.loss, tiny.data.divide_margins_by, tiny.train.epochs) == (
        full.loss,
        full.data.divide_margins_by,
        full.train.epochs,
    )


@pytest.mark.parametrize("path", PAIRS, ids=name_of)
def test_the_tiny_profile_leaves_judge_and_loss_alone(path: Path) -> None:
    full, tiny = checked(path, None).recipe, checked(path, "tiny_cpu").recipe
    assert isinstance(full, OnlinePairsRecipe) and isinstance(tiny, OnlinePairsRecipe)
    assert (tiny.model.path, tiny.model.reference, tiny.data.train, tiny.data.columns) == (
        ".cache/tiny-model",
        None,
        "arithmetic",
        {},
    )
    assert (tiny.rollout.prompts, tiny.rollout.n, tiny.rollout.max_tokens) == (24, 8, 8)
    assert (tiny.pairs, tiny.loss, tiny.train.previous_every) == (
        full.pairs,
        full.loss,
        full.train.previous_every,
    )
    assert (tiny.learner.updates, tiny.learner.epochs) == (full.learner.updates, full.learner.epochs)
    assert [reward.name for reward in tiny.reward.functions] == [
        reward.name for reward in full.reward.functions
    ]


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in (*OFFLINE, *PAIRS)], ids=name_of)
def test_the_tiny_profile_leaves_the_method_alone(path: Path) -> None:
    full, tiny = checked(path, None).recipe, checked(path, "tiny_cpu").recipe
    assert tiny.model.path == ".cache/tiny-model"
    played = None if tiny.rollout.environment is None else tiny.rollout.environment.name
    sizes = {
        None: ("arithmetic", 24, 8),
        "calculator": ("arithmetic", 24, 48),
        "textworld": ("textworld", 8, 200),
    }
    data, prompts, tokens = sizes[played]
    assert (tiny.data.train, tiny.data.columns, tiny.data.system) == (data, {}, None)
    assert (tiny.rollout.prompts, tiny.rollout.n, tiny.rollout.max_tokens) == (prompts, 8, tokens)
    assert (tiny.loss, tiny.advantage, tiny.control) == (full.loss, full.advantage, full.control)
    assert (tiny.learner.updates, tiny.learner.epochs) == (full.learner.updates, full.learner.epochs)
    assert tiny.rollout.dynamic_sampling == full.rollout.dynamic_sampling
    assert [reward.name for reward in tiny.reward.functions] == [
        reward.name for reward in full.reward.functions
    ]


def test_dapo_is_its_paper_and_scales_its_length_penalty() -> None:
    # arXiv:2503.14476: 512 prompts x 16, 16 updates of 512 completions, 20,480 = 16,384 + 4,096 tokens,
    # rewards +-1.
    full, tiny = (
        checked(ROOT / "policy/dapo.yaml", None).recipe,
        checked(ROOT / "policy/dapo.yaml", "tiny_cpu").recipe,
    )
    assert full.rollout.prompts * full.rollout.n / full.learner.updates == 512
    assert full.loss.policy.hp == {"eps_low": 0.2, "eps_high": 0.28}
    assert full.reward.functions[0].hp == {"correct": 1.0, "wrong": -1.0}
    assert full.reward.functions[1].hp == {"max_tokens": 20480, "buffer_tokens": 4096}
    assert full.learner.optimizer.warmup_steps == 20 * 16
    assert tiny.reward.functions[1].hp == {"max_tokens": 8, "buffer_tokens": 2}


@pytest.mark.parametrize(
    "path", [path for path in FILES if kind_of(path) in ("base", "profile")], ids=name_of
)
def test_every_fragment_checks_out(path: Path) -> None:
    check_fragment(path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "base/b.yaml",
            "rollout: {enginee: vllm}\n",
            "b.yaml:1: unknown key rollout.enginee; did you mean 'rollout.engine'?",
        ),
        ("base/b.yaml", "rollout: {n: 0}\n", "b.yaml:1: rollout.n: got 0"),
        ("profiles/p.yaml", "train:\n  stepps: 3\n", "p.yaml:2: unknown key train.stepps"),
        (
            "profiles/p.yaml",
            "sizes: {lenght: {max_tokens: 8}}\n",
            "p.yaml:1: no method is called 'lenght'; did you mean 'length'?",
        ),
        (
            "profiles/p.yaml",
            "sizes: {length: {maxi_tokens: 8}}\n",
            "p.yaml:1: length has no hyperparameter 'maxi_tokens'",
        ),
        ("profiles/p.yaml", "advantage: rloo\n", "a profile replaces model, data and sizes and nothing else"),
    ],
)
def test_a_fragment_is_held_to_the_schema(tmp_path: Path, name: str, text: str, expected: str) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        check_fragment(path)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")],
)
def test_accelerate_configs_are_for_eight_gpus_and_leave_accumulation_to_the_learner(
    name: str, kind: str
) -> None:
    config = yaml.safe_load((ROOT / "accelerate" / f"{name}.yaml").read_text())
    assert (config["distributed_type"], config["num_processes"], config["mixed_precision"]) == (
        kind,
        8,
        "bf16",
    )
    assert config.get("deepspeed_config", {}).get("gradient_accumulation_steps", 1) == 1
    if kind == "DEEPSPEED":
        assert config["deepspeed_config"]["zero_stage"] == int(name[-1])
    if kind == "FSDP":
        assert config["fsdp_config"]["fsdp_version"] == 2
