"""Process rewards of finished completions: the specification's worked numbers, plain transformers,
and the command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rltrain.build.scorer import ProcessModel, open_scorer
from rltrain.cli.app import app
from rltrain.errors import UserError
from rltrain.train.scoring import Scorer, TextRow
from rltrain.types.policy import TokenRows
from support.worked_steps import BETA, RHO, SCORES


class Log:
    """A learner whose log-probs are its rows' token ids, in tenths."""

    def token_log_probs(self, rows: TokenRows, policy: Any = None) -> torch.Tensor:
        return torch.tensor([[token / 10 for token in completion] for completion in rows.completions])


@pytest.mark.parametrize(("series", "reduction", "expected"), SCORES)
def test_the_worked_example(series: str, reduction: str, expected: float) -> None:
    scorer = Scorer(Log(), None, BETA, {"series": series, "reduction": reduction})  # type: ignore[arg-type]
    [row] = scorer.score([TextRow((1,), tuple(round(10 * rho) for rho in RHO), (0, 0, 1, 1, 2, 2), 3)])
    assert row.score == pytest.approx(expected, abs=1e-7)
    assert row.tokens == pytest.approx([0.02, -0.01, 0.005, 0.015, -0.025, 0.01], abs=1e-7)
    assert row.steps == pytest.approx([0.01, 0.02, -0.015], abs=1e-7)
    assert row.values == pytest.approx([0.01, 0.03, 0.015], abs=1e-7)


def test_a_step_without_a_token_earns_nothing_and_is_not_the_smallest() -> None:
    scorer = Scorer(Log(), None, 1.0)  # type: ignore[arg-type]
    [row] = scorer.score([TextRow((1,), (10, 20), (0, 2), 4)])
    assert (row.steps, row.values, row.score) == ([1.0, 0.0, 2.0, 0.0], [1.0, 1.0, 3.0, 3.0], 1.0)


def test_rows_and_micro_batches_change_nothing_and_the_cache_is_believed_once_checked(
    random_model: str, random_tied_model: str, tmp_path: Path
) -> None:
    texts = [TextRow((5, 6, 7), tuple(range(8, 8 + n)), (0,) * n, 1) for n in (1, 4, 2, 6, 3)]
    said: list[str] = []
    rewards = []
    for tokens in (10, 64):
        model = ProcessModel(
            random_model, random_tied_model, 0.5, cache=tmp_path, tokens_per_micro_batch=tokens
        )
        with open_scorer(model, said.append) as scorer:
            rewards.append([row.tokens for row in scorer.score(texts)])
            rewards.append([row.tokens for row in Scorer(scorer.learner, None, 0.5, rows=2).score(texts)])
    assert rewards[0][3] == pytest.approx(rewards[2][3], abs=1e-5)
    assert rewards[1][3] == pytest.approx(rewards[3][3], abs=1e-5)
    # with a reference the reward is beta times the difference to it
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (random_model, random_tied_model)
    ]
    rows = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    model_logp, ref_logp = (
        model(rows).logits.log_softmax(-1)[0, 2:-1].gather(1, rows[0, 3:, None])[:, 0] for model in models
    )
    assert rewards[0][1] == pytest.approx((0.5 * (model_logp - ref_logp)).tolist(), abs=1e-5)
    assert rewards[1][1] == pytest.approx((0.5 * model_logp).tolist(), abs=1e-5)
    assert [line.split(":")[1].split()[0] for line in said] == ["computing", "from"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["score", *arguments], catch_exceptions=False)


def test_the_command_scores_a_file_step_by_step(
    random_model: str, random_tied_model: str, tmp_path: Path
) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    rows = [
        {"question": "1+2=", "completion": "12\n34\n\n5", "gold": 3},
        {"question": "3+4=", "completion": "  "},
        {"question": "3+4=", "completion": "7" * 4000},
        {"question": "1+2=", "completion": "12"},
        {"question": "3+4=", "completion": "7" * 5000},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        "--reference",
        random_tied_model,
        "--beta",
        "0.05",
        "--cache",
        str(tmp_path / "cache"),
        "--column",
        "prompt=question",
    )
    done = run(random_model, str(file), "--out", str(out), *options)
    assert done.exit_code == 0
    first, blank, long, short, longer = map(json.loads, out.read_text().splitlines())
    assert (first["gold"], first["step_texts"]) == (3, ["12\n", "34\n\n", "5"])
    assert len(first["step_rewards"]) == 3
    assert (
        sum(first["token_rewards"])
        == pytest.approx(first["step_values"][-1])
        == pytest.approx(sum(first["step_rewards"]))
    )
    assert first["score"] == min(first["step_rewards"])
    assert (blank["score"], blank["unscored"]) == (None, "the completion is empty")
    assert long["score"] is None and "the model reads at most" in long["unscored"]
    assert longer["unscored"] == long["unscored"]  # one reason, so one line for all that are too long
    assert done.output.count("warning:") == 2 and "warning: 2 not scored: too long" in done.output
    assert short["score"] == pytest.approx(sum(short["token_rewards"]))

    # the end token counts, as in training: prompt, two digits, EOS
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer(shown, add_special_tokens=False)["input_ids"]
    assert len(short["token_rewards"]) == len(tokenizer("12", add_special_tokens=False)["input_ids"]) + 1
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (random_model, random_tied_model)
    ]
    ids = [*before, *tokenizer("12", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    model_logp, ref_logp = (
        model(torch.tensor([ids])).logits.log_softmax(-1)[0, len(before) - 1 : -1] for model in models
    )
    target = torch.tensor(ids[len(before) :])[:, None]
    assert short["token_rewards"] == pytest.approx(
        (0.05 * (model_logp - ref_logp).gather(1, target)[:, 0]).tolist(), abs=1e-6
    )


def test_given_steps_need_no_completion(random_model: str, tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    file.write_text(json.dumps({"prompt": "1+2=", "steps": ["12", "3+4", "5"], "label": 1}) + "\n")
    command = (
        random_model,
        str(file),
        "--out",
        str(out),
        "--reference",
        "none",
        "--beta",
        "1",
        "--steps",
        "given",
        "--no-tokens",
    )
    assert run(*command, "--series", "cumulative", "--reduction", "last").exit_code == 0
    scored = json.loads(out.read_text())
    assert (scored["label"], scored["step_texts"]) == (1, ["12\n\n", "3+4\n\n", "5"])
    assert scored["score"] == scored["step_values"][-1] and "token_rewards" not in scored


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"completion": "1"}, (), "rows.jsonl, line 1: no prompt"),
        ({"prompt": "1"}, (), "rows.jsonl, line 1: neither completion nor steps"),
        (
            {"prompt": "1", "completion": "2", "steps": ["3"]},
            ("--steps", "given"),
            "rows.jsonl, line 1: step 0 '3' is not in the completion",
        ),
        (
            {"prompt": "1", "completion": "2"},
            ("--steps", "("),
            "neither newline nor given nor a regular expression",
        ),
        ({"prompt": "1", "completion": "2"}, ("--column", "answer=a"), "expected prompt=NAME"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    row: dict[str, Any], options: tuple[str, ...], said: str, random_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        run(
            random_model,
            str(file),
            "--out",
            str(tmp_path / "out"),
            "--reference",
            "none",
            "--beta",
            "1",
            *options,
        )
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()
