"""The journal of a run: what each step was trained on, a Parquet file for each, written before the step, and
the held-out completions of each evaluation.

A file has a row for each completion (``journal_table``) and one entry ``rltrain`` in its metadata: JSON with
everything else that the step needs, and with the checksum of the weights that sampled.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rltrain.checkpoint.journal_table import groups_of_table, table_of_groups
from rltrain.checkpoint.run_folder import RunFolder, write_atomic
from rltrain.errors import UserError
from rltrain.types.samples import PolicyVersion, ScoredGroup

__all__ = [
    "EvaluationRecord",
    "Journal",
    "StepHeader",
    "StepRecord",
    "WaitingGroups",
    "origin_of",
]

_FORMAT = 1
_KEY = b"rltrain"
_DAMAGES = (OSError, ValueError, TypeError, KeyError)  # pyarrow's are OSError, ValueError


@dataclass(frozen=True)
class StepHeader:
    """What a file says about a step beside its completions."""

    step: int
    version: int  # of the policy that sampled: the learner's number of updates
    weights: str  # checksum of the learner's weights at that version
    origin: str  # digest of everything that the samples follow from (``origin_of``)
    state: Mapping[str, Any]  # of the rollout source, after these rollouts
    generated_groups: int
    rounds: int
    correct_counts: Sequence[int]
    seconds: Mapping[str, float]
    metrics: Mapping[str, float]
    # generators of random numbers after these rollouts, by rank; empty: sampling left them as they were
    random: Sequence[Mapping[str, Any]] = field(default_factory=list)
    environment: Mapping[str, Any] = field(default_factory=dict)  # the software that wrote it


@dataclass(frozen=True)
class StepRecord:
    header: StepHeader
    groups: tuple[ScoredGroup, ...]


@dataclass(frozen=True)
class EvaluationRecord:
    """The held-out completions of the weights of ``version``. weights, random: see ``StepHeader``. request:
    text of what was asked for (prompts, sampling, settings).
    """

    version: int
    weights: str
    request: str
    random: Sequence[Mapping[str, Any]]
    groups: tuple[ScoredGroup, ...]


def origin_of(step: int, version: int, weights: str, state: Mapping[str, Any], settings: str) -> str:
    """Digest of what the rollouts of a step follow from: the weights, the state of the source before it, and
    the settings, as text.
    """
    plain = json.dumps([step, version, weights, state, settings], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


@dataclass(frozen=True)
class Journal:
    """The files below ``folder.rollouts``. keep: ``journal.keep`` of the recipe."""

    folder: RunFolder
    keep: str = "all"

    def path(self, step: int) -> Path:
        return self.folder.rollouts / f"step-{step:06d}.parquet"

    def steps(self) -> list[int]:
        """The steps that have a file, first to last."""
        names = [path.stem.removeprefix("step-") for path in self.folder.rollouts.glob("step-*.parquet")]
        return sorted(int(name) for name in names if name.isdecimal())

    def write(self, record: StepRecord) -> None:
        """Returns once the whole file is on the disk; nobody ever sees a part of it."""
        self.folder.rollouts.mkdir(exist_ok=True)
        _write(self.path(record.header.step), asdict(record.header), record.groups)

    def read(self, step: int) -> StepRecord:
        """Raises FileNotFoundError where the step has no file, and UserError where it is damaged."""
        path = self.path(step)
        plain, groups = _read(path)
        header = _make_header(path, plain)
        if header.step != step:
            raise UserError(f"{path} holds the rollouts of step {header.step}: it was copied or renamed")
        return StepRecord(header, groups)

    def evaluation_path(self, version: int) -> Path:
        return self.folder.rollouts / f"evaluation-{version:06d}.parquet"

    def evaluated_versions(self) -> list[int]:
        """The versions of the weights of which held-out completions are kept."""
        paths = self.folder.rollouts.glob("evaluation-*.parquet")
        names = [path.stem.removeprefix("evaluation-") for path in paths]
        return sorted(int(name) for name in names if name.isdecimal())

    def write_evaluation(self, record: EvaluationRecord) -> None:
        """Where ``keep`` is "resume" nothing is written: held-out completions are sampled again."""
        if self.keep == "resume":
            return
        self.folder.rollouts.mkdir(exist_ok=True)
        header = {item.name: getattr(record, item.name) for item in fields(record) if item.name != "groups"}
        _write(self.evaluation_path(record.version), header, record.groups)

    def read_evaluation(self, version: int) -> EvaluationRecord:
        """Raises FileNotFoundError where there is none, and UserError where it is damaged."""
        path = self.evaluation_path(version)
        plain, groups = _read(path)
        try:
            record = EvaluationRecord(**plain, groups=groups)
        except TypeError as error:
            raise _report_damage(path, error) from error
        if record.version != version:
            raise UserError(f"{path} holds completions of version {record.version}: it was copied or renamed")
        return record

    def read_header(self, step: int) -> StepHeader:
        """``read`` without the completions."""
        path = self.path(step)
        try:
            plain = _read_metadata(pq.read_schema(path).metadata or {})
        except FileNotFoundError:
            raise
        except _DAMAGES as error:
            raise _report_damage(path, error) from error
        return _make_header(path, plain)

    def prune(self) -> None:
        """Removes the files that ``keep`` does not ask for: with "resume", those of steps from which no
        checkpoint that is left can go on.
        """
        checkpoints = self.folder.present_checkpoints()
        if self.keep != "resume" or not checkpoints:
            return
        for step in self.steps():
            if step <= checkpoints[0][0]:
                self.path(step).unlink(missing_ok=True)


@dataclass(frozen=True)
class WaitingGroups:
    """Files with one group each, which is on the disk from when it is graded until a step has trained on it.

    settings: text of the inputs that samples depend on besides weights and prompt.
    """

    folder: RunFolder
    settings: str = ""

    def path(self, number: int) -> Path:
        return self.folder.rollouts / f"draw-{number:06d}.parquet"

    def numbers(self) -> list[int]:
        names = [path.stem.removeprefix("draw-") for path in self.folder.rollouts.glob("draw-*.parquet")]
        return sorted(int(name) for name in names if name.isdecimal())

    def write(self, number: int, group: ScoredGroup, weights: Mapping[PolicyVersion, str]) -> None:
        """weights: the checksums of the versions that drew its tokens."""
        self.folder.rollouts.mkdir(exist_ok=True)
        header = {"draw": number, "settings": self.settings, "weights": sorted(weights.items())}
        _write(self.path(number), header, [group])

    def read(self, number: int, prompt: str, weights: Mapping[PolicyVersion, str]) -> ScoredGroup | None:
        """The group of this number, if it is one of ``prompt`` (its id) and its tokens are of these weights,
        under the present settings; a damaged file is none.
        """
        try:
            plain, groups = _read(self.path(number))
            written = dict(plain["weights"])
            (group,) = groups
        except (FileNotFoundError, UserError, KeyError, TypeError, ValueError):
            return None
        is_same = plain.get("draw") == number and plain.get("settings") == self.settings
        drawn_by = {span.version for each in group.completions for span in each.versions}
        are_weights = all(
            version in weights and weights[version] == written.get(version) for version in drawn_by
        )
        return group if is_same and are_weights and group.prompt.id == prompt else None

    def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.path(number).unlink(missing_ok=True)


def _write(path: Path, header: Mapping[str, Any], groups: Sequence[ScoredGroup]) -> None:
    plain = json.dumps({"format": _FORMAT, **header})
    table = table_of_groups(groups).replace_schema_metadata({_KEY: plain.encode()})
    buffer = io.BytesIO()
    dictionaries: Any = [name for name in table.column_names if name.startswith("prompt_")]
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        use_dictionary=dictionaries,
        column_encoding={"logprobs.list.element": "BYTE_STREAM_SPLIT"},
        write_page_checksum=True,
    )
    write_atomic(path, buffer.getvalue())


def _read(path: Path) -> tuple[dict[str, Any], tuple[ScoredGroup, ...]]:
    """Header and groups. Raises FileNotFoundError, and UserError where the file is damaged."""
    content = path.read_bytes()
    try:
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
        plain = _read_metadata(table.schema.metadata or {})
        return plain, groups_of_table(table.replace_schema_metadata(None))
    except _DAMAGES as error:
        raise _report_damage(path, error) from error


def _report_damage(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or no journal of rollouts ({error})")


def _read_metadata(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    plain = json.loads(metadata[_KEY])
    if plain.pop("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT}, the one that this rltrain reads")
    return plain


def _make_header(path: Path, plain: Mapping[str, Any]) -> StepHeader:
    known = {item.name for item in fields(StepHeader)}
    if plain.keys() != known:
        differences = sorted(plain.keys() ^ known)
        raise _report_damage(path, ValueError(f"its header has {differences} too few or too many"))
    return StepHeader(**plain)
