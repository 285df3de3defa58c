"""Every case of known_answers/*.json: the papers' and their authors' code on a small batch, in float64, to
1e-6.

A case names the methods it goes through (advantage, control, policy, term, aggregate; hyperparameters beside
the name) and the quantity that is compared. Cases with "by_hand" carry their arithmetic; the others were
computed by the authors' formulas in numpy.

The batch is the common one (2 sequences of 3 and 2 tokens, given as probabilities) with what the file's
"common_batch" and then the case's "batch" replace; one with a "mask" of its own takes nothing over. "pi_old",
"pi_new", ... are probabilities; "entropy" is that of the old and of the current policy; other names are
fields of TrainBatch ("notes" and "extra" are mappings); "policy_extra" are further statistics of the current
policy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.advantage import ADVANTAGES
from rltrain.control import TOKEN_CONTROLS
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.policy.ratio import log_ratio
from rltrain.registry import BoundMethod, Registry
from rltrain.types.policy import PolicyTokens, StepTotals, TokenLoss, TrainBatch

FILES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).with_name("known_answers").glob("*.json"))
}
COMMON = FILES["common_ground"]["common_batch"]
PROBABILITIES = {
    **{"pi_old": "old_logp", "pi_new": "logp_now", "pi_ref": "ref_logp", "pi_roll": "rollout_logp"},
    "pi_teacher": "teacher_logp",
}
INTEGERS = {"group", "source", "version", "sample", "answer", "step_id"}
Case = Mapping[str, Any]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(case: Case) -> TrainBatch:
    given = case["given"]
    mask = tensor(given["mask"])
    rows = torch.zeros(len(mask), dtype=torch.int64)
    fields: dict[str, Any] = {
        "weights": torch.ones_like(mask),
        "rewards": tensor([1.0] + [0.0] * (len(mask) - 1)),
    }
    fields |= {"group": rows, "source": rows, "version": rows}
    fields |= {
        name: tensor(given["entropy"]) for name in ("old_entropy", "entropy_now") if "entropy" in given
    }
    for name, values in given.items():
        if name in PROBABILITIES:
            fields[PROBABILITIES[name]] = tensor(values).log()
        elif name == "extra":
            fields[name] = {key: tensor(value) for key, value in values.items()}
        elif name == "notes":
            fields[name] = values
        elif name not in ("entropy", "max_tokens", "policy_extra"):
            fields[name] = torch.tensor(values) if name in INTEGERS else tensor(values)
    return TrainBatch(**fields)


def policy_of(case: Case) -> PolicyTokens:
    given, now = case["given"], batch_of(case).logp_now
    assert now is not None, "the case's batch has no pi_new"
    extra = {name: tensor(values).requires_grad_() for name, values in given.get("policy_extra", {}).items()}
    return PolicyTokens(
        now.requires_grad_(), tensor(given["entropy"]).requires_grad_() if "entropy" in given else None, extra
    )


def bound(registry: Registry, named: dict[str, Any] | str) -> BoundMethod:
    named = {"name": named} if isinstance(named, str) else named
    return registry.bind(named["name"], {key: value for key, value in named.items() if key != "name"})


def advantages(case: Case) -> Tensor:
    """Of the case's own "rewards" and "group", with whatever else the estimator takes from the batch."""
    estimator, batch = bound(ADVANTAGES, case["advantage"]), batch_of(case)
    inputs = {name: getattr(batch, name) for name in estimator.spec.inputs}
    return estimator(tensor(case["rewards"]), torch.tensor(case["group"]), **inputs)


def controlled(case: Case) -> TrainBatch:
    return bound(TOKEN_CONTROLS, case["control"])(batch_of(case)) if "control" in case else batch_of(case)


def on_mask(case: Case, pick: Callable[[TrainBatch], Tensor]) -> Tensor:
    batch = controlled(case)
    return torch.where(batch.mask, pick(batch), 0.0)


def loss(case: Case, policy: PolicyTokens) -> Tensor:
    batch = controlled(case)
    totals = StepTotals(*batch.totals_of_mask, max_tokens=case["given"]["max_tokens"])
    return Objective(bound(POLICY_LOSSES, case["policy"]), (), bound(AGGREGATES, case["aggregate"]))(
        policy, batch, totals
    ).loss


def policy_loss(case: Case, policy: PolicyTokens) -> TokenLoss:
    return bound(POLICY_LOSSES, case["policy"])(policy, controlled(case))


def term(case: Case, policy: PolicyTokens) -> TokenLoss:
    told = {
        name: tensor(value) for name, value in case.get("inputs", {}).items()
    }  # by the coefficient's controller
    return bound(LOSS_TERMS, case["term"])(policy, controlled(case), **told)


def term_loss(case: Case) -> Tensor:
    batch = controlled(case)
    totals = StepTotals(*batch.totals_of_mask, max_tokens=case["given"]["max_tokens"])
    return bound(AGGREGATES, case["aggregate"])(term(case, policy_of(case)).values, batch.mask, totals)


def slope(quantity: Callable[[Case, PolicyTokens], Tensor], case: Case) -> Tensor:
    """d(sum of the quantity) / d(logp, or what "with_respect_to" names: "entropy" or a name in
    policy_extra).
    """
    policy, name = policy_of(case), case.get("with_respect_to", "logp")
    leaf = {"logp": policy.logp, "entropy": policy.entropy, **policy.extra}[name]
    assert leaf is not None
    return torch.autograd.grad(quantity(case, policy).sum(), leaf)[0]


QUANTITIES: dict[str, Callable[[Case], Tensor]] = {
    "advantages": advantages,
    "weights": lambda case: on_mask(case, lambda batch: batch.weights),
    "controlled advantages": lambda case: on_mask(case, lambda batch: batch.advantages),
    "controlled mask": lambda case: controlled(case).mask.double(),
    "extra": lambda case: on_mask(case, lambda batch: batch.extra[case["extra"]]),
    "note": lambda case: tensor(controlled(case).notes[case["note"]]),
    "ratio": lambda case: log_ratio(policy_of(case), batch_of(case)).exp() * batch_of(case).mask,
    "values": lambda case: policy_loss(case, policy_of(case)).values,
    "gradient of sum": lambda case: slope(lambda case, policy: policy_loss(case, policy).values, case),
    "term": lambda case: term(case, policy_of(case)).values,
    "term gradient of sum": lambda case: slope(lambda case, policy: term(case, policy).values, case),
    "term loss": term_loss,
    "loss": lambda case: loss(case, policy_of(case)),
    "gradient": lambda case: slope(loss, case),
}


def given(facts: Mapping[str, Any], case: Case) -> dict[str, Any]:
    own = facts.get("common_batch", {}) | case.get("batch", {})
    return ({"max_tokens": COMMON["max_tokens"]} if "mask" in own else COMMON) | own


# A file whose cases speak of other quantities (preference losses, graders, ...) has a test of its own.
CASES: dict[str, Case] = {
    f"{file}/{case['id']}": {**case, "given": given(facts, case)}
    for file, facts in FILES.items()
    for case in facts["cases"]
    if case.get("quantity") in QUANTITIES
}


@pytest.mark.parametrize("name", CASES)
def test_the_known_answer_comes_out_in_float64(name: str):
    case = CASES[name]
    got = QUANTITIES[case["quantity"]](case).detach()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, tensor(case["expected"]), rtol=0, atol=1e-6)
