"""Whatever a run folder and its checkpoints hold ends in a start or in one message, never in a foreign
exception.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltrain.checkpoint.manifest import MANIFEST, DamagedCheckpointError, file_hashes
from rltrain.checkpoint.random_state import random_state, restore_random_state
from rltrain.checkpoint.resume import open_run, saved_date
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import RunState, read_state, restoring, write_state
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.errors import UserError
from rltrain.learner.optim import check_state
from support.fuzzing import fuzz_settings

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes/policy/grpo.yaml", profile="tiny_cpu")
NUMBERS = [True, -1, 0, 10**30, 0.5, float("nan")]
VALUES = st.sampled_from([None, *NUMBERS, "x", "", "../x", "\ud800", [], [[]], {}, {"a": 1}, [1, "x"]])
DEEP = "[" * 50_000 + "]" * 50_000


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | bytes]:
    """The files of a run folder with a checkpoint after step 2, by path."""
    path = tmp_path_factory.mktemp("run") / "run"
    folder = RunFolder.create(path, resolved_yaml(RECIPE), {"run": "a", "packages": {"torch": "1"}})
    checkpoint = folder.checkpoint(2)
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_text("weights")
    write_state(
        checkpoint,
        RunState(
            step=2,
            learner={"version": 2, "schedule": 2, "scaler": None, "nonfinite_in_a_row": 0},
            order={"epoch": 0, "position": 4},
            prompts="digest",
            pushes=3,
            evaluations=({"eval/reward": 0.5, "step": 0},),
            random=({"python": [3, [1, 2], None]},),
            reported={"metrics.jsonl": 10},
            recipe=RECIPE.model_dump(mode="json"),
            environment={"run": "a", "packages": {"torch": "1"}},
            inputs={"data": "digest"},
        ),
        [("w/step", torch.ones(())), ("w/exp_avg", torch.zeros(2)), ("w/exp_avg_sq", torch.zeros(2))],
    )
    (checkpoint / MANIFEST).write_text(json.dumps(file_hashes(checkpoint)))
    (path / "metrics.jsonl").write_text('{"step": 1}\n' * 3)
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def restore_files(path: Path, originals: dict[str, Any]) -> RunFolder:
    """The run folder at ``path`` as it was before the last example."""
    shutil.rmtree(path, ignore_errors=True)
    for name, content in originals.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return RunFolder.from_path(path)


def renew_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(json.dumps(file_hashes(checkpoint)))


def start(folder: RunFolder, resume: str) -> None:
    """What ``rltrain train`` reads of a run folder before it loads a model."""
    saved_date(folder, resume)
    with open_run(folder, RECIPE, resume, {"run": "new"}, lambda _: None, {"data": "digest"}) as opened:
        assert opened.checkpoint is None or opened.checkpoint.is_dir()


def places(value: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys of a JSON tree, of inner nodes too."""
    yield key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*key, name))


@fuzz_settings(200)
@given(data=st.data())
def test_any_change_of_a_json_file(tmp_path: Path, originals: dict[str, Any], data: st.DataObject) -> None:
    folder = restore_files(tmp_path / "run", originals)
    checkpoint = folder.checkpoint(2)
    state, manifest = checkpoint / "training/state.json", checkpoint / MANIFEST
    file = data.draw(st.sampled_from([state, state, manifest, folder.environment]))
    content = json.loads(file.read_text())
    *inner, last = (None, *data.draw(st.sampled_from([*places(content)])))
    value = data.draw(VALUES)
    if last is None:
        content = value
    else:
        holder = content
        for part in inner[1:]:
            holder = holder[part]
        holder[last] = value
    file.write_text(data.draw(st.sampled_from([json.dumps(content)] * 9 + [DEEP])))
    if file == state:
        renew_manifest(checkpoint)
    resume = data.draw(st.sampled_from(["auto", str(checkpoint)]))
    if data.draw(st.booleans()) and resume != "auto":
        folder = RunFolder.from_path(tmp_path / "run" / f"new-{data.draw(st.integers(0, 10**9))}")
    try:
        start(folder, resume)
    except UserError as error:
        assert str(error)


def test_a_saved_length_that_is_no_number_is_another_recipes(
    tmp_path: Path, originals: dict[str, Any]
) -> None:
    folder = restore_files(tmp_path / "run", originals)
    checkpoint = folder.checkpoint(2)
    state = checkpoint / "training/state.json"
    content = json.loads(state.read_text())
    content["recipe"]["train"]["steps"] = "many"
    state.write_text(json.dumps(content))
    renew_manifest(checkpoint)
    with pytest.raises(UserError, match=r"train\.steps: \"many\" ->"):
        start(RunFolder.from_path(tmp_path / "new"), str(checkpoint))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learner", None, "learner: Input should be a valid"),
        ("step", "2", "step: Input should be a valid integer"),
        ("reported", {"metrics.jsonl": None}, "reported.metrics.jsonl: Input should be a valid integer"),
        ("random", {}, "random: Input should be"),
        ("unknown", 1, "unknown: Extra inputs are not permitted"),
    ],
)
def test_a_field_of_another_type_is_named(
    tmp_path: Path, originals: dict[str, Any], field: str, value: Any, message: str
) -> None:
    checkpoint = restore_files(tmp_path / "run", originals).checkpoint(2)
    file = checkpoint / "training/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(DamagedCheckpointError, match=f"state.json: {message}"):
        read_state(checkpoint)


def test_a_generator_of_another_form_is_named(tmp_path: Path) -> None:
    before = random_state()
    try:
        with (
            pytest.raises(DamagedCheckpointError, match="step-2: its training state does not fit this run"),
            restoring(tmp_path / "step-2"),
        ):
            restore_random_state({**before, "python": None})
    finally:
        restore_random_state(before)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("w/step", "w/exp_avg", "w/exp_avg_squared"), r"'w' has \['exp_avg', 'exp_avg_squared', 'step'\]"),
        (("w/step", "w/exp_avg"), r"AdamW's are \['exp_avg', 'exp_avg_sq', 'step'\]"),
        (("v/step", "v/exp_avg", "v/exp_avg_sq"), "'v' and 0 more that this model does not train"),
    ],
)
def test_a_renamed_optimizer_tensor_is_refused(names: tuple[str, ...], message: str) -> None:
    trained = {"w": torch.nn.Parameter(torch.zeros(2))}
    tensors = {name: torch.zeros(() if name.endswith("step") else 2) for name in names}
    with pytest.raises(ValueError, match=message):
        check_state(trained, tensors)
