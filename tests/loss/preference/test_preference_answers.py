"""Every case of known_answers/preference.json: the authors' formulas in numpy on small batches, in float64,
to 1e-6.

"given" names a batch of the file. "logp" is the current policy's, of which ``logp_now`` is a copy; "reward"
is a scalar head's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.preference.statistics import with_batch_statistics
from rltrain.registry import BoundMethod
from rltrain.types.preference import (
    CompletionFacts,
    ExampleTotals,
    LabelBatch,
    PairBatch,
    PolicyPairs,
    PolicySequences,
    RewardPairs,
)

FILE = json.loads(
    (Path(__file__).parents[2] / "known_answers" / "preference.json").read_text(encoding="utf-8")
)
CASES: dict[str, Mapping[str, Any]] = {case["id"]: case for case in FILE["cases"] if "preference" in case}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def facts(side: Mapping[str, Any]) -> CompletionFacts:
    if "reward" in side:
        return CompletionFacts(torch.ones(len(side["reward"]), dtype=torch.int64))
    frozen = {name: tensor(logp) for name, logp in side.items() if name not in ("length", "logp")}
    return CompletionFacts(torch.tensor(side["length"]), logp_now=tensor(side["logp"]), **frozen)


def batch_of(case: Mapping[str, Any], loss: BoundMethod) -> PairBatch | LabelBatch:
    fields = FILE["given"][case["given"]]
    sides = {
        name: facts(fields[name])
        for name in ("chosen", "rejected", "completion", "mismatched")
        if name in fields
    }
    rest = {name: tensor(fields[name]) for name in ("margin", "p_chosen", "label") if name in fields}
    rows = len(next(iter(sides.values())).length)
    kind = PairBatch if "chosen" in sides else LabelBatch
    columns = {name: tensor(values) for name, values in fields.get("columns", {}).items()}
    return with_batch_statistics(
        kind(**sides, **rest, prompt=torch.zeros(rows, dtype=torch.int64), columns=columns), loss
    )


def leaves(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensor with a gradient for each side: log-probs or head rewards."""
    fields = FILE["given"][case["given"]]
    sides = {name: fields[name] for name in ("chosen", "rejected", "completion") if name in fields}
    return {
        name: tensor(side.get("logp", side.get("reward"))).requires_grad_() for name, side in sides.items()
    }


def policy_of(leaf: dict[str, Tensor], loss: BoundMethod) -> Any:
    if "scalar_head" in loss.spec.traits:
        return RewardPairs(**leaf) if "chosen" in leaf else leaf["completion"]
    sequences = {name: PolicySequences(values) for name, values in leaf.items()}
    return PolicyPairs(**sequences) if "chosen" in leaf else sequences["completion"]


def bound(case: Mapping[str, Any]) -> BoundMethod:
    return PREFERENCE_LOSSES.bind(
        case["preference"]["name"], {key: value for key, value in case["preference"].items() if key != "name"}
    )


def values(case: Mapping[str, Any], leaf: dict[str, Tensor]) -> Tensor:
    return bound(case)(policy_of(leaf, bound(case)), batch_of(case, bound(case))).values


def mean(case: Mapping[str, Any], leaf: dict[str, Tensor]) -> Tensor:
    """The loss of an update, from two micro-batches of halves where the batch has two rows and more."""
    loss = bound(case)
    batch = batch_of(case, bound(case))
    totals = ExampleTotals(len(batch))
    shares = []
    for index in torch.arange(len(batch)).tensor_split(2):
        part = policy_of({name: side[index] for name, side in leaf.items()}, loss)
        shares.append(PreferenceObjective(loss)(part, batch.rows(index), totals).loss)
    return torch.stack(shares).sum()


def gradient(case: Mapping[str, Any]) -> Tensor:
    leaf = leaves(case)
    return torch.autograd.grad(mean(case, leaf), leaf[case.get("of", "completion")])[0]


QUANTITIES: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "example values": lambda case: values(case, leaves(case)),
    "example mean": lambda case: mean(case, leaves(case)),
    "example gradient": gradient,
    "example metric": lambda case: (
        bound(case)(policy_of(leaves(case), bound(case)), batch_of(case, bound(case)))
        .metrics[case["metric"]]
        .double()
    ),
    "statistic": lambda case: batch_of(case, bound(case)).statistics[case["statistic"]],
}


@pytest.mark.parametrize("name", CASES)
def test_the_known_answer_comes_out_in_float64(name: str):
    case = CASES[name]
    got = QUANTITIES[case["quantity"]](case).detach()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, tensor(case["expected"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["quantity"] == "example values"])
def test_the_known_answer_comes_out_in_float32(name: str):
    case = CASES[name]
    loss = bound(case)
    batch = batch_of(case, bound(case))
    narrow = {
        name: getattr(batch, name).float()
        for name in ("margin", "p_chosen", "label")
        if getattr(batch, name, None) is not None
    }
    sides = {}
    for name in ("chosen", "rejected", "completion"):
        if (side := getattr(batch, name, None)) is not None:
            single = {
                f.name: v.float()
                for f in dataclasses.fields(side)
                if (v := getattr(side, f.name)) is not None and f.name != "length"
            }
            sides[name] = dataclasses.replace(side, **single)
    batch = dataclasses.replace(
        batch, **narrow, **sides, columns={key: value.float() for key, value in batch.columns.items()}
    )
    leaf = {name: value.detach().float().requires_grad_() for name, value in leaves(case).items()}
    got = loss(policy_of(leaf, loss), batch).values
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), tensor(case["expected"]), rtol=1e-5, atol=1e-5)
