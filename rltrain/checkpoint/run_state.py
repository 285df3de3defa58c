"""The state that a run needs, besides the model, to continue as if it had never stopped: JSON and
safetensors, no pickle.

A checkpoint is an ordinary model folder with one more folder inside::

    checkpoints/step-12/            config, safetensors, tokenizer, card
        files.sha256.json           SHA-256 of every other file, the training state included
        training/state.json         everything of ``RunState`` but the tensors
        training/optimizer.safetensors

It is written under a temporary name and renamed when all of it is on the disk. ``read_verified`` checks every
file against its hash.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model
from safetensors import SafetensorError
from torch import Tensor

from rltrain.checkpoint.manifest import MANIFEST, DamagedCheckpointError, file_hashes
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.shards import INDEX, ShardedTensors
from rltrain.checkpoint.tensor_files import read_tensors, write_tensors
from rltrain.errors import UserError
from rltrain.json_text import parse_json

TRAINING = Path("training")
_STATE = TRAINING / "state.json"
_TENSORS = TRAINING / "optimizer.safetensors"
SHARDS = TRAINING / "shards"  # parts of weights and optimizer state, in place of both
_FORMAT = 2  # of state.json; raised when an older rltrain could not read it


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


class MisplacedCheckpointError(DamagedCheckpointError):
    """A checkpoint is complete, but has the name of another step or belongs to another run."""


@dataclass(frozen=True)
class RunState:
    """A run after ``step`` steps."""

    step: int
    learner: Mapping[str, Any]  # version, schedule and counters, by the learner's own names
    order: Mapping[str, Any]  # position in the prompt order
    prompts: str  # hash of the training prompts that are ordered
    pushes: int  # of weights to the engine
    evaluations: Sequence[Mapping[str, float]]  # results so far, first to last
    random: Sequence[Mapping[str, Any]]  # generators, one per rank
    reported: Mapping[str, int]  # bytes of each file the run appends to
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # the optimizer's, in a state that was read
    controllers: Sequence[Mapping[str, Any]] = ()  # of the loss terms' coefficients, in the recipe's order
    law: Mapping[str, Any] = field(default_factory=dict)  # points of entropy and reward so far
    sources: Sequence[Mapping[str, Any]] = ()  # the state of each of the recipe's rollout sources
    # Version, schedule and counters of the process reward model's learner.
    process_reward: Mapping[str, Any] = field(default_factory=dict)
    # Digests, by name, of the inputs other than the recipe.
    inputs: Mapping[str, str] = field(default_factory=dict)
    # The signal from which the next step's adaptive temperature is computed.
    temperature: Mapping[str, float] = field(default_factory=dict)
    # Digests of frozen models' weights and of their log-probs, so that a resumed run need not load them.
    frozen: Mapping[str, str] = field(default_factory=dict)
    # (step, origin) of the rollouts in the journal that were sampled ahead of their steps
    ahead: Sequence[Sequence[Any]] = ()


_PLAIN_FIELDS = {field.name: field for field in dataclasses.fields(RunState) if field.name != "tensors"}
_HINTS = get_type_hints(RunState)
_ANNOTATIONS: dict[str, Any] = {
    name: (_HINTS[name], ... if _is_required(field) else None) for name, field in _PLAIN_FIELDS.items()
}
# Checks the types of all fields but the tensors; a field with a default may be missing.
_PlainState = create_model("_PlainState", __config__=ConfigDict(extra="forbid", strict=True), **_ANNOTATIONS)


def write_state(folder: Path, state: RunState, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write ``state`` into ``folder``, an unfinished checkpoint.

    tensors: the optimizer's, by parameter name and slot, written as they arrive. Raises OSError or
    SafetensorError when the disk refuses.
    """
    write_plain_state(folder, state)
    write_tensors(folder / _TENSORS.parent, _TENSORS.stem, tensors)


def write_plain_state(folder: Path, state: RunState) -> None:
    """``write_state`` without the tensors, which the ranks write into ``folder / SHARDS``."""
    plain = {name: getattr(state, name) for name in _PLAIN_FIELDS}
    (folder / _STATE).parent.mkdir()
    (folder / _STATE).write_text(json.dumps({"format": _FORMAT, **plain}) + "\n", encoding="utf-8")


def is_sharded(checkpoint: Path) -> bool:
    """Whether the ranks wrote their own parts of ``checkpoint``, which then holds no model folder."""
    return (checkpoint / SHARDS).is_dir()


