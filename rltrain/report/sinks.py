"""The destinations of a run's numbers: always metrics.jsonl, and the trackers that the recipe names.

Only this module imports a tracker, and only a named one.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rltrain.errors import UserError
from rltrain.registry import suggestion
from rltrain.report.names import check_names
from rltrain.report.tables import COLUMNS, markdown_table


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_completions(self, step: int, stage: str, rows: Sequence[Sequence[Any]]) -> None:
        """rows: in the order of ``tables.COLUMNS``. stage: "rollout" or "eval"."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """A file of one JSON object per line, flushed line by line. Opening the file cuts off an incomplete
    last line, which a killed process left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115  (held until close)
        self._file.truncate(_bytes_of_whole_lines(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write ``record``.

        Raises ValueError on NaN or infinity, which JSON cannot express, and OSError when writing fails.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        # UTF-8 cannot encode a lone surrogate; the escape \\udXXX is valid JSON and reads back unchanged.
        self._file.write(line.encode("utf-8", errors="backslashreplace") + b"\n")
        self._file.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of numbers. NaN and infinities are null, and listed under "nonfinite"."""
        values = {name: float(value) for name, value in metrics.items()}
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        finite = {name: None if name in nonfinite else value for name, value in values.items()}
        self.append({"step": step, **finite, **({"nonfinite": nonfinite} if nonfinite else {})})

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files below ``folder/tensorboard``; a resumed run takes back the steps that it repeats."""

    def __init__(self, folder: Path) -> None:
        module = _tracker_module("tensorboard", "torch.utils.tensorboard")
        last = _last_step(folder / "metrics.jsonl")
        repeated = {} if last is None else {"purge_step": last + 1}
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), **repeated)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def log_completions(self, step: int, stage: str, rows: Sequence[Sequence[Any]]) -> None:
        self._writer.add_text(f"completions/{stage}", markdown_table(rows), global_step=step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run.

    The mode is the environment's (WANDB_MODE=offline is respected); offline files lie below the run folder.
    run_id: of the run folder, so that a resumed run goes on in the same W&B run; None: W&B makes one.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], run_id: str | None) -> None:
        self._module = module = _tracker_module("wandb", "wandb")
        same_run = {} if run_id is None else {"id": run_id, "resume": "allow"}
        options: dict[str, Any] = {"project": project, "name": folder.name, "dir": str(folder), **same_run}
        self._run = module.init(config=dict(config), **options)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_completions(self, step: int, stage: str, rows: Sequence[Sequence[Any]]) -> None:
        table = self._module.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self._run.log({f"completions/{stage}": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A trackio run: local unless TRACKIO_SPACE_ID says otherwise.

    trackio knows a run by its name within the project, so the name holds the run's id: a resumed run goes on
    in the same run, and a new run in a folder of the same name does not.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], run_id: str | None) -> None:
        self._module = module = _tracker_module("trackio", "trackio")
        name = folder.name if run_id is None else f"{folder.name}-{run_id}"
        self._run = module.init(project=project, name=name, config=dict(config), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_completions(self, step: int, stage: str, rows: Sequence[Sequence[Any]]) -> None:
        table = self._module.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self._run.log({f"completions/{stage}": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class Sinks:
    """metrics.jsonl and the trackers, as one sink.

    The file is written first and its errors stop the run. A tracker that raises is switched off with one
    warning and recorded in ``failed``: a broken dashboard loses its own curve but does not stop the run.
    """

    def __init__(
        self, lines: JsonLines, trackers: Mapping[str, Tracker], warn: Callable[[str], None]
    ) -> None:
        self._lines = lines
        self._trackers = dict(trackers)
        self._warn = warn
        self.failed: dict[str, str] = {}  # tracker name -> why it was switched off

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises ValueError on a name that the table of metrics lacks, before it writes anything."""
        check_names(metrics)
        self._lines.log(step, metrics)
        for name, tracker in list(self._trackers.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(step, metrics))

    def log_completions(self, step: int, stage: str, rows: Sequence[Sequence[Any]]) -> None:
        """Completions for the trackers' tables; the run's own are in transcripts.jsonl."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, lambda tracker=tracker: tracker.log_completions(step, stage, rows))

    def close(self) -> None:
        """Close all of them; a second call does nothing."""
        self._lines.close()
        for name, tracker in list(self._trackers.items()):
            self._guard(name, tracker.close)
        self._trackers.clear()

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        # third-party code raises exceptions of any type; a warning reports each
        except Exception as error:
            del self._trackers[name]
            self.failed[name] = f"{type(error).__name__}: {error}"
            self._warn(
                f"{name} failed and is switched off; {self._lines.path} has every number. {self.failed[name]}"
            )


def open_sinks(
    folder: Path,
    names: Sequence[str],
    project: str,
    config: Mapping[str, Any],
    warn: Callable[[str], None],
    run_id: str | None = None,
) -> Sinks:
    """The sinks of the run in ``folder``. run_id: under which trackers keep one run across resumes.

    Raises UserError when a named tracker is not installed or does not start.
    """
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder),
        "wandb": lambda: WeightsAndBiases(folder, project, config, run_id),
        "trackio": lambda: Trackio(folder, project, config, run_id),
    }
    for name in names:
        if name not in openers:
            raise UserError(f"report.sinks: no tracker is called {name!r}{suggestion(name, openers)}")
    trackers = {name: _start_tracker(name, openers[name]) for name in names}
    return Sinks(JsonLines(folder / "metrics.jsonl"), trackers, warn)


def _start_tracker(name: str, opener: Callable[[], Tracker]) -> Tracker:
    try:
        return opener()
    except UserError:
        raise
    except Exception as error:  # as in Sinks._guard, but before the first step the run can still be refused
        offline = "set WANDB_MODE=offline, or " if name == "wandb" else ""
        raise UserError(
            f"report.sinks: {name} did not start ({type(error).__name__}: {error}); {offline}remove it from "
            "report.sinks"
        ) from error


def _tracker_module(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"report.sinks names {name}, which cannot be imported ({error}); "
            f"pip install '{name}' (or 'rltrain[trackers]' for all), or remove it from report.sinks"
        ) from error


def _last_step(path: Path) -> int | None:
    """The step of the last whole line of metrics; None where there is none."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else None


def _bytes_of_whole_lines(path: Path) -> int:
    """Bytes up to and including the last newline of ``path``, read from the end."""
    position = os.path.getsize(path)
    with open(path, "rb") as file:
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
    return 0
