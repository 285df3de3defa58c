"""metrics.jsonl survives everything; trackers may fail; nothing is imported that was not named."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rltrain.errors import UserError
from rltrain.report.sinks import JsonLines, Sinks, open_sinks

ROOT = Path(__file__).parents[2]


def read(path: Path) -> list[dict]:
    refuse = lambda word: pytest.fail(f"not JSON: {word}")  # noqa: E731
    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_is_readable_before_the_file_is_closed(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log(3, {"reward/mean": 0.5})
    assert read(lines.path) == [{"step": 3, "reward/mean": 0.5}]


def test_nan_and_infinity_stay_valid_json_and_are_named(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log(1, {"a": float("nan"), "b": float("-inf"), "c": 1.0})
    assert read(lines.path) == [
        {"step": 1, "a": None, "b": None, "c": 1.0, "nonfinite": {"a": "nan", "b": "-inf"}}
    ]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "a": 0.', b"x" * 200_000], ids=["short", "longer than the read buffer"]
)
def test_a_half_written_last_line_is_cut_off_on_reopening(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    lines = JsonLines(path)
    lines.log(2, {"a": 1.0})
    assert read(path) == [{"step": 1}, {"step": 2, "a": 1.0}]


def test_reopening_a_whole_file_loses_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    for step in (1, 2):
        lines = JsonLines(path)
        lines.log(step, {})
        lines.close()
    assert [line["step"] for line in read(path)] == [1, 2]
    (tmp_path / "torn").write_bytes(b"no newline at all")
    JsonLines(tmp_path / "torn")
    assert (tmp_path / "torn").read_bytes() == b""


def test_a_killed_process_leaves_every_logged_line(tmp_path):
    code = "import os, signal\nfrom pathlib import Path\nfrom rltrain.report.sinks import JsonLines\n"
    code += f"lines = JsonLines(Path({str(tmp_path / 'm')!r}))\n"
    code += "for step in range(50): lines.log(step, {'a': 1.0})\nos.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    assert [line["step"] for line in read(tmp_path / "m")] == list(range(50))


def test_a_lone_surrogate_survives_the_round_trip(tmp_path):
    lines = JsonLines(tmp_path / "t.jsonl")
    record = {"text": "7 \ud83d and \u2028 and \u4e2d \\udc00"}
    lines.append(record)
    with open(lines.path, encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [record]


class Flaky:
    def __init__(self, fail_at: int = 10**9) -> None:
        self.steps = []
        self.fail_at = fail_at
        self.closed = False

    def log(self, step, metrics):
        if step == self.fail_at:
            raise ConnectionError("dashboard is down")
        self.steps.append(step)

    def log_completions(self, step, stage, rows):
        raise ConnectionError("tables are down")

    def close(self):
        self.closed = True


def test_a_tracker_whose_tables_fail_is_switched_off_too(tmp_path):
    sinks = Sinks(JsonLines(tmp_path / "m.jsonl"), {"flaky": Flaky()}, lambda text: None)
    sinks.log_completions(1, "rollout", [])
    assert sinks.failed == {"flaky": "ConnectionError: tables are down"}
    sinks.close()


def test_a_tracker_that_raises_is_switched_off_once_and_the_file_keeps_every_line(tmp_path):
    flaky = Flaky(fail_at=2)
    steady = Flaky()
    warnings = []
    sinks = Sinks(JsonLines(tmp_path / "m.jsonl"), {"flaky": flaky, "steady": steady}, warnings.append)
    for step in (1, 2, 3):
        sinks.log(step, {"reward/mean": 0.1})
    sinks.close()
    assert [line["step"] for line in read(tmp_path / "m.jsonl")] == [1, 2, 3]
    assert flaky.steps == [1] and steady.steps == [1, 2, 3] and steady.closed
    assert sinks.failed == {"flaky": "ConnectionError: dashboard is down"}
    assert len(warnings) == 1 and "flaky" in warnings[0] and "m.jsonl" in warnings[0]


def test_a_tracker_that_cannot_close_does_not_stop_the_others(tmp_path):
    bad = Flaky()
    good = Flaky()
    bad.close = lambda: 1 / 0
    sinks = Sinks(JsonLines(tmp_path / "m"), {"bad": bad, "good": good}, lambda text: None)
    sinks.close()
    sinks.close()
    assert good.closed and list(sinks.failed) == ["bad"]


def test_a_tracker_cannot_swallow_the_users_interrupt(tmp_path):
    class Interrupted(Flaky):
        def log(self, step, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks(JsonLines(tmp_path / "m"), {"t": Interrupted()}, print).log(1, {})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_never_silent(tmp_path):
    lines = JsonLines(tmp_path / "m")
    lines._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        lines.log(1, {})
    lines._file.raw.close()


def test_unknown_names_are_refused_before_anything_is_written(tmp_path):
    sinks = Sinks(JsonLines(tmp_path / "m"), {}, print)
    with pytest.raises(ValueError, match="rewards/mean"):
        sinks.log(1, {"reward/mean": 1.0, "rewards/mean": 1.0})
    assert read(tmp_path / "m") == []


class FakeRun:
    def __init__(self, **options):
        self.options = options
        self.logged = []
        self.finished = False

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_named_trackers_get_every_step(name, tmp_path, monkeypatch):
    runs = []
    module = types.ModuleType(name)
    module.init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]
    monkeypatch.setitem(sys.modules, name, module)
    sinks = open_sinks(tmp_path, [name], "project-x", {"seed": 1}, print)
    sinks.log(4, {"reward/mean": 0.5})
    sinks.close()
    (run,) = runs
    assert (
        run.options["project"] == "project-x"
        and run.options["name"] == tmp_path.name
        and run.options["config"] == {"seed": 1}
    )
    assert "id" not in run.options  # of a folder without an id
    assert "mode" not in run.options  # so WANDB_MODE=offline decides
    assert run.logged == [(4, {"reward/mean": 0.5})] and run.finished


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (pip install rltrain[trackers])")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):  # the second is the resumed process
        sinks = open_sinks(tmp_path, ["wandb"], "p", {}, pytest.fail, "5eed")
        assert wandb.run.id == "5eed" and wandb.run.settings.resume == "allow"
        sinks.log(step, {"reward/mean": 0.5})
        sinks.close()
        assert sinks.failed == {}
    written = {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert written == {"5eed"}


def test_a_resumed_run_goes_on_in_the_same_trackio_run(tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed (pip install rltrain[trackers])")
    code = """