def read_verified(checkpoint: Path) -> RunState:
    """The state in ``checkpoint``, after every file was compared with its hash.

    Raises DamagedCheckpointError naming the file.
    """
    remedy = "resume from another checkpoint"
    try:
        listed = parse_json((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedCheckpointError(
            f"{checkpoint}: {MANIFEST} is missing, so this is no complete checkpoint; {remedy}"
        ) from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{checkpoint / MANIFEST} is damaged ({error}); {remedy}") from error
    if not isinstance(listed, dict) or str(_STATE) not in listed or not _has_tensors(listed):
        raise DamagedCheckpointError(
            f"{checkpoint} holds a model but no training state ({_STATE}); {remedy}, or start a new "
            "run from its model"
        )

    hashes = file_hashes(checkpoint)
    for name, digest in listed.items():
        if hashes.get(name) != digest:
            problem = "is not what was written (its SHA-256 differs)" if name in hashes else "is missing"
            raise DamagedCheckpointError(f"{checkpoint / name} {problem}; {remedy}")

    unlisted = sorted(hashes.keys() - listed.keys())
    if added := [name for name in unlisted if not Path(name).name.startswith(".")]:
        raise DamagedCheckpointError(
            f"{checkpoint / added[0]} was put there later ({MANIFEST} does not list it), and may be loaded "
            f"instead of the original file; remove it, or {remedy}"
        )
    return read_state(checkpoint)


def _has_tensors(listed: Collection[str]) -> bool:
    """Whether a manifest lists the optimizer's tensors, in one file or several."""
    return str(SHARDS / INDEX) in listed or any(
        name.startswith(str(_TENSORS.with_suffix(""))) for name in listed
    )


def read_own(folder: RunFolder, checkpoint: Path) -> RunState:
    """``read_verified`` of a checkpoint inside ``folder``.

    Raises MisplacedCheckpointError where its step is not the one in its name, or its run is not the folder's.
    """
    state = read_verified(checkpoint)
    name = folder.checkpoint(state.step).name
    run = state.environment.get("run")
    if checkpoint.name != name:
        raise MisplacedCheckpointError(
            f"{checkpoint} holds the state after step {state.step}: it was copied or renamed; call it "
            f"{name}, or remove it"
        )
    if run is not None and folder.run_id is not None and run != folder.run_id:
        raise MisplacedCheckpointError(
            f"{checkpoint} was written by another run, whose metrics are not those in {folder.path}; "
            f"to go on from it choose a new run folder: --run NEW --resume {checkpoint}"
        )
    return state


def read_state(checkpoint: Path) -> RunState:
    """The state in ``checkpoint``, whose files ``read_verified`` has checked.

    Raises DamagedCheckpointError where it cannot be read.
    """
    try:
        plain = parse_json((checkpoint / _STATE).read_text(encoding="utf-8"))
        format_ = plain.pop("format")
        if format_ != _FORMAT:
            raise UserError(
                f"{checkpoint / _STATE} has format {format_} and this rltrain reads {_FORMAT}; "
                f"resume with rltrain {plain.get('environment', {}).get('rltrain', 'of that time')}"
            )
        _PlainState.model_validate(plain)
        if any(size < 0 for size in plain["reported"].values()):
            raise ValueError("reported: the size of a file is below 0")
        if is_sharded(checkpoint):
            tensors: Mapping[str, Tensor] = ShardedTensors(checkpoint / SHARDS)
        else:
            tensors = read_tensors(checkpoint / _TENSORS.parent, _TENSORS.stem)
        return RunState(tensors=tensors, **plain)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise DamagedCheckpointError(
            f"{checkpoint / _STATE}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}, got "
            f"{problem['input']!r:.80}; resume from another one"
        ) from error
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ImportError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedCheckpointError(
            f"{checkpoint}: the training state cannot be read ({error}); resume from another one"
        ) from error


@contextmanager
def restoring(checkpoint: Path) -> Iterator[None]:
    """Inside, whatever is raised for a state of another form is a DamagedCheckpointError that names it."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise DamagedCheckpointError(
            f"{checkpoint}: its training state does not fit this run ({type(error).__name__}: {error}); "
            "resume from another one, or start a new run from its model"
        ) from error


def latest(folder: RunFolder, warn: Callable[[str], None]) -> tuple[Path, RunState] | None:
    """The newest complete checkpoint of this run; warns of each newer one that cannot be used.

    None where the folder has no checkpoints. Raises UserError when it has some but none is usable: the user
    must then decide whether to start over.
    """
    damaged: list[str] = []
    for _, path in reversed(folder.present_checkpoints()):
        try:
            state = read_own(folder, path)
        except DamagedCheckpointError as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            warn(line)
        return path, state
    if damaged:
        remedy = "choose another --run, or remove that folder to start again from the first step"
        raise UserError(
            "\n".join([f"{folder.checkpoints} holds no complete checkpoint of this run; {remedy}", *damaged])
        )
    return None
