"""One step's numbers to every place they go: files, trackers, the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rltrain.report.progress import Progress
from rltrain.report.sinks import Sinks
from rltrain.report.transcripts import Transcripts
from rltrain.types.samples import ScoredGroup


class Reporter:
    """Owns the run's sinks, transcripts and step lines.

    On ranks other than 0, ``Reporter(None, None, None)`` stays quiet.
    """

    def __init__(
        self, sinks: Sinks | None, transcripts: Transcripts | None, progress: Progress | None
    ) -> None:
        self.sinks, self.transcripts, self.progress = sinks, transcripts, progress
        self._said: set[str] = {""}

    def step(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[ScoredGroup], note: str | None
    ) -> None:
        """note: why the gradient was zero, when it was."""
        if self.sinks is not None:
            self.sinks.log(step, metrics)
        if self.transcripts is not None:
            self.transcripts.log(step, groups)
        if self.progress is not None:
            self.progress.step(metrics, note)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.sinks is not None:
            self.sinks.log(step, metrics)
        if self.progress is not None:
            self.progress.evaluation(metrics)

    def message(self, text: str) -> None:
        if self.progress is not None:
            self.progress.message(text)

    def once(self, text: str) -> None:
        """A message the first time, then nothing."""
        if text not in self._said:
            self._said.add(text)
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
