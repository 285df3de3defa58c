"""The parts of ``rltrain score`` and of the selection among N answers: a process reward model, its
reference, and the rows to score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rltrain.config.schema import JudgedData, LearnerCore, Model, Optimizer
from rltrain.data.judged import Reader, completion_of, format_prompt, is_empty
from rltrain.data.prompts import rename_columns
from rltrain.data.rows import Row, read_rows
from rltrain.data.steps import ends_of_lines, ends_of_listed_steps, ends_of_pattern, step_of_tokens
from rltrain.data.tokenization import Tokenization, tokenization_of
from rltrain.errors import UserError
from rltrain.learner.frozen_logprobs import FrozenLogProbs, weights_digest
from rltrain.learner.frozen_models import frozen_model, require_same_tokens, weights_of
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.train.scoring import Scorer, TextRow

NONE = "none"  # as a reference: log-probs without a reference
# as steps; any other value is a regular expression
LINES = "newline"
GIVEN = "given"
_BETWEEN = "\n\n"  # joins the steps of the column where there is no completion


@dataclass(frozen=True)
class ProcessModel:
    """A process reward model with its options from the command line."""

    path: str
    reference: str  # a model, or NONE
    beta: float  # coefficient of every reward
    # series and reduction, where they are not the library's defaults
    aggregate: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None  # folder of the reference's log-probs; None: they are not kept
    tokens_per_micro_batch: int = 16384
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@contextmanager
def open_scorer(model: ProcessModel, say: Callable[[str], None]) -> Iterator[Scorer]:
    """The scorer with the model and its reference loaded."""
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
    with frozen_model(model.reference, start, learner.trained) as policy:
        digest = weights_digest(weights_of(policy))
        reference = FrozenLogProbs(learner, policy, digest, model.cache, verify=4, say=say)
        yield Scorer(learner, reference, model.beta, model.aggregate)


def scorer_tokenization(model: ProcessModel) -> Tokenization:
    """The model's tokenizer. Raises UserError if the reference reads other tokens."""
    tokenization = tokenization_of(Model(path=model.path), {})
    if model.reference != NONE:
        require_same_tokens(tokenization.tokenizer, model.path, "--reference", model.reference)
    return tokenization


# rows of a file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoringRow:
    """One row of a file. text None: the row cannot be scored; ``reason`` says why."""

    row: Row
    text: TextRow | None
    step_texts: tuple[str, ...] = ()
    reason: str = ""

    def line(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The output line: the row's columns, then the scores in ``columns``."""
        if self.text is None:
            return {**self.row.columns, "score": None, "unscored": self.reason}
        return {**self.row.columns, "step_texts": list(self.step_texts), **columns}


def read_file(
    file: Path,
    columns: Mapping[str, str],
    steps: str,
    tokenization: Tokenization,
    data: JudgedData,
    max_tokens: int | None,
) -> list[ScoringRow]:
    """The rows of ``file``. max_tokens: the longest row that the model reads; None: no limit.

    Raises ValueError that names file and line.
    """
    find_ends = step_end_finder(steps)
    reader = Reader(tokenization.tokenizer, tokenization.stop_tokens.stop, data)
    rows = [rename_columns(row, dict(columns)) for row in read_rows(str(file), split="train")]
    scoring_rows = [_read_scoring_row(row, find_ends, reader, tokenization, max_tokens) for row in rows]
    reader.count_lossy(str(file))
    return scoring_rows


def step_end_finder(steps: str) -> Callable[[str, Row | None], list[int]]:
    """A function that finds where the steps of a text end. Raises UserError if ``steps`` is no regular
    expression.
    """
    if steps == LINES:
        return lambda text, row: ends_of_lines(text)
    if steps == GIVEN:
        return lambda text, row: ends_of_listed_steps(text, _steps_column(row))
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
    find_ends: Callable[[str, Row | None], list[int]],
    row: Row | None,
    tokenization: Tokenization,
) -> tuple[TextRow, tuple[str, ...]]:
    """The row, and the text of each step."""
    text = tokenization.decode(completion)
    ends = find_ends(text, row)
    step_texts = tuple(text[begin:end] for begin, end in zip([0, *ends], ends, strict=False))
    step_ids = tuple(step_of_tokens(completion, ends, tokenization.decode))
    return TextRow(prompt, completion, step_ids, len(ends)), step_texts


def _read_scoring_row(
    row: Row,
    find_ends: Callable[[str, Row | None], list[int]],
    reader: Reader,
    tokenization: Tokenization,
    max_tokens: int | None,
) -> ScoringRow:
    if row.columns.get("prompt") is None:
        raise ValueError(
            f"{row.where}: no prompt; there are {sorted(row.columns)}; name its column: --column prompt=NAME"
        )
    completion = row.columns.get("completion")
    if completion is None:
        if row.columns.get("steps") is None:
            columns = sorted(row.columns)
            raise ValueError(
                f"{row.where}: neither completion nor steps; there are {columns}; name its column: --column "
                "completion=NAME"
            )
        completion = _BETWEEN.join(_steps_column(row))
    else:
        completion = completion_of(row, "completion")
    if is_empty(completion):
        return ScoringRow(row, None, reason="the completion is empty")
    prompt = format_prompt(row, reader.data)
    try:
        inputs = reader.inputs_of(row)
        rendered_prompt, prompt_ids = reader.encode_prompt(prompt, inputs)
        completion_ids = reader.encode_completion(prompt, rendered_prompt, completion, inputs)
        if not completion_ids:
            return ScoringRow(row, None, reason="the completion is empty")
        if max_tokens is not None and len(prompt_ids) + len(completion_ids) > max_tokens:
            return ScoringRow(row, None, reason=f"too long, the model reads at most {max_tokens} tokens")
        return ScoringRow(row, *text_row(prompt_ids, completion_ids, find_ends, row, tokenization))
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def _steps_column(row: Row | None) -> Sequence[str]:
    steps = None if row is None else row.columns.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        columns = [] if row is None else sorted(row.columns)
        raise ValueError(
            f"the column steps must be a list of texts; there are {columns}; name it: --column steps=NAME"
        )
    return steps
