"""A bench against a peer, with workers that train nothing: turns, medians, the JSON's keys, and the
batch on which both must agree.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.scripts import SCRIPTS

# Two warm-up steps and five counted ones, in seconds: the medians are 3 and 6, with the warm-up 50 in both;
# means are far from either.
BENCH = """
import os
import sys
from pathlib import Path

from peer_bench import Bench

SECONDS = {"rltrain": [50, 50, 3, 50, 3, 50, 3], "trl": [50, 50, 6, 100, 6, 100, 6]}
AMOUNTS = {"plain": 30, "half": 15}


def trainer(name, hoard):
    def run(case, folder, turns):
        assert (folder / "material").read_text() == str(case)
        kept = bytearray(os.urandom(hoard))
        for seconds in [*SECONDS[name], 1]:  # one more than is asked for
            with open(os.environ["BENCH_LOG"], "a") as log:
                print(name, file=log)
            turns.started -= seconds
            print("a library's chatter")
            turns.step(case * (2 if name == "rltrain" and case == 15 else 1))
        sys.exit(f"nobody stopped {name}, who holds {len(kept)} bytes")

    return run


def same_loss(case, folder, turns):
    apart, gradient = map(float, os.environ["BENCH_APART"].split())
    turns.say({"loss": apart, "gradient": gradient, "theirs": 0.5})


workers = {"rltrain": trainer("rltrain", 1), "trl": trainer("trl", 64 << 20), "same_loss": same_loss}
make = lambda case, folder, real: (folder / "material").write_text(str(case))
if __name__ == "__main__":
    Bench(Path(__file__).resolve(), "tokens", AMOUNTS, make, workers).main("A bench of nothing.")
"""


def run(folder: Path, *arguments: str, apart: str = "1e-7 1e-6") -> subprocess.CompletedProcess[str]:
    """The bench in a process of its own, beside a TRL of version 9.8.7."""
    (folder / "scripts").mkdir()
    (folder / "scripts" / "bench.py").write_text(BENCH)
    installed = folder / "installed" / "trl-9.8.7.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 9.8.7\n")
    (folder / "log").write_text("")
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPTS),
        "BENCH_LOG": str(folder / "log"),
        "BENCH_APART": apart,
    }
    command = [
        sys.executable,
        str(folder / "scripts" / "bench.py"),
        "--json",
        str(folder / "found.json"),
        "--trl",
        str(installed.parent),
    ]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str], str]:
    """What a whole bench wrote, who stepped when, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text()), (folder / "log").read_text().split(), done.stdout


def test_the_ratios_are_of_medians_over_the_counted_steps(
    measured: tuple[dict[str, Any], list[str], str],
) -> None:
    # 30 tokens in 3 s against 30 in 6 s; in the second case 30 against 15
    record = measured[0]
    assert record["tokens_per_second_ratio"] == {
        "plain": pytest.approx(2.0, rel=0.02),
        "half": pytest.approx(4.0, rel=0.02),
    }
    plain = record["measured"]["plain"]
    assert plain["rltrain"]["per_second"] == pytest.approx(10.0, rel=0.02) and plain["trl"][
        "seconds"
    ] == pytest.approx(6.0, rel=0.02)
    assert "ratio       2.00 of TRL's tokens/s" in measured[2] and "same batch, loss +0.500000" in measured[2]


def test_peaks_are_each_trainer_s_own(measured: tuple[dict[str, Any], list[str], str]) -> None:
    record = measured[0]
    assert record["peak_memory_ratio"].keys() == {"plain", "half"}
    for name, ratio in record["peak_memory_ratio"].items():
        rltrain_peak, trl_peak = (
            record["measured"][name][trainer]["peak_gib"] for trainer in ("rltrain", "trl")
        )
        assert ratio == rltrain_peak / trl_peak
        assert trl_peak - rltrain_peak > 60 / 1024  # the peer holds 64 MiB more


def test_trainers_take_turns_and_who_comes_first_alternates(
    measured: tuple[dict[str, Any], list[str], str],
) -> None:
    log = measured[1]
    assert len(log) == 2 * 2 * 7
    for case in (log[:14], log[14:]):
        assert sorted(case[:2]) == ["rltrain", "trl"]  # they begin at the same time
        assert case[2:] == ["trl", "rltrain", "rltrain", "trl"] * 3


