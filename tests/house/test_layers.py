"""Imports point down, never sideways, never up; heavy packages stay in their adapters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Lowest first. Folders on one line are blind to one another; files on one line are not.
LAYERS = (
    (
        "rltrain.types",
        "rltrain.protocols",
        "rltrain.declaration",
        "rltrain.needs",
        "rltrain.user_methods",
        "rltrain.hyperparameter_ranges",
        "rltrain.registry",
        "rltrain.tensor_ops",
        "rltrain.seeds",
        "rltrain.shard_sums",
        "rltrain.weight_transfer",
        "rltrain.errors",
        "rltrain.interrupt",
        "rltrain.json_text",
        "rltrain.timeline",
        "rltrain.model_files",
        "rltrain.adapter_files",
        "rltrain.remote_code",
        "rltrain.chat_template",
        "rltrain.watchdog",
        "rltrain.model_limits",
        "rltrain.process",
        "rltrain.round_trip",
        "rltrain.head_scales",
    ),
    ("rltrain.weight_names",),
    ("rltrain.advantage", "rltrain.control"),
    ("rltrain.loss",),
    ("rltrain.config",),
    (
        "rltrain.data",
        "rltrain.rollout",
        "rltrain.learner",
        "rltrain.sync",
        "rltrain.checkpoint",
        "rltrain.report",
    ),
    ("rltrain.train",),
    ("rltrain.analysis",),
    ("rltrain.build",),
    ("rltrain.cli", "rltrain.__main__"),
)

# package -> where it may be imported (a prefix of the path below the repository root)
HOMES = {
    "vllm": ("rltrain/rollout/engines/vllm/", "rltrain/rollout/worker/", "rltrain/sync/"),
    "accelerate": ("rltrain/learner/",),
    "deepspeed": ("rltrain/learner/",),
    "bitsandbytes": ("rltrain/learner/",),
    "httpx": ("rltrain/rollout/worker/", "rltrain/rollout/pool/knock.py"),
    "peft": ("rltrain/learner/",),
    "textworld": ("rltrain/rollout/environments/text_game.py",),
    "huggingface_hub": (
        "rltrain/checkpoint/hub.py",
        "rltrain/checkpoint/model_card.py",
        "rltrain/data/",
        "rltrain/model_files.py",
    ),
    "tensorboard": ("rltrain/report/sinks.py",),
    "wandb": ("rltrain/report/sinks.py",),
    "trackio": ("rltrain/report/sinks.py",),
}


def sources() -> list[Path]:
    return sorted([*(ROOT / "rltrain").rglob("*.py"), *(ROOT / "reward").rglob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return f"rltrain.{module}" if parts[0] == "reward" else module  # the link rltrain/reward


def imports_of(text: str, module: str, is_package: bool) -> set[str]:
    """Every module an import statement names, at any depth of the file; ``from a import b`` counts as a.b."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[
                    : None if is_package and node.level == 1 else -(node.level - is_package)
                ]
                base = ".".join([*parents, base] if base else parents)
            imported |= {f"{base}.{alias.name}" for alias in node.names}
    return imported


def layer_of(module: str) -> tuple[int, str] | None:
    """(level, its entry in LAYERS); None for the package itself, which everything may name and which
    imports nothing.
    """
    for level, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(f"{name}."):
                return level, name
    return None


def is_reward(module: str) -> bool:
    return module == "rltrain.reward" or module.startswith("rltrain.reward.")


def complaint(module: str, imported: str) -> str | None:
    """Why ``module`` may not import ``imported``, or None."""
    if imported.split(".")[0] == "reward":
        return "it is called rltrain.reward"
    if is_reward(module):
        if imported.split(".")[0] != "rltrain" or imported in ("rltrain", "rltrain.__version__"):
            return None
        return None if is_reward(imported) else "reward stands alone"
    if imported.split(".")[0] != "rltrain" or (there := layer_of(imported)) is None:
        return None
    here = layer_of(module)
    if here is None:
        return "the package itself imports nothing"
    files_of_one_layer = here[0] == there[0] and here[0] in (0, len(LAYERS) - 1)
    if there[0] < here[0] or there[1] == here[1] or files_of_one_layer:
        return None
    return "sideways" if there[0] == here[0] else "upwards"


@pytest.mark.parametrize(
    ("module", "imported", "why"),
    [
        ("rltrain.loss.terms.kl.kl.kl", "rltrain.types.TrainBatch", None),
        ("rltrain.loss.policy.clip", "rltrain.loss.aggregate", None),
        ("rltrain.protocols", "rltrain.types.Prompt", None),
        ("rltrain.cli.app", "rltrain.build.online.build_online_run", None),
        ("rltrain.rollout.collate", "rltrain.reward.score.Score", None),
        ("rltrain.loss.terms.kl.kl.kl", "rltrain.config.schema", "upwards"),
        ("rltrain.types", "rltrain.loss", "upwards"),
        ("rltrain.advantage.group", "rltrain.control", "sideways"),
        ("rltrain.learner.forward", "rltrain.rollout.collate", "sideways"),
        ("rltrain.reward.pool", "rltrain.errors", "reward stands alone"),
        ("rltrain.reward.pool", "rltrain.reward.score.Score", None),
        ("rltrain.reward.source", "rltrain", None),
        ("rltrain.rollout.collate", "reward.Score", "it is called rltrain.reward"),
    ],
)
def test_the_rule_itself(module: str, imported: str, why: str | None):
    assert complaint(module, imported) == why


def test_relative_imports_are_seen():
    in_a_file = imports_of("from . import a\nfrom .b import c\nfrom ..d import e", "rltrain.x.y", False)
    assert in_a_file == {"rltrain.x.a", "rltrain.x.b.c", "rltrain.d.e"}
    in_a_package = imports_of("from .b import c\nfrom ..d import e", "rltrain.x", True)
    assert in_a_package == {"rltrain.x.b.c", "rltrain.d.e"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    module = module_of(path)
    assert module == "rltrain" or is_reward(module) or layer_of(module), f"{module} has no place in LAYERS"
    imported = imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    wrong = {name: why for name in sorted(imported) if (why := complaint(module, name))}
    assert not wrong


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_in_their_adapter_only(path: Path):
    below = path.relative_to(ROOT).as_posix()
    packages = {
        name.split(".")[0]
        for name in imports_of(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py")
    }
    assert not {name for name in packages & HOMES.keys() if not below.startswith(HOMES[name])}
    if below.startswith("reward/") and path.name != "implicit_prm.py":
        assert not packages & {"torch", "transformers", "vllm"}, "graders run in small processes"
    if below.startswith("rltrain/config/"):
        assert not packages & {"torch", "transformers"}, "recipes are validated without torch"


def test_no_sampler_or_engine_hands_on_whatever_it_is_asked():
    # a protocol that is met by __getattr__ is one that the type checker cannot check
    for path in sources():
        if path.is_relative_to(ROOT / "rltrain" / "rollout"):
            assert "def __getattr__" not in path.read_text(encoding="utf-8"), path


def test_every_heavy_package_has_a_file_that_exists_or_is_not_used_yet():
    # a typo in HOMES would allow nothing and forbid everything; this catches a folder that was renamed
    for homes in HOMES.values():
        assert all((ROOT / home).parent.is_dir() for home in homes)
