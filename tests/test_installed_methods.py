"""Installed packages bring methods by entry points of the group ``rltrain.methods``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rltrain.config.rules.registries import ENVIRONMENTS, REGISTRIES
from rltrain.reward.installed import KINDS

ROOT = Path(__file__).parents[1]
LOSSES = """\
import rltrain.registry

@rltrain.registry.method("packaged_loss", needs={"old_logp"}, traits={"owns_clipping"})
def packaged_loss(policy, batch, *, cap: float = 2.0):
    return None
"""
REWARDS = """\
from rltrain.reward.score import Score, reward

@reward("packaged_reward")
def packaged_reward(inputs, *, scale: float = 1.0):
    return [Score(scale) for _ in inputs.completions]
"""
ENTRY_POINTS = "packaged-1.2.dist-info/entry_points.txt"
POINTS = "[rltrain.methods]\npolicy_loss = packaged.losses\nreward.more = packaged.rewards\n"
Ask = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of an installed distribution ``packaged 1.2``."""
    folder = tmp_path / "site"
    (folder / "packaged").mkdir(parents=True)
    (folder / "packaged/__init__.py").write_text("")
    (folder / "packaged/losses.py").write_text(LOSSES)
    (folder / "packaged/rewards.py").write_text(REWARDS)
    (folder / "packaged-1.2.dist-info").mkdir()
    (folder / "packaged-1.2.dist-info/METADATA").write_text("Name: packaged\nVersion: 1.2\n")
    (folder / ENTRY_POINTS).write_text(POINTS)
    return folder


@pytest.fixture
def ask(package: Path) -> Ask:
    """Runs ``rltrain`` or other code in a process that has the package installed."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{package}"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return call


def validate(ask: Ask, *overrides: str) -> str:
    settings = [word for override in overrides for word in ("--set", override)]
    done = ask("-m", "rltrain", "validate", "recipes/policy/grpo.yaml", *settings)
    return " ".join((done.stdout + done.stderr).split())


def test_a_packages_methods_are_checked_like_registered_ones(ask: Ask) -> None:
    rewards = "reward.functions=[{name: packaged_reward, scale: 2.0}]"
    assert "grpo.yaml: ok" in validate(ask, "loss.policy={name: packaged_loss, cap: 3.0}", rewards)
    message = validate(ask, "loss.policy={name: packaged_loss, cup: 3.0}")
    assert "policy loss 'packaged_loss' has no hyperparameter 'cup'; did you mean 'cap'?" in message


def test_they_are_bound_without_torch_and_their_version_is_an_input_of_the_run(ask: Ask) -> None:
    code = (
        "import sys\n"
        "from rltrain.loss.policy import POLICY_LOSSES\n"
        "from rltrain.reward.resolve import RewardCall, resolve\n"
        "spec = POLICY_LOSSES.check('packaged_loss', {'cap': 1.0})\n"
        "print(spec.package, 'torch' in sys.modules)\n"
        "print(resolve(RewardCall('packaged_reward', 1.0, {'scale': 2.0})).label)\n"
        "print(POLICY_LOSSES.bind('packaged_loss', {'cap': 1.0}).name)\n"
        "from rltrain.build.digests import _package_versions\n"
        "print(_package_versions({'loss': {'policy': 'packaged_loss'}}))\n"
    )
    done = ask("-c", code)
    assert done.stdout.splitlines() == [
        "packaged 1.2 False",
        "packaged_reward",
        "packaged_loss",
        "{'package packaged': '1.2'}",
    ], done.stderr


@pytest.mark.parametrize(
    ("file", "before", "after", "name", "expected"),
    [
        ("packaged/losses.py", "packaged_loss", "clip", "clip", "rltrain and packaged 1.2 both declare the"),
        ("packaged/losses.py", "import rltrain", "x = (\nimport rltrain", "packaged_loss", "cannot be read"),
        ("packaged/losses.py", "policy, batch", "policy", "packaged_loss", "takes (policy) by position, but"),
        ("packaged/losses.py", "cap: float", "cap", "packaged_loss", "cap has no type"),
        ("packaged/losses.py", "cap: float", "cap: Odd", "packaged_loss", "the type Odd of cap cannot be"),
        (
            "packaged-1.2.dist-info/entry_points.txt",
            "policy_loss =",
            "policy =",
            "packaged_loss",
            "no kind of",
        ),
        (ENTRY_POINTS, ".losses", ".lost", "packaged_loss", "packaged.lost"),
    ],
)
def test_a_fault_of_a_package_is_told_where_its_method_is_named_and_nowhere_else(
    ask: Ask, package: Path, file: str, before: str, after: str, name: str, expected: str
) -> None:
    text = (package / file).read_text()
    assert before in text
    (package / file).write_text(text.replace(before, after))
    message = validate(ask, f"loss.policy={name}")
    assert expected in message and "packaged 1.2" in message and "Traceback" not in message
    assert "grpo.yaml: ok" in validate(ask, "loss.policy=reinforce")


def test_every_registry_has_its_kind_of_entry_point() -> None:
    kinds = {registry.kind.replace(" ", "_") for registry in (*REGISTRIES, ENVIRONMENTS)}
    assert kinds == set(KINDS)