def test_the_record_says_with_what_it_was_made(measured: tuple[dict[str, Any], list[str], str]) -> None:
    record = measured[0]
    assert record.keys() == {
        "tokens_per_second_ratio",
        "peak_memory_ratio",
        "measured",
        "versions",
        "machine",
    }
    assert record["versions"]["trl"] == "9.8.7" and record["versions"].keys() == {
        "trl",
        "torch",
        "transformers",
        "accelerate",
    }
    assert record["machine"]["cpus"] == os.cpu_count()


@pytest.mark.parametrize("apart", ["1e-3 1e-6", "1e-7 1e-2", "nan 1e-6"])
def test_nothing_is_measured_where_the_losses_differ(apart: str, tmp_path: Path) -> None:
    done = run(tmp_path, apart=apart)
    assert (
        done.returncode == 1
        and "bench: plain: the two losses or gradients differ on one batch" in done.stderr
    )
    assert (tmp_path / "log").read_text() == "" and not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--repeats=4", "at least 5"), ("--warmup=0", "at least 1"), ("--repeats=many", "many")],
)
def test_too_few_steps_are_refused(argument: str, message: str, tmp_path: Path) -> None:
    done = run(tmp_path, argument)
    assert done.returncode == 2 and message in done.stderr
    assert (tmp_path / "log").read_text() == ""


def test_more_repeats_are_more_steps_and_one_case_is_enough(tmp_path: Path) -> None:
    done = run(tmp_path, "--repeats=6", "--warmup=1", "--cases=half")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text().split().count("trl") == 7
    assert json.loads((tmp_path / "found.json").read_text())["peak_memory_ratio"].keys() == {"half"}


def test_a_trainer_that_dies_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--repeats=9")  # the fake ones end after eight steps
    assert done.returncode == 1 and "process ended with 1; run again with --verbose to see why" in done.stderr
    assert not (tmp_path / "found.json").exists()


def test_the_bench_of_grpo_has_the_cases_that_its_record_is_read_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    cases = importlib.import_module("bench_step").CASES
    assert cases.keys() == {"short", "skewed", "smollm2", "smollm2_bf16"}


@pytest.mark.parametrize("bench", ["bench_step", "bench_dpo"])
def test_a_real_case_asks_for_its_model(bench: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPTS / f"{bench}.py"),
        "--cases",
        "smollm2",
        "--model",
        str(tmp_path / "no"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "this case needs a model's folder" in done.stderr


def test_dialogues_are_split_where_they_begin_to_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    split = importlib.import_module("bench_dpo").split_dialogues
    asked = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who?\n\nAssistant:"
    rows = [
        {"chosen": f"{asked} I.", "rejected": f"{asked} Nobody."},
        {"chosen": f"{asked} I.", "rejected": "\n\nHuman: Hi\n\nAssistant: Nobody."},
        {"chosen": f"{asked} I.", "rejected": f"{asked} {'Nobody. ' * 100}"},
    ]
    assert split(rows) == [{"prompt": asked, "chosen": " I.", "rejected": " Nobody."}]


class Stepped(Exception):
    """A trainer has taken a step."""


class OneTurn:
    def step(self, amount: int) -> None:
        raise Stepped(amount)


@pytest.mark.parametrize(
    ("bench", "sizes"),
    [
        ("bench_step", {"prompt_tokens": 4, "prompts": 2, "n": 2, "max_tokens": 3}),
        ("bench_dpo", {"pairs": 2, "steps": 1}),
    ],
)
def test_rltrain_takes_a_step_of_it(
    bench: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module, peer = importlib.import_module(bench), importlib.import_module("peer_bench")
    case = module.Case(peer.Size(64, 1, 128), **sizes)
    module.make(case, tmp_path, peer.Real(None, None))
    with pytest.raises(Stepped) as stepped:
        module.run_rltrain(case, tmp_path, OneTurn())
    assert 0 < stepped.value.args[0] <= 12
