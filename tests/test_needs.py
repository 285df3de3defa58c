"""Needs and traits are those of one list, and the page that shows it is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rltrain.config.rules.registries import ENVIRONMENTS, REGISTRIES
from rltrain.learner.head import STATISTICS as TOKEN_STATISTICS
from rltrain.loss.preference import STATISTICS
from rltrain.needs import NEEDS, TRAITS, unknown_words
from rltrain.registry import Registry
from rltrain.user_methods import all_needs

ROOT = Path(__file__).parents[1]
EVERY_REGISTRY = (*REGISTRIES, ENVIRONMENTS, STATISTICS)


@pytest.mark.parametrize("registry", EVERY_REGISTRY, ids=lambda registry: registry.kind.replace(" ", "_"))
def test_registered_methods_declare_listed_words_only(registry: Registry) -> None:
    for spec in registry.specs.values():
        assert list(unknown_words(all_needs(spec), spec.traits)) == [], spec.name


def test_every_listed_word_is_declared_or_computed() -> None:
    specs = [spec for registry in EVERY_REGISTRY for spec in registry.specs.values()]
    needs = {need.partition(":")[0] for spec in specs for need in all_needs(spec)}
    traits = {trait.partition(":")[0] for spec in specs for trait in spec.traits}
    assert set(NEEDS) <= needs | set(TOKEN_STATISTICS)
    assert set(TOKEN_STATISTICS) <= set(NEEDS)
    assert set(TRAITS) == traits


def test_the_page_is_current() -> None:
    command = [sys.executable, "scripts/needs_table.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
