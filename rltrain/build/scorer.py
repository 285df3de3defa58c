"""What ``rltrain score`` and the selection among N answers are made of: a process reward model, its
reference, and rows to judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rltrain.config.schema import JudgedData, LearnerCore, Model, Optimizer
from rltrain.data.judged import Reader, checked_prompt, is_empty
from rltrain.data.prompts import rename_columns
from rltrain.data.rows import Row, read_rows
from rltrain.data.steps import ends_of_given, ends_of_lines, ends_of_pattern, step_of_tokens
from rltrain.data.tokenization import Tokenization, tokenization_of
from rltrain.errors import UserError
from rltrain.learner.frozen_logprobs import FrozenLogProbs, weights_digest
from rltrain.learner.frozen_models import frozen_model, require_same_tokens, weights_of
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.train.scoring import Scorer, TextRow

NONE = "none"  # as a reference: log-probs alone
LINES, GIVEN = "newline", "given"  # as steps; anything else is a regular expression
_BETWEEN = "\n\n"  # what joins given steps where there is no completion


@dataclass(frozen=True)
class ProcessModel:
    """A process reward model as the command line names it."""

    path: str
    reference: str  # a model, or NONE
    beta: float  # coefficient of every reward
    aggregate: Mapping[str, Any] = field(
        default_factory=dict
    )  # series and reduction, where they are not the library's
    cache: Path | None = None  # of the reference's log-probs; None: kept nowhere
    tokens_per_micro_batch: int = 16384
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@contextmanager
def open_scorer(model: ProcessModel, say: Callable[[str], None]) -> Iterator[Scorer]:
    """Both models loaded."""
    settings = LearnerCore(
        optimizer=Optimizer(lr=0.0),
        tokens_per_micro_batch=model.tokens_per_micro_batch,
        precision=model.precision,
    )
    start = Model(path=model.path)
    learner = PreferenceLearner(start, settings, total_updates=1, seed=0)
    if model.reference == NONE:
        yield Scorer(learner, None, model.beta, model.aggregate)
        return
    with frozen_model(model.reference, start, learner.device) as policy:
        digest = weights_digest(weights_of(policy))
        reference = FrozenLogProbs(learner, policy, digest, model.cache, verify=4, say=say)
        yield Scorer(learner, reference, model.beta, model.aggregate)


def scorer_tokenization(model: ProcessModel) -> Tokenization:
    """Raises UserError where the reference reads other tokens."""
    tokenization = tokenization_of(Model(path=model.path), {})
    if model.reference != NONE:
        require_same_tokens(tokenization.tokenizer, model.path, "--reference", model.reference)
    return tokenization


# rows of a file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoringRows:
    """One row of a file. text None: it cannot be scored, for the ``reason``."""

    row: Row
    text: TextRow | None
    step_texts: tuple[str, ...] = ()
    reason: str = ""

    def line(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """What is written about it: its own columns, then ours."""
        if self.text is None:
            return {**self.row.columns, "score": None, "unscored": self.reason}
        return {**self.row.columns, "step_texts": list(self.step_texts), **columns}


def read_file(
    file: Path,
    columns: Mapping[str, str],
    steps: str,
    tokenization: Tokenization,
    data: JudgedData,
    most: int | None,
) -> list[ScoringRows]:
    """The rows of ``file``. most: tokens that the model reads; None: any number.

    Raises ValueError naming file and line.
    """
    cut = cutter(steps)
    reader = Reader(tokenization.tokenizer, tokenization.stop_tokens.stop, data)
    rows = [rename_columns(row, dict(columns)) for row in read_rows(str(file), split="train")]
    found = [_read(row, cut, reader, tokenization, most) for row in rows]
    reader.lossy(str(file))
    return found


def cutter(steps: str) -> Callable[[str, Row | None], list[int]]:
    """Where the steps of a text end. Raises UserError where ``steps`` is no regular expression."""
    if steps == LINES:
        return lambda text, row: ends_of_lines(text)
    if steps == GIVEN:
        return lambda text, row: ends_of_given(text, _given(row))
    try:
        pattern = re.compile(steps)
    except re.error as error:
        raise UserError(
            f"--steps {steps!r} is neither {LINES} nor {GIVEN} nor a regular expression: {error}"
        ) from error
    return lambda text, row: ends_of_pattern(text, pattern)


def text_row(
    prompt: tuple[int, ...],
    completion: tuple[int, ...],
    cut: Callable[[str, Row | None], list[int]],
    row: Row | None,
    tokenization: Tokenization,
) -> tuple[TextRow, tuple[str, ...]]:
    """The row, and the text of each step."""
    text = tokenization.decode(completion)
    ends = cut(text, row)
    parts = tuple(text[begin:end] for begin, end in zip([0, *ends], ends, strict=False))
    return TextRow(
        prompt, completion, tuple(step_of_tokens(completion, ends, tokenization.decode)), len(ends)
    ), parts


def _read(
    row: Row,
    cut: Callable[[str, Row | None], list[int]],
    reader: Reader,
    tokenization: Tokenization,
    most: int | None,
) -> ScoringRows:
    if row.columns.get("prompt") is None:
        raise ValueError(
            f"{row.where}: no prompt; there are {sorted(row.columns)}; name its column: --column prompt=NAME"
        )
    completion = row.columns.get("completion")
    if completion is None:
        if row.columns.get("steps") is None:
            there = sorted(row.columns)
            raise ValueError(
                f"{row.where}: neither completion nor steps; there are {there}; name its column: --column "
                "completion=NAME"
            )
        completion = _BETWEEN.join(_given(row))
    if is_empty(completion):
        return ScoringRows(row, None, reason="the completion is empty")
    prompt = checked_prompt(row, reader.data)
    try:
        spelt, before = reader.prompt(prompt)
        after = reader.completion(prompt, spelt, completion)
        if not after:
            return ScoringRows(row, None, reason="the completion is empty")
        if most is not None and len(before) + len(after) > most:
            return ScoringRows(row, None, reason=f"too long, the model reads at most {most} tokens")
        return ScoringRows(row, *text_row(before, after, cut, row, tokenization))
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def _given(row: Row | None) -> Sequence[str]:
    steps = None if row is None else row.columns.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        there = [] if row is None else sorted(row.columns)
        raise ValueError(
            f"the column steps must be a list of texts; there are {there}; name it: --column steps=NAME"
        )
    return steps