import sys
from pathlib import Path
from trackio.sqlite_storage import SQLiteStorage
from rltrain.report.sinks import open_sinks
for step, run in ((1, "a"), (2, "a"), (1, "b")):  # "a" is resumed, "b" a new run
    sinks = open_sinks(Path("run"), ["trackio"], "p", {}, sys.exit, run)
    sinks.log(step, {"reward/mean": step / 4})
    sinks.close()
    assert sinks.failed == {}, sinks.failed
for run in SQLiteStorage.get_runs("p"):
    print(run, [(line["step"], line["reward/mean"]) for line in SQLiteStorage.get_logs("p", run)])
"""
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("run-")]
    assert lines == ["run-a [(1, 0.25), (2, 0.5)]", "run-b [(1, 0.25)]"], done.stdout + done.stderr


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_id_of_the_run_folder(name, tmp_path, monkeypatch):
    runs = []
    module = types.ModuleType(name)
    module.init = lambda **options: runs.append(options) or FakeRun()
    monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "first").mkdir()
    open_sinks(tmp_path / "first", [name], "p", {}, print, "5eed").close()
    expected = {"wandb": {"name": "first", "id": "5eed"}, "trackio": {"name": "first-5eed"}}[name]
    assert expected.items() <= runs[0].items() and runs[0]["resume"] == "allow"


@pytest.mark.parametrize(
    ("name", "module"),
    [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "torch.utils.tensorboard")],
)
def test_a_missing_tracker_is_one_clear_error_before_the_run(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # import now raises ImportError
    with pytest.raises(UserError, match=rf"report.sinks names {name}.*pip install '{name}'.*or remove it"):
        open_sinks(tmp_path, [name], "p", {}, print)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_does_not_start_says_so_before_the_run(tmp_path, monkeypatch):
    module = types.ModuleType("wandb")
    module.init = lambda **options: (_ for _ in ()).throw(RuntimeError("no API key"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"wandb did not start.*no API key.*WANDB_MODE=offline"):
        open_sinks(tmp_path, ["wandb"], "p", {}, print)


def test_an_unknown_tracker_gets_a_suggestion(tmp_path):
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        open_sinks(tmp_path, ["tensorbord"], "p", {}, print)


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed (pip install rltrain[trackers])",
    )
    sinks = open_sinks(tmp_path, ["tensorboard"], "p", {}, print)
    for step in (1, 2):
        sinks.log(step, {"reward/mean": 0.25 * step})
    sinks.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


def test_reporting_needs_neither_torch_nor_a_tracker():
    code = (
        "import sys, rltrain.report.progress, rltrain.report.sinks, rltrain.report.statistics, "
        "rltrain.report.names\n"
    )
    code += (
        "print(sorted({'torch', 'wandb', 'trackio', 'tensorboard', 'transformers', 'vllm'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
