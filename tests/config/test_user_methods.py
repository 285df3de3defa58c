"""Every kind of method can come from a user's file, which is checked like a registered method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rltrain.advantage import ADVANTAGES
from rltrain.checkpoint.inputs import code_digests
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.config.rules import check
from rltrain.config.rules.registries import EXTRA_SAMPLES, JUDGES, ORDERS, REGISTRIES
from rltrain.control import COEFFICIENTS
from rltrain.errors import RecipeError
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.registry import MethodSpec
from tests.config.conftest import MINIMAL

Write = Callable[..., Path]

METHODS = """\
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.registry import method
from rltrain.control.coefficient import AnnealedCoefficient
from rltrain.data.order import PromptOrder
from rltrain.rollout.extra_samples import DatasetAnswers

Mode = Literal["mean", "median"]


@method("my_advantage", needs={"mask"})
def advantage(rewards: Tensor, group: Tensor, *, mask: Tensor, mode: Mode = "mean") -> Tensor:
    return rewards


@method("my_control", needs={"old_logp"}, traits={"fraction:share"})
def control(batch, *, share: float = 0.2):
    return batch


@method("my_loss", needs={"old_logp"}, traits={"owns_clipping"}, refuses={"eps": {"off": "set it to 0"}})
def loss(policy, batch, *, eps: float = 0.2):
    return None


@method("my_term", needs={"entropy_grad"})
def term(policy, batch):
    return None


@method("my_aggregate")
def aggregate(per_token, mask, totals):
    return None


@method("my_preference", needs={"ref_logp"}, traits={"pairs"})
def preference(policy, batch, *, beta: float = 0.1):
    return None


@method("my_coefficient")
class Coefficient(AnnealedCoefficient):
    pass


@method("my_judge")
class Judge:
    def __init__(self, context, *, noise: float = 0.0) -> None:
        pass

    def prefers(self, comparisons):
        return [0.5 for _ in comparisons]


@method("my_source", traits={"trains"})
class Source(DatasetAnswers):
    pass


@method("my_order")
class Order(PromptOrder):
    pass
