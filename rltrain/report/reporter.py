"""Sends the numbers of each step to files, trackers and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rltrain.report.memory import memory_metrics
from rltrain.report.progress import Progress
from rltrain.report.sinks import Sinks
from rltrain.report.tables import completion_rows
from rltrain.report.token_numbers import TokenTensors
from rltrain.report.transcripts import Transcripts
from rltrain.types.samples import ScoredGroup


class Reporter:
    """Owns the run's sinks, transcripts and step lines.

    On ranks other than 0, ``Reporter(None, None, None)`` reports nothing. tables_every: steps between tables
    of completions for the trackers; evaluations always have one. samples_every: steps between completions on
    the terminal.
    """

    def __init__(
        self,
        sinks: Sinks | None,
        transcripts: Transcripts | None,
        progress: Progress | None,
        tables_every: int = 1,
        samples_every: int = 1,
    ) -> None:
        self.sinks = sinks
        self.transcripts = transcripts
        self.progress = progress
        self._sent: set[str] = {""}
        self._tables_every = tables_every
        self._samples_every = samples_every

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[ScoredGroup],
        note: str | None,
        tensors: TokenTensors | None = None,
    ) -> None:
        """note: why the gradient was zero; None: it was not. tensors: for the numbers of kept tokens.

        The sinks get this process's memory too.
        """
        if self.sinks is not None:
            self.sinks.log(step, {**metrics, **memory_metrics()})
        if self.transcripts is not None:
            records = self.transcripts.log(step, groups, tensors=tensors)
            if step == 1 or step % self._tables_every == 0:
                self._log_table(step, "rollout", records)
        if self.progress is not None:
            self.progress.step(metrics, note)
            if groups and (step == 1 or step % self._samples_every == 0):
                completion = groups[0].completions[0]
                score = groups[0].scores[0]
                value = score.value if score.ungraded is None else None
                self.progress.sample(groups[0].prompt.text, completion.text, value)

    def evaluation(self, step: int, metrics: Mapping[str, float], groups: Sequence[ScoredGroup] = ()) -> None:
        """groups: the held-out prompts with their completions, the same ones at every evaluation."""
        if self.sinks is not None:
            self.sinks.log(step, metrics)
        if self.transcripts is not None:
            self._log_table(step, "eval", self.transcripts.log(step, groups, "eval"))
        if self.progress is not None:
            self.progress.evaluation(metrics)

    def _log_table(self, step: int, stage: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self.sinks is not None and records:
            self.sinks.log_completions(step, stage, completion_rows(records))

    def banner(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """What runs, before anything else of it. facts: (label, value)."""
        if self.progress is not None:
            self.progress.banner(title, facts)

    def message(self, text: str) -> None:
        if self.progress is not None:
            self.progress.message(text)

    def message_once(self, text: str) -> None:
        """Sends a message the first time; ignores repetitions."""
        if text not in self._sent:
            self._sent.add(text)
            self.message(text)

    def warn(self, text: str) -> None:
        if self.progress is not None:
            self.progress.warn(text)

    def close(self) -> None:
        for part in (self.sinks, self.transcripts):
            if part is not None:
                part.close()
        if self.progress is not None:
            self.progress.close()
