"""The reference's log-probs that the data bring, in TRL's columns: used where they are the
reference's, refused where they are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.data.tasks import arithmetic_pairs
from rltrain.errors import UserError
from rltrain.report.names import reproducible_metrics

ROOT = Path(__file__).parents[2]
ROWS = [
    {name: row[name] for name in ("prompt", "chosen", "rejected")}
    for row in arithmetic_pairs("train", {"count": 12})
]
FEW = (
    "train.examples=6",
    "train.steps=2",
    "data.eval=null",
    "learner.optimizer.lr=2e-3",
    "data.options={}",
    "data.max_prompt_tokens=32",
)


@pytest.fixture(scope="module")
def log_prob(random_model: str) -> Callable[[str, str], float]:
    """Of an answer to a question, by transformers alone: the tiny template is
    <user>question<assistant>answer<eos>.
    """
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(random_model),
    )

    def of(prompt: str, answer: str) -> float:
        before, after = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"<user>{prompt}<assistant>", f"{answer}<eos>")
        )
        with torch.no_grad():
            logp = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return sum(float(logp[len(before) + index - 1, token]) for index, token in enumerate(after))

    return of


def run(
    folder: Path, loss: str, rows: list[dict[str, Any]], model: str, *overrides: str
) -> list[dict[str, Any]]:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"model.path={model}",
        f"data.train={folder / 'rows.jsonl'}",
        f"reference.cache={folder / 'cache'}",
        *FEW,
        *overrides,
    )
    recipe = check(
        load_recipe(ROOT / f"recipes/preference/{loss}.yaml", profile="tiny_cpu", overrides=settings)
    ).recipe
    assert train_command(recipe, folder / "run", [], "never") == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [reproducible_metrics(line) for line in lines]


def with_columns(log_prob: Callable[[str, str], float], extra: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "ref_chosen_logps": log_prob(row["prompt"], row["chosen"]) + extra,
            "ref_rejected_logps": log_prob(row["prompt"], row["rejected"]) + extra,
        }
        for row in ROWS
    ]


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the accuracy: at the first step the policy is its reference, and the sign of rounding
    errors decides.
    """
    return [
        {name: value for name, value in line.items() if isinstance(value, float) and name != "loss/accuracy"}
        for line in lines
    ]


def test_pairs_train_as_if_their_log_probs_had_been_computed(
    random_model: str, log_prob: Any, tmp_path: Path, capsys: Any
):
    computed = run(tmp_path / "computed", "dpo", ROWS, random_model)
    assert "from the data" not in " ".join(capsys.readouterr().out.split())
    read = run(tmp_path / "given", "dpo", with_columns(log_prob), random_model)
    assert "from the data, 16 computed again and equal" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "given" / "cache").exists()
    for left, right in zip(numbers(computed), numbers(read), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)


def test_log_probs_of_another_reference_are_refused_and_can_be_ignored(
    random_model: str, log_prob: Any, tmp_path: Path
):
    # 1 nat on each completion, of three tokens at most: 0.33 per token
    with pytest.raises(
        UserError, match=r"differ by 0\.\d+ nats per token.*model.reference.*reference.given=ignore"
    ):
        run(tmp_path / "wrong", "dpo", with_columns(log_prob, extra=1.0), random_model)
    ignored = run(
        tmp_path / "ignored", "dpo", with_columns(log_prob, extra=1.0), random_model, "reference.given=ignore"
    )
    computed = run(tmp_path / "computed", "dpo", ROWS, random_model)
    assert numbers(ignored) == numbers(computed)


def test_single_completions_bring_theirs(random_model: str, log_prob: Any, tmp_path: Path, capsys: Any):
    rows = [
        {
            "prompt": row["prompt"],
            "completion": row[side],
            "label": side == "chosen",
            "reference_logps": log_prob(row["prompt"], row[side]),
        }
        for row in ROWS
        for side in ("chosen", "rejected")
    ]
    read = run(tmp_path / "given", "kto", rows, random_model)
    assert "from the data, 16 computed again and equal" in " ".join(capsys.readouterr().out.split())
    plain = [{name: value for name, value in row.items() if name != "reference_logps"} for row in rows]
    for left, right in zip(
        numbers(read), numbers(run(tmp_path / "computed", "kto", plain, random_model)), strict=True
    ):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ref_chosen_logps": -3.0}, r"ref_chosen_logps and ref_rejected_logps, got \[-3.0, None\]"),
        ({"ref_chosen_logps": -3.0, "ref_rejected_logps": float("nan")}, r"need a finite number"),
        (
            {"reference_chosen_logps": -3.0, "reference_rejected_logps": -4.0},
            r"11 of 12 examples have no reference log-probs",
        ),
    ],
)
def test_half_given_log_probs_are_named(
    change: dict[str, float], said: str, random_model: str, tmp_path: Path
):
    with pytest.raises(UserError, match=said):
        run(tmp_path / "half", "dpo", [{**ROWS[0], **change}, *ROWS[1:]], random_model)
