"""The step line that a person watches: columns on a terminal, ``name value`` pairs elsewhere.

It does not show the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

_HEADER_EVERY = 20  # step lines
_GAP = "  "


def _number(value: float) -> str:
    """Three or four significant digits in at most six characters; no small number looks like zero."""
    size = abs(value)
    if value != 0 and (size < 0.001 or size >= 999.5):
        return _power(value)
    return f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:.1f}"


def _power(value: float) -> str:
    """Two digits and a bare exponent: 2.1e-6, 1.2e4."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}" if value else "0"


def _share(value: float) -> str:
    return f"{100 * value:.0f}%"


def _count(value: float) -> str:
    for limit, scale, unit in ((9999.5, 1, ""), (999_500, 1e3, "k"), (math.inf, 1e6, "M")):
        if value < limit:
            digits = 0 if scale == 1 or value / scale >= 99.95 else 1
            return f"{value / scale:.{digits}f}{unit}"
    return str(value)


def _rate(value: float) -> str:
    """As ``_count``, with a digit behind the point below 10 and two below 1, so that no rate looks like 0."""
    return _count(value) if value >= 9.95 or value == 0 else f"{value:.{1 if value >= 0.995 else 2}f}"


def _seconds(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}s"
    if value < 599.5:
        return f"{value:.0f}s"
    if value < 5970:
        return f"{value / 60:.0f}min"
    return f"{value / 3600:.1f}h"


@dataclass(frozen=True, slots=True)
class Column:
    """One number of the step line. ``rank`` decides which columns fit; they are shown in table order."""

    header: str
    metric: str
    width: int
    rank: int  # 0 is kept longest
    show: Callable[[float], str]
    style: str = ""
    meaning: str = ""  # in the legend


_NUMBERS: tuple[Column, ...] = (
    Column("reward", "reward/mean", 6, 0, _number, "bold", meaning="mean of the step"),
    Column("useful", "reward/useful_groups", 6, 1, _share, meaning="groups whose rewards differ"),
    Column("right", "loss/accuracy", 5, 0, _share, "bold", meaning="examples ranked right"),
    Column("margin", "loss/margin", 6, 1, _number, meaning="reward of the better less the worse"),
    Column("logp+", "loss/logp_chosen", 7, 10, _number, meaning="log-prob of the chosen, nats"),
    Column("logp-", "loss/logp_rejected", 7, 11, _number, meaning="of the rejected"),
    Column("good", "loss/reward_desirable", 6, 0, _number, "bold", meaning="reward of the desirable"),
    Column("bad", "loss/reward_undesirable", 6, 1, _number, meaning="of the undesirable"),
    Column("entropy", "learner/entropy_mean", 7, 2, _number, meaning="of the policy, nats"),
    Column("|dlogp|", "rollout/mismatch_abs", 7, 3, _power, meaning="engine and learner apart, nats"),
    Column("grad", "learner/grad_norm", 6, 4, _number, meaning="norm before clipping"),
    Column("ceil", "law/ceiling", 6, 5, _number, meaning="reward at which the law of entropy ends"),
    Column("length", "rollout/length_mean", 6, 10, _count, meaning="tokens of a completion"),
    Column("cut", "rollout/finished_by_length", 4, 11, _share, meaning="completions at the limit"),
    Column("tok/s", "time/tokens_per_second", 5, 5, _rate, meaning="tokens sampled a second"),
    Column("ex/s", "time/examples_per_second", 5, 5, _rate, meaning="examples a second"),
)
_TIMES: tuple[Column, ...] = (
    Column("time", "time/step", 5, 6, _seconds, meaning="of the step"),
    Column("rollout", "time/rollout", 7, 7, _seconds, "dim", meaning="sampling"),
    Column("grade", "time/reward", 5, 13, _seconds, "dim", meaning="rewards"),
    Column("annot", "time/annotate", 5, 14, _seconds, "dim", meaning="passes without gradient"),
    Column("update", "time/update", 6, 8, _seconds, "dim", meaning="gradient and optimizer"),
    Column("sync", "time/sync", 5, 12, _seconds, "dim", meaning="weights to the engine"),
    Column("left", "left", 5, 9, _seconds, "cyan", meaning="time to the last step"),
)