"""
# key -> (value with a hyperparameter, the same with a wrong type), in a recipe of the base given by the key
ONLINE = {
    "advantage": "{name: 'mine.py:advantage', mode: median}",
    "control": "[{name: 'mine.py:control', share: 0.5}]",
    "loss.policy": "{name: 'mine.py:loss', eps: 0.1}",
    "loss.aggregate": "'mine.py:aggregate'",
    "loss.terms": "[{name: 'mine.py:term', coefficient: {name: 'mine.py:Coefficient', slope: 0.5}}]",
    "rollout.extra_samples": "['mine.py:Source']",
    "data.order": "'mine.py:Order'",
}
PAIRS = MINIMAL.replace("advantage: group_norm\nloss: {policy: clip}\n", "kind: online_pairs\n")


@pytest.fixture
def methods_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write("mine.py", METHODS)


def problem(recipe: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        check(load_recipe(recipe, overrides=overrides))
    return str(caught.value)


@pytest.mark.parametrize("key", ONLINE)
def test_every_place_of_an_online_recipe_takes_a_users_method(
    methods_file: Path, recipe: Path, key: str
) -> None:
    overrides = [f"{key}={ONLINE[key]}"]
    if key == "rollout.extra_samples":
        overrides.append("advantage=aapo")
        overrides.append("rollout.extra_samples.1=reference")
    loaded = load_recipe(recipe, overrides=overrides)
    check(loaded)
    data = loaded.model_dump(mode="json")
    digests = [name for name in code_digests(data) if f"{methods_file}:" in name]
    assert len(digests) == ONLINE[key].count("mine.py")
    assert resolved_yaml(loaded).count("sha256:") == len(digests)


@pytest.mark.parametrize("kind", ["online_pairs", "offline", "process_reward"])
def test_preference_losses_and_judges_take_a_users_method(
    methods_file: Path, write: Write, kind: str
) -> None:
    loss = "{preference: {name: 'mine.py:preference', beta: 0.2}}"
    if kind == "online_pairs":
        text = PAIRS + f"loss: {loss}\npairs: {{judge: {{name: 'mine.py:Judge', noise: 0.1}}}}\n"
        check(load_recipe(write("pairs.yaml", text)))
    elif kind == "offline":
        text = (
            "model: {path: tiny}\ndata: {train: arithmetic_pairs}\nlearner: {optimizer: {lr: 1e-4}}\n"
            f"train: {{examples: 4}}\nloss: {loss}\n"
        )
        check(load_recipe(write("offline.yaml", text)))
    else:
        override = "process_reward={optimizer: {lr: 1.0}, loss: 'mine.py:preference'}"
        message = problem(write("recipe.yaml"), override, "advantage=prime")
        assert "process_reward.loss is my_preference, but a step provides single completions" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("advantage={name: 'mine.py:advantage', mode: mode}", "mode must be Mode, got 'mode' (str)"),
        ("advantage={name: 'mine.py:advantage', mod: mean}", "no hyperparameter 'mod'; did you mean 'mode'?"),
        ("control=[{name: 'mine.py:control', share: 2.0}]", "mine.py): share is 2, but it is a share"),
        ("loss.policy={name: 'mine.py:loss', eps: off}", "eps must be float, got 'off' (str): set it to 0"),
        ("loss.policy=mine.py:losss", "mine.py defines no function 'losss'; did you mean 'loss'?"),
        ("loss.policy=nowhere.py:loss", "nowhere.py"),
        ("loss.policy=mine.py", "your own is named as path/to/file.py:name"),
        ("loss.policy=mine.py:aggregate", "by position, but a policy loss takes (policy, batch)"),
        ("data.order=mine.py:Judge", "mine.py:Judge lacks next, observe, state_dict, load_state_dict; a"),
    ],
)
def test_a_users_method_is_refused_like_a_registered_one(
    methods_file: Path, recipe: Path, override: str, expected: str
) -> None:
    message = problem(recipe, override)
    assert (
        (expected in message and str(methods_file.parent) in message)
        or "control.0" in message
        or "path/to" in message
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def loss(policy, batch): ...", 'declares no method; write @method("loss"'),
        ("@method('clip')\ndef loss(policy, batch): ...", "declares the name 'clip', which is that of a"),
        ("@method('m')\ndef loss(policy, batch, *, eps=0.2): ...", "eps has no type; write it in the"),
        ("@method('m')\ndef loss(policy, batch, *, eps: Odd = 0.2): ...", "the type Odd of eps is unknown"),
        (
            "@method('m')\ndef loss(policy, batch, *, ref: float): ...",
            "ref has no default, so that the",
        ),
        ("@method('m', needs={'entropy:{t}'})\ndef loss(policy, batch): ...", "names the hyperparameter t,"),
        ("@method('m', needs={'old_lgp'})\ndef loss(policy, batch): ...", "did you mean 'old_logp'?"),
        ("@method('m', traits={'own_clip'})\ndef loss(policy, batch): ...", "did you mean 'owns_clipping'?"),
        ("@method('m', needs_if={'kl': {'ref_logp'}})\ndef loss(policy, batch): ...", "hyperparameter kl,"),
        ("raise SystemExit('no')\ndef loss(policy, batch): ...", "mine.py does not import: SystemExit: no"),
        ("def loss(policy, batch:", "mine.py is not valid Python"),
        ("loss = 7", "mine.py has no function or class 'loss'"),
    ],
)
def test_a_file_that_declares_its_method_wrongly_is_named(
    write: Write, recipe: Path, code: str, expected: str
) -> None:
    header = "from __future__ import annotations\nfrom rltrain.registry import method\n"
    write("mine.py", header + code + "\n")
    message = problem(recipe, f"loss.policy={recipe.parent}/mine.py:loss")
    assert expected in message and "loss.policy: " in message and "mine.py" in message


CHECKED = """\
from rltrain.needs import OLD_LOGP, POLICY_LOSS
from rltrain.registry import method

def check_share(values, recipe):
    if values["share"] * recipe.rollout.n < 1:
        yield f"share is {values['share']:g} of rollout.n {recipe.rollout.n}: less than one; raise it"

