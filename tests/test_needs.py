"""Needs and traits are those of one list, and the page that shows it is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rltrain import needs as constants
from rltrain.config.rules.registries import ENVIRONMENTS, REGISTRIES
from rltrain.learner.head import STATISTICS as TOKEN_STATISTICS
from rltrain.loss.preference import STATISTICS
from rltrain.needs import NEEDS, TRAITS, find_word_problems
from rltrain.registry import Registry
from rltrain.user_methods import all_needs

ROOT = Path(__file__).parents[1]
EVERY_REGISTRY = (*REGISTRIES, ENVIRONMENTS, STATISTICS)


@pytest.mark.parametrize("registry", EVERY_REGISTRY, ids=lambda registry: registry.kind.replace(" ", "_"))
def test_registered_methods_declare_listed_words_only(registry: Registry) -> None:
    for spec in registry.specs.values():
        assert list(find_word_problems(all_needs(spec), spec.traits)) == [], spec.name


def test_every_listed_word_is_declared_or_computed() -> None:
    specs = [spec for registry in EVERY_REGISTRY for spec in registry.specs.values()]
    needs = {need.partition(":")[0] for spec in specs for need in all_needs(spec)}
    traits = {trait.partition(":")[0] for spec in specs for trait in spec.traits}
    assert set(NEEDS) <= needs | set(TOKEN_STATISTICS)
    assert set(TOKEN_STATISTICS) <= set(NEEDS)
    assert set(TRAITS) == traits


def test_a_constant_has_the_name_of_its_word() -> None:
    for word in (*NEEDS.values(), *TRAITS.values()):
        assert getattr(constants, word.upper()) is word


@pytest.mark.parametrize(
    ("needs", "traits", "problem"),
    [
        ({"old_logpp"}, set(), "no need is called 'old_logpp'; did you mean 'old_logp'?"),
        ({"old_logp:2"}, set(), "the need 'old_logp' takes no argument and has '2'; write 'old_logp'"),
        ({"clamped_entropy"}, set(), "the need 'clamped_entropy' lacks its argument (share)"),
        (set(), {"policy_loss"}, "the trait 'policy_loss' lacks its argument (policy loss)"),
        (set(), {"groupless:all"}, "the trait 'groupless' takes no argument and has 'all'"),
    ],
)
def test_a_wrong_word_is_named_with_the_remedy(needs: set[str], traits: set[str], problem: str) -> None:
    (line,) = find_word_problems(needs, traits)
    assert line.startswith(problem)


@pytest.mark.parametrize(
    "need", ["entropy", "entropy:0.5", "expected_entropy_slope_now", "tempered_logp_now:2"]
)
def test_an_optional_argument_and_the_ending_now_are_taken(need: str) -> None:
    assert list(find_word_problems({need}, set())) == []


def test_the_page_is_current() -> None:
    command = [sys.executable, "scripts/needs_table.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
