"""Every case of known_answers/*.json: results of the papers and their authors' code on a small batch, in
float64, to 1e-6.

A case names its methods (advantage, control, policy, term, aggregate; hyperparameters next to the name) and
the quantity that is compared. Cases with "by_hand" state their arithmetic; the others were computed by the
authors' formulas in numpy.

The batch is the common one (2 sequences of 3 and 2 tokens, as probabilities); the file's "common_batch" and
then the case's "batch" replace its fields, and a batch with its own "mask" takes no common field. "pi_old",
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
    case_fields = case["fields"]
    mask = tensor(case_fields["mask"])
    rows = torch.zeros(len(mask), dtype=torch.int64)
    fields: dict[str, Any] = {
        "weights": torch.ones_like(mask),
        "rewards": tensor([1.0] + [0.0] * (len(mask) - 1)),
    }
    fields |= {"group": rows, "source": rows, "version": rows}
    fields |= {
        name: tensor(case_fields["entropy"])
        for name in ("old_entropy", "entropy_now")
        if "entropy" in case_fields
    }
    for name, values in case_fields.items():
        if name in PROBABILITIES:
            fields[PROBABILITIES[name]] = tensor(values).log()
        elif name in ("extra", "parts"):
            fields[name] = {key: tensor(value) for key, value in values.items()}
        elif name == "notes":
            fields[name] = values
        elif name not in ("entropy", "max_tokens", "policy_extra"):
            fields[name] = torch.tensor(values) if name in INTEGERS else tensor(values)
    return TrainBatch(**fields)


def policy_of(case: Case) -> PolicyTokens:
    fields = case["fields"]
    now = batch_of(case).logp_now
    assert now is not None, "the case's batch has no pi_new"
    extra = {name: tensor(values).requires_grad_() for name, values in fields.get("policy_extra", {}).items()}
    entropy = tensor(fields["entropy"]).requires_grad_() if "entropy" in fields else None
    return PolicyTokens(now.requires_grad_(), entropy, extra)


def bind_method(registry: Registry, reference: dict[str, Any] | str) -> BoundMethod:
    reference = {"name": reference} if isinstance(reference, str) else reference
    return registry.bind(reference["name"], {key: value for key, value in reference.items() if key != "name"})


def advantages(case: Case) -> Tensor:
    """Advantages of the case's "rewards" and "group"; the estimator's other inputs come from the batch."""
    estimator = bind_method(ADVANTAGES, case["advantage"])
    batch = batch_of(case)
    inputs = {name: getattr(batch, name) for name in estimator.spec.inputs}
    return estimator(tensor(case["rewards"]), torch.tensor(case["group"]), **inputs)


def apply_control(case: Case) -> TrainBatch:
    batch = batch_of(case)
    return bind_method(TOKEN_CONTROLS, case["control"])(batch) if "control" in case else batch


def masked_values(case: Case, pick: Callable[[TrainBatch], Tensor]) -> Tensor:
    batch = apply_control(case)
    return torch.where(batch.mask, pick(batch), 0.0)


def loss(case: Case, policy: PolicyTokens) -> Tensor:
    batch = apply_control(case)
    totals = StepTotals(*batch.totals_of_mask, max_tokens=case["fields"]["max_tokens"])
    aggregate = bind_method(AGGREGATES, case["aggregate"])
    return Objective(bind_method(POLICY_LOSSES, case["policy"]), (), aggregate)(policy, batch, totals).loss


def policy_loss(case: Case, policy: PolicyTokens) -> TokenLoss:
    return bind_method(POLICY_LOSSES, case["policy"])(policy, apply_control(case))


def term(case: Case, policy: PolicyTokens) -> TokenLoss:
    # inputs from the coefficient's controller
    inputs = {name: tensor(value) for name, value in case.get("inputs", {}).items()}
    return bind_method(LOSS_TERMS, case["term"])(policy, apply_control(case), **inputs)


def term_loss(case: Case) -> Tensor:
    batch = apply_control(case)
    totals = StepTotals(*batch.totals_of_mask, max_tokens=case["fields"]["max_tokens"])
    return bind_method(AGGREGATES, case["aggregate"])(term(case, policy_of(case)).values, batch.mask, totals)


def policy_values(case: Case, policy: PolicyTokens) -> Tensor:
    return policy_loss(case, policy).values


def term_values(case: Case, policy: PolicyTokens) -> Tensor:
    return term(case, policy).values


def gradient_of_sum(quantity: Callable[[Case, PolicyTokens], Tensor], case: Case) -> Tensor:
    """Gradient of the quantity's sum with respect to logp, or to "with_respect_to": "entropy" or a name in
    policy_extra.
    """
    policy = policy_of(case)
    name = case.get("with_respect_to", "logp")
    leaf = {"logp": policy.logp, "entropy": policy.entropy, **policy.extra}[name]
    assert leaf is not None
    return torch.autograd.grad(quantity(case, policy).sum(), leaf)[0]


QUANTITIES: dict[str, Callable[[Case], Tensor]] = {
    "advantages": advantages,
    "weights": lambda case: masked_values(case, lambda batch: batch.weights),
    "controlled advantages": lambda case: masked_values(case, lambda batch: batch.advantages),
    "controlled mask": lambda case: apply_control(case).mask.double(),
    "extra": lambda case: masked_values(case, lambda batch: batch.extra[case["extra"]]),
    "note": lambda case: tensor(apply_control(case).notes[case["note"]]),
    "ratio": lambda case: log_ratio(policy_of(case), batch_of(case)).exp() * batch_of(case).mask,
    "values": lambda case: policy_loss(case, policy_of(case)).values,
    "gradient of sum": lambda case: gradient_of_sum(policy_values, case),
    "term": lambda case: term(case, policy_of(case)).values,
    "term gradient of sum": lambda case: gradient_of_sum(term_values, case),
    "term loss": term_loss,
    "loss": lambda case: loss(case, policy_of(case)),
    "gradient": lambda case: gradient_of_sum(loss, case),
}


def merge_fields(facts: Mapping[str, Any], case: Case) -> dict[str, Any]:
    fields = facts.get("common_batch", {}) | case.get("batch", {})
    return ({"max_tokens": COMMON["max_tokens"]} if "mask" in fields else COMMON) | fields


# Files whose cases have other quantities (preference losses, graders, ...) have their own tests.
CASES: dict[str, Case] = {
    f"{file}/{case['id']}": {**case, "fields": merge_fields(facts, case)}
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
