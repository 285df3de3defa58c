"""Reads the rows of a data set, each with its file and line, so that error messages can name them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.data.tasks import TASKS, task_rows
from rltrain.json_text import parse_json

SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    id: str  # stable and unique in its data set: name of the data set and row number from 0
    where: str  # for error messages: file and line, or data set and row
    columns: Mapping[str, Any]


def read_rows(
    source: str, *, split: str, subset: str | None = None, options: Mapping[str, Any] | None = None
) -> list[Row]:
    """All rows of ``source``: a built-in task, a local file or folder, or a data set on the Hub.

    A single file is read completely and ``split`` is ignored; in a folder, only files named after the split
    (``train.jsonl``, ``train-*.parquet``) are read. Raises ValueError, naming file and line, if something
    cannot be read, and if there are no rows.
    """
    if source in TASKS:
        rows = _task_rows(source, split, options or {})
    elif options:
        raise ValueError(
            f"data.options {sorted(options)} belong to a built-in task ({', '.join(TASKS)}), and the data "
            f"set is {source!r}"
        )
    elif Path(source).is_file():
        rows = _file_rows(Path(source), split)
    elif Path(source).is_dir():
        rows = _folder_rows(Path(source), split, subset)
    elif source.endswith(SUFFIXES) or is_local(source):
        remedy = (
            "; scripts/get_data.py makes the files of data/" if Path(source).parts[:1] == ("data",) else ""
        )
        raise ValueError(f"data set {source!r}: no such file or folder (from {Path.cwd()}){remedy}")
    else:
        rows = _loaded_rows(source, source, split, subset)
    if not rows:
        raise ValueError(f"data set {source!r} (split {split!r}) is empty; at least one row is needed")
    return rows


def is_local(path: str) -> bool:
    """Whether a name is a path of this machine, by its form; a name on the Hub is never of this form."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _task_rows(source: str, split: str, options: Mapping[str, Any]) -> list[Row]:
    if split not in ("train", "test"):
        raise ValueError(f"the built-in task {source!r} has the splits 'train' and 'test', not {split!r}")
    problems = task_rows(source, "train" if split == "train" else "test", options)
    return [
        Row(f"{source}:{problem.get('equation', problem['prompt'])}", f"{source}, row {number}", problem)
        for number, problem in enumerate(problems)
    ]


def _file_rows(path: Path, split: str) -> list[Row]:
    """Reads json and jsonl without ``datasets``, which hides the line of an error and unifies the types of a
    column.
    """
    if "[" in split:
        raise ValueError(
            f"{path} is one file and has no splits to slice: {split!r}; name a file per split, or use "
            "data.max_prompts"
        )
    if path.suffix == ".parquet":
        return _loaded_rows("parquet", path.name, "train", None, data_files=str(path))
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a data file ends in {', '.join(SUFFIXES)}, not {path.suffix!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _array_rows(path, text)
    return _line_rows(path, text)


def _line_rows(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    # not splitlines(), because a JSON string may contain U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            columns = parse_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}): "
                f"{line.strip()[:80]!r}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(_object_row(path, columns, f"line {number}", len(rows)))
    return rows


def _array_rows(path: Path, text: str) -> list[Row]:
    try:
        items = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return [_object_row(path, columns, f"row {number}", number) for number, columns in enumerate(items)]


def _object_row(path: Path, columns: Any, place: str, number: int) -> Row:
    if not isinstance(columns, dict):
        raise ValueError(
            f'{path}, {place}: a row is a JSON object such as {{"prompt": ...}}, got {type(columns).__name__}'
        )
    return Row(f"{path.name}:{number}", f"{path}, {place}", columns)


def _folder_rows(folder: Path, split: str, subset: str | None) -> list[Row]:
    """Rows of the files named after the split, in order of name; otherwise ``datasets`` reads the folder."""
    inside = folder / subset if subset is not None and (folder / subset).is_dir() else folder
    files = [
        path
        for path in sorted(inside.iterdir())
        if path.suffix in SUFFIXES and (path.stem == split or path.stem.startswith(f"{split}-"))
    ]
    if files:
        return [row for path in files for row in _file_rows(path, split)]
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _saved_rows(folder, split)
    return _loaded_rows(str(folder), folder.name, split, subset)


def _saved_rows(folder: Path, split: str) -> list[Row]:
    """Rows written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} cannot be read as a data set of save_to_disk: {type(error).__name__}: {error}; "
            "write it again"
        ) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(
                f"{folder} has the splits {sorted(map(str, saved))}, not {split!r}; set data.train_split or "
                "data.eval_split"
            )
        saved = saved[split]
    return _number_rows(folder.name, str(folder), saved)


def _loaded_rows(
    loader: str, name: str, split: str, subset: str | None, data_files: str | None = None
) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    where = data_files or f"{name}, split {split}"
    try:
        data = load_dataset(loader, subset, split=split, data_files=data_files)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        NotImplementedError,
        DatasetGenerationError,
    ) as error:
        remedy = (
            f"a data set is a built-in task ({', '.join(TASKS)}), a file ({', '.join(SUFFIXES)}), a folder, "
            "or a name on the Hub"
        )
        raise ValueError(f"cannot read {where}: {type(error).__name__}: {error}; {remedy}") from error
    return _number_rows(name, where, data)


def _number_rows(name: str, where: str, data: Any) -> list[Row]:
    return [Row(f"{name}:{number}", f"{where}, row {number}", columns) for number, columns in enumerate(data)]
