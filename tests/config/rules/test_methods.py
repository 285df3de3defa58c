"""Combinations of methods: which are refused, with the remedy, and that similar recipes pass."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rltrain.advantage import ADVANTAGES
from rltrain.config import rules
from rltrain.config.rules.composition import MethodUse
from rltrain.config.rules.registries import ENVIRONMENTS, REGISTRIES
from rltrain.control import TOKEN_CONTROLS
from rltrain.loss import AGGREGATES
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.registry import Hyperparameter, MethodSpec
from support.checking import refused, warnings

CLIP_COV = "{name: clip_cov, eps_low: 0.2, eps_high: 0.2}"
TEMPERED = "rollout.extra_samples=[aepo]"


@pytest.mark.parametrize(
    ("overrides", "expected", "remedy"),
    [
        (
            ["control=[kl_cov]", "learner.updates=2"],
            "control.0 kl_cov is made for loss.policy kl_cov, which is clip",
            "set loss.policy to kl_cov or drop control.0",
        ),
        (
            ["loss.policy=kl_cov", "learner.updates=2"],
            "loss.policy kl_cov reads what the control kl_cov computes, but control does not list it",
            "add kl_cov to control",
        ),
        (
            [f"control=[{CLIP_COV}, kl_cov]", "learner.updates=2"],
            "clip_cov (with loss.policy clip) and control.1 kl_cov (with loss.policy kl_cov) each define a "
            "clipping rule",
            "keep one of them",
        ),
        (
            [f"control=[{CLIP_COV}]", "loss.policy=ce_gppo", "learner.updates=2"],
            "control.0 clip_cov is made for loss.policy clip, which is ce_gppo",
            "set loss.policy to clip",
        ),
        (
            ["control=[{name: clip_cov, eps_low: 0.2, eps_high: 0.28}]"],
            "control.0 clip_cov has eps_high 0.28 and loss.policy clip has 0.2",
            "write the same eps_high at both",
        ),
        (
            ["control=[kl_cov]", "loss.policy=kl_cov"],
            "control.0 kl_cov acts on the ratio to the old policy",
            "set learner.updates to 2 or more",
        ),
        (
            ["loss.policy=ce_gppo"],
            "loss.policy ce_gppo acts on the ratio to the old policy",
            "set learner.updates to 2 or more",
        ),
        (
            [
                "control=[steer]",
                "loss.policy=gspo",
                "loss.aggregate=seq_mean_token_mean",
                "learner.updates=2",
            ],
            "control.0 steer weighs tokens, but loss.policy gspo has one ratio per sequence",
            "set loss.policy to a token-level loss",
        ),
        (
            ["control=[steer, high_entropy_tokens, steer]"],
            "control.2 steer repeats control.0",
            "keep one of them",
        ),
        (
            ["loss.terms=[{name: kl, coefficient: 0.1}, {name: kl, estimator: k2, coefficient: 0.1}]"],
            "loss.terms.1 kl repeats loss.terms.0",
            "keep one of them",
        ),
        # the authors' script writes 0.2 percent
        (
            ["control=[{name: high_entropy_tokens, share: 20.0}]"],
            "control.0 high_entropy_tokens: share is 20",
            "0.2 percent is 0.002",
        ),
        (["control=[{name: steer, lambda_min: 0.0}]"], "lambda_min is 0, but it is a share", "above 0"),
        (
            ["control=[aepo]"],
            "control.0 aepo works on rows that only the aepo source samples",
            "add aepo to rollout.extra_samples",
        ),
        (
            [TEMPERED, "control=[aepo]", "loss.aggregate=dr_grpo"],
            "control.0 aepo gives each part of the loss its own denominator, which is exact under token_mean "
            "only",
            "set loss.aggregate to token_mean",
        ),
        (
            [TEMPERED, "control=[aepo]", "reward.functions=[{name: format, tags: [a]}]"],
            "control.0 aepo needs correctness",
            "add one of",
        ),
        (
            ["control=[dcpo]", "reward.functions=[{name: format, tags: [a]}]"],
            "control.0 dcpo needs correctness",
            "add one of",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_with_its_remedy(
    recipe: Path, overrides: list[str], expected: str, remedy: str
) -> None:
    (problem,) = refused(recipe, *overrides)
    assert expected in problem
    assert remedy in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["control=[kl_cov]", "loss.policy=kl_cov", "learner.updates=2"],
        ["control=[kl_cov]", "loss.policy=kl_cov", "learner.epochs=2"],
        # Clip-Cov drops tokens in a single update as well
        [f"control=[{CLIP_COV}]"],
        ["control=[clip_cov]", "loss.policy={name: clip, eps_low: 1.0, eps_high: 1.0}"],
        ["loss.policy=ce_gppo", "learner.updates=2"],
        [
            "control=[tis, steer, high_entropy_tokens]",
            "loss.terms=[{name: entropy, coefficient: 0.01}, {name: kl, coefficient: 0.1}]",
        ],
        [f"control=[{CLIP_COV}, steer, high_entropy_tokens]", "learner.updates=2"],
        ["control=[steer, kl_cov]", "loss.policy=kl_cov", "learner.updates=2"],
        ["control=[{name: steer, omega: exact}]", "loss.policy=ce_gppo", "learner.updates=2"],
        [TEMPERED, "control=[aepo, steer]"],
        [TEMPERED, "control=[{name: aepo, form: rows}]"],
        ["control=[dcpo]"],
        ["control=[{name: high_entropy_tokens, share: 1.0}]"],
    ],
)
def test_what_the_mathematics_allows_passes_without_a_word(recipe: Path, overrides: list[str]) -> None:
    assert warnings(recipe, *overrides) == ()


def test_every_control_or_loss_that_a_trait_names_exists() -> None:
    # a misspelt trait would refuse every recipe, or none
    registered = {"policy_loss": POLICY_LOSSES, "control": TOKEN_CONTROLS, "aggregate": AGGREGATES}
    for registry in (TOKEN_CONTROLS, POLICY_LOSSES, ADVANTAGES):
        for spec in registry.specs.values():
            chosen = MethodUse("here", spec, {})
            for trait, where in registered.items():
                assert set(chosen.arguments(trait)) <= set(where.names()), spec.name
            for trait in ("same_as_policy_loss", "fraction"):
                assert set(chosen.arguments(trait)) <= set(spec.hyperparameters), spec.name


def test_a_companion_points_back() -> None:
    # the control names its loss and the loss its control, or the loss works without one (clip)
    for name, spec in TOKEN_CONTROLS.specs.items():
        for companion in MethodUse("here", spec, {}).arguments("policy_loss"):
            back = MethodUse("there", POLICY_LOSSES.spec(companion), {}).arguments("control")
            assert back in ([], [name])
    for name, spec in POLICY_LOSSES.specs.items():
        for companion in MethodUse("here", spec, {}).arguments("control"):
            assert name in MethodUse("there", TOKEN_CONTROLS.spec(companion), {}).arguments("policy_loss")


def test_a_need_may_hold_a_hyperparameter_or_hang_on_its_value() -> None:
    spec = MethodSpec(
        name="m",
        module="m",
        attribute="m",
        arxiv=None,
        needs=frozenset({"tempered_logp:{high}"}),
        needs_if={"form=exact": frozenset({"entropy_now"}), "coefficient": frozenset({"ref_logp"})},
        traits=frozenset(),
        hyperparameters={
            "high": Hyperparameter("float", 1.2),
            "form": Hyperparameter("str", "released"),
            "coefficient": Hyperparameter("float", 0.0),
        },
        positional=(),
        inputs=(),
        refuses={},
        check="",
        doc="",
    )
    assert spec.needs_with({}) == {"tempered_logp:1.2"}
    assert spec.needs_with({"high": 1.5, "form": "exact", "coefficient": 0.1}) == {
        "tempered_logp:1.5",
        "entropy_now",
        "ref_logp",
    }


def test_no_central_rule_names_a_method() -> None:
    """A rule about one method stands beside it (``check``) or follows from its traits."""
    names = {name for registry in (*REGISTRIES, ENVIRONMENTS) for name in registry.specs}
    for path in sorted(Path(rules.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare) or ".name" not in ast.unparse(node):
                continue
            named = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & names
            assert not named, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