def fit_columns(columns: Sequence[Column], width: int) -> tuple[Column, ...]:
    """The columns that fit into ``width`` characters with their gaps; the least important are dropped."""
    kept: set[Column] = set()
    for column in sorted(columns, key=lambda column: column.rank):
        if width < len(_GAP) + column.width:
            break
        width -= len(_GAP) + column.width
        kept.add(column)
    return tuple(column for column in columns if column in kept)


class Progress:
    """Prints one line per step.

    start: the step from which a resumed run continues. console None: standard output. legend: on a terminal,
    explain the columns once before they are first shown.
    """

    def __init__(
        self, total_steps: int, console: Console | None = None, start: int = 0, *, legend: bool = False
    ) -> None:
        self.console = console or Console()
        self._total = total_steps
        self._start = start
        self._step = start
        self._spent = 0.0  # seconds
        self._shown: tuple[Column, ...] = ()
        self._lines = 0  # since the header
        self._legend = legend
        self._explained: set[Column] = set()

    def step(self, metrics: Mapping[str, float], note: str | None = None) -> None:
        """Count one step and show it. note: why the step learned nothing; None: it learned."""
        self._step += 1
        metrics = {**metrics, **self._time_left(metrics)}
        note = None if note is None else f"nothing learned: {note}"
        self._print(self._columns(metrics, note) if self.console.is_terminal else self._plain(metrics, note))

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Show held-out results at the current step."""
        words = _eval_words(metrics)
        start = "" if self.console.is_terminal else "step "
        line = Text.assemble((f"{start}{self._position()}{_GAP}eval", "bold cyan"))
        for word in words:
            if self.console.is_terminal and line.cell_len + len(_GAP) + len(word) > self.console.width:
                break  # metrics.jsonl has the rest
            line.append(_GAP + word, "cyan")
        self._print(line)

    def sample(self, prompt: str, completion: str, score: float | None) -> None:
        """Show one completion of the step on a terminal, each text in its last and first characters."""
        if not self.console.is_terminal:
            return
        reward = "ungraded" if score is None else f"reward {_number(score)}"
        room = max(20, (self.console.width - len(reward) - 14) // 2)
        line = Text.assemble(("sample", "bold cyan"), _GAP, (_shorten(prompt, -room), "dim"), " -> ")
        self._print(line.append(_shorten(completion, room)).append(f"{_GAP}{reward}", "cyan"))

    def banner(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """Show what runs: a title, and a line for each (label, value)."""
        self._print(Text(title, style="bold cyan"))
        width = max((len(label) for label, _ in facts), default=0)
        for label, value in facts:
            self._print(Text.assemble("  ", (label.ljust(width), "dim"), _GAP, value))

    def message(self, text: str) -> None:
        """Show any other text for the user."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        self._print(Text(f"warning: {text}", style="yellow"))

    def close(self) -> None:
        """Nothing to close: every line is already printed."""

    def _position(self) -> str:
        return f"{self._step:>{len(str(self._total))}}/{self._total}"

    def _time_left(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Seconds to the last step at the mean pace so far, without evaluations."""
        if "time/step" not in metrics:
            return {}
        self._spent += metrics["time/step"]
        return {"left": self._spent / (self._step - self._start) * max(self._total - self._step, 0)}

    def _columns(self, metrics: Mapping[str, float], note: str | None) -> Text:
        position = self._position()
        available = [
            column for column in _NUMBERS + _TIMES if column.metric in metrics or column in self._shown
        ]
        shown = fit_columns(available, self.console.width - len(position))
        if shown != self._shown or self._lines == _HEADER_EVERY:
            self._shown = shown
            self._lines = 0
            self._explain(shown)
            header = "step".rjust(len(position)) + "".join(
                _GAP + column.header.rjust(column.width) for column in shown
            )
            self._print(Text(header, style="bold"))
        line = Text.assemble((position, "dim"))
        for column in shown:
            line.append_text(Text(_GAP)).append_text(_cell(column, metrics))
        self._lines += 1
        if note is None:
            return line
        fits = line.cell_len + len(_GAP) + len(note) <= self.console.width
        return line.append(f"{_GAP}{note}" if fits else f"\n{' ' * len(position)}{_GAP}{note}", "yellow")

    def _explain(self, columns: Sequence[Column]) -> None:
        """The legend of those columns that had none yet."""
        fresh = [column for column in columns if column not in self._explained and column.meaning]
        self._explained.update(fresh)
        if not self._legend or not fresh:
            return
        legend = Text(style="dim")
        for column in fresh:
            # a phrase is not broken between the column's name and what it means
            words = f"{column.header}: {column.meaning}".replace(" ", "\u00a0")
            legend.append(f"{words}{';' if column is not fresh[-1] else ''} ")
        for line in legend.wrap(self.console, self.console.width):
            self._print(Text(line.plain.replace("\u00a0", " ").rstrip(), style="dim"))

    def _plain(self, metrics: Mapping[str, float], note: str | None) -> Text:
        words = [
            f"{column.header} {_show(column, metrics)}" for column in _NUMBERS if column.metric in metrics
        ]
        words += [
            f"{column.header} {_show(column, metrics)}" for column in _TIMES if column.metric in metrics
        ]
        return Text(_GAP.join([f"step {self._position()}", *words, *([f"[{note}]"] if note else [])]))

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def _shorten(text: str, room: int) -> str:
    """In one line, the first ``room`` characters or, if ``room`` is negative, the last ones."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    if len(line) <= abs(room):
        return line
    return f"...{line[room + 3 :]}" if room < 0 else f"{line[: room - 3]}..."


def _show(column: Column, metrics: Mapping[str, float]) -> str:
    """The number as text; "-" if this step has none."""
    if column.metric not in metrics:
        return "-"
    value = metrics[column.metric]
    if column.metric == "law/ceiling" and value > 1 and "reward/correct" in metrics:
        return ">1"  # where the line ends is no share of right completions
    return column.show(value) if math.isfinite(value) else str(value)


def _cell(column: Column, metrics: Mapping[str, float]) -> Text:
    is_nonfinite = not math.isfinite(metrics.get(column.metric, 0.0))
    return Text(
        _show(column, metrics).rjust(column.width), style="bold red" if is_nonfinite else column.style
    )


def _eval_words(metrics: Mapping[str, float]) -> list[str]:
    """Texts such as ``pass@1 0.412 [0.371, 0.453]``, the most important first."""
    names = [name for name in metrics if name.startswith("eval/") and not name.endswith(("_low", "_high"))]
    words = []
    leading = ("eval/accuracy", "eval/margin")
    for name in sorted(
        names, key=lambda name: (leading.index(name) if name in leading else 2, "@" not in name)
    ):
        short = name.removeprefix("eval/")
        value = metrics[name]
        if short == "ungraded" and value == 0:
            continue
        bounds = [metrics[key] for key in (f"{name}_low", f"{name}_high") if key in metrics]
        has_interval = len(bounds) == 2 and all(map(math.isfinite, bounds))
        interval = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if has_interval else ""
        if interval or "@" in short:
            text = f"{value:.3f}{interval}"
        elif short in ("ungraded", "examples"):
            text = f"{value:.0f}"
        else:
            text = _number(value)
        words.append(f"{short} {text}")
    return words


def list_changes(evaluations: Sequence[Mapping[str, float]]) -> list[str]:
    """Lines such as ``pass@1       0.390 [0.36, 0.42] -> 0.770 [0.74, 0.80]`` for the first and the last
    evaluation of a run; empty where there are not two.
    """
    if len(evaluations) < 2:
        return []
    first = evaluations[0]
    last = evaluations[-1]
    lines = []
    for name in last:
        if f"{name}_low" not in last or name not in first:
            continue
        ends = [
            f"{line[name]:.3f} [{line[f'{name}_low']:.3f}, {line[f'{name}_high']:.3f}]"
            for line in (first, last)
        ]
        lines.append(f"{name.removeprefix('eval/'):<11}  {' -> '.join(ends)}")
    return lines
