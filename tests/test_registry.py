from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rltrain.registry import Registry

MODULE = '''
from __future__ import annotations
from typing import Literal
from rltrain.registry import method


@method("scaled", arxiv="1234.56789", needs={"old_logp"}, needs_if={"ref": {"ref_logp"}, "on": {"entropy"}},
        traits={"quick"}, refuses={"mode": {"worst": "it never works"}})
def scaled_(values, *, mask: Tensor, old: Tensor | None = None, by: float = 2.0, ref: float | None = None,
            on: bool = False, mode: Literal["a", "b"] = "a", count: int = 3):
    """Says what it does."""
    return values * by if mode == "a" else (values, mask, old, count)


@method("keeper")
class Keeper:
    """Has state."""

    def __init__(self, start, *, rate: float = 0.5):
        self.now = start * rate


def helper(x):
    return x
'''


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    (tmp_path / "declared_for_test.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "declared_for_test", raising=False)
    return Registry("toy", modules=("declared_for_test",))


def test_declarations_are_read_from_source_without_importing(registry: Registry):
    assert registry.names() == ["scaled", "keeper"]
    spec = registry.spec("scaled")
    assert (spec.attribute, spec.arxiv, spec.traits, spec.doc) == (
        "scaled_",
        "1234.56789",
        {"quick"},
        "Says what it does.",
    )
    assert {name: hp.default for name, hp in spec.hyperparameters.items()} == {
        "by": 2.0,
        "ref": None,
        "on": False,
        "mode": "a",
        "count": 3,
    }
    assert "declared_for_test" not in sys.modules


def test_tensors_are_inputs_and_never_hyperparameters(registry: Registry):
    assert registry.spec("scaled").inputs == ("mask", "old")
    with pytest.raises(ValueError, match="no hyperparameter 'mask'"):
        registry.check("scaled", {"mask": 1.0})


def test_bind_puts_hyperparameters_in_place(registry: Registry):
    assert registry.bind("scaled", {"by": 3.0})(2.0, mask=None) == 6.0
    assert registry.bind("scaled", {"by": 3})(2.0, mask=None) == 6.0  # a whole number is a float
    assert registry.bind("keeper", {"rate": 0.25})(8).now == 2.0


def test_needs_follow_the_hyperparameters(registry: Registry):
    assert registry.bind("scaled").needs == {"old_logp"}
    assert registry.bind("scaled", {"ref": 0.0, "on": False}).needs == {"old_logp"}
    assert registry.bind("scaled", {"ref": 0.1}).needs == {"old_logp", "ref_logp"}
    assert registry.bind("scaled", {"on": True}).needs == {"old_logp", "entropy"}


@pytest.mark.parametrize(
    ("name", "hp", "message"),
    [
        ("scalde", {}, "no toy is called 'scalde'; did you mean 'scaled'?"),
        ("zzz", {}, "no toy is called 'zzz'; choose from keeper, scaled"),
        ("scaled", {"moed": "a"}, "toy 'scaled' has no hyperparameter 'moed'; did you mean 'mode'?"),
        ("scaled", {"by": "1e-3"}, "by must be float, got '1e-3' (str)"),
        ("scaled", {"by": True}, "by must be float, got True (bool)"),
        ("scaled", {"by": float("nan")}, "by must be float, got nan (float)"),
        ("scaled", {"count": 1.5}, "count must be int, got 1.5 (float)"),
        ("scaled", {"mode": "c"}, "mode must be Literal['a', 'b'], got 'c' (str)"),
        ("scaled", {"mode": "worst"}, "got 'worst' (str): it never works"),
    ],
)
def test_mistakes_are_refused_with_what_arrived_and_what_was_expected(
    registry: Registry, name: str, hp: dict[str, object], message: str
):
    with pytest.raises(ValueError) as caught:
        registry.bind(name, hp)
    assert message in str(caught.value)


def test_a_name_declared_twice_is_an_error(registry: Registry):
    with pytest.raises(ValueError, match="'scaled' is declared in declared_for_test and declared_for_test"):
        Registry("toy", modules=("declared_for_test", "declared_for_test")).names()


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="module rltrain_nowhere does not exist"):
        Registry("toy", modules=("rltrain_nowhere",)).names()


def test_every_registered_signature_is_checked_without_torch():
    # a recipe is validated in a fraction of a second: reading declarations must not import the mathematics
    code = (
        "import sys\n"
        "from rltrain.advantage import ADVANTAGES\nfrom rltrain.control import TOKEN_CONTROLS\n"
        "from rltrain.loss import AGGREGATES, LOSS_TERMS\nfrom rltrain.loss.policy import POLICY_LOSSES\n"
        "for registry in (ADVANTAGES, TOKEN_CONTROLS, AGGREGATES, LOSS_TERMS, POLICY_LOSSES):\n"
        "    for spec in registry.specs.values():\n"
        "        registry.check(spec.name, {key: hp.default for key, hp in spec.hyperparameters.items()})\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