@method("shared", needs={OLD_LOGP}, traits={POLICY_LOSS("clip")}, check=check_share)
def shared(batch, *, share: float = 0.2):
    return batch
"""


def test_the_rule_beside_a_users_method_is_asked(write: Write, recipe: Path) -> None:
    name = f"{write('checked.py', CHECKED)}:shared"
    check(load_recipe(recipe, overrides=[f"control=[{{name: {name}, share: 0.5}}]"]))
    refused = problem(recipe, f"control=[{{name: {name}, share: 0.01}}]")
    assert f"control.0 shared ({name.removesuffix(':shared')}): share is 0.01 of rollout.n" in refused


def test_a_rule_that_the_file_does_not_define_is_named(write: Write, recipe: Path) -> None:
    nameless = CHECKED.replace("check=check_share", "check=lambda values, recipe: iter(())")
    name = f"{write('checked.py', nameless)}:shared"
    assert "check must be a function of the same file" in problem(recipe, f"control=[{{name: {name}}}]")


def test_an_input_of_the_stage_must_be_among_the_needs(write: Write, recipe: Path) -> None:
    write("mine.py", METHODS.replace('"my_advantage", needs={"mask"}', '"my_advantage"'))
    message = problem(recipe, f"advantage={recipe.parent}/mine.py:advantage")
    assert "it takes mask, which is computed only on request; add 'mask' to needs" in message


def test_an_imported_or_assigned_method_is_followed(methods_file: Path, write: Write, recipe: Path) -> None:
    write("more.py", "from mine import loss\nother = loss\n")
    for name in ("loss", "other"):
        check(load_recipe(recipe, overrides=[f"loss.policy=more.py:{name}"]))
        followed = POLICY_LOSSES.spec(f"{recipe.parent}/more.py:{name}")
        declared = POLICY_LOSSES.spec(f"{methods_file}:loss")
        assert followed.needs == declared.needs and followed.hyperparameters == declared.hyperparameters


def test_changed_code_is_refused_until_its_digest_is_taken_out(
    methods_file: Path, write: Write, recipe: Path
) -> None:
    loaded = load_recipe(recipe, overrides=["loss.policy=mine.py:loss"])
    before = code_digests(loaded.model_dump(mode="json"))
    resolved = write("run/recipe.resolved.yaml", resolved_yaml(loaded))
    methods_file.write_text(METHODS.replace("eps: float = 0.2", "eps: float = 0.3"))
    assert "mine.py or a module beside it has changed" in problem(resolved)
    now = load_recipe(resolved, overrides=["loss.policy.sha256=null"])
    check(now)
    assert code_digests(now.model_dump(mode="json")).keys() == before.keys()
    assert code_digests(now.model_dump(mode="json")) != before


@pytest.mark.parametrize("registry", [*REGISTRIES], ids=lambda registry: registry.kind.replace(" ", "_"))
def test_a_registered_method_read_from_source_is_the_one_that_its_function_declares(registry) -> None:
    if registry.decorator != "method":
        pytest.skip("rewards have a decorator of their own")
    for name in registry.names():
        bound = registry.bind(name)
        function = bound.function.func
        declaration = function.method_declaration
        assert {key: getattr(bound.spec, key) for key in vars(declaration)} == vars(declaration)
        assert isinstance(bound.spec, MethodSpec)


@pytest.mark.parametrize("registry", [COEFFICIENTS, EXTRA_SAMPLES, JUDGES, ORDERS], ids=lambda r: r.kind)
def test_the_interface_of_a_kind_is_that_of_its_registered_methods(registry) -> None:
    for name in registry.names():
        function = registry.bind(name).function.func
        assert [key for key in registry.interface if not hasattr(function, key)] == []


def test_one_file_is_imported_once(methods_file: Path) -> None:
    first = ADVANTAGES.bind(f"{methods_file}:advantage")
    second = ADVANTAGES.bind(f"{methods_file}:advantage", {"mode": "median"})
    assert first.function.func is second.function.func
