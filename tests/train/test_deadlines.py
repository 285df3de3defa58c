"""Nothing hangs quietly: an engine that stops answering, a rank that dies or freezes, rewards that
never come. Real processes.
"""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from rltrain.watchdog import EXPIRED
from support.patience import PATIENCE
from support.warm import Program, own_environment

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "train.steps=4",
    "rollout.prompts=4",
    "rollout.n=2",
    "data.eval=null",
    "loss.terms=[]",
    "reward.workers=1",
)
SLOW_REWARD = """
import time
from rltrain.reward.score import Score

def slow(inputs):
    # the sample before training has one completion
    time.sleep(600 if len(inputs.completions) > {max_completions} else 0)
    return [Score(0.0)] * len(inputs.completions)
"""
REWARD = """
from rltrain.reward.score import Score

def odd(inputs):
    return [Score(sum(ord(letter) % 2 for letter in text) / max(len(text), 1)) for text in inputs.completions]
"""
pytestmark = pytest.mark.slow


def started(
    fault: str,
    model: str,
    folder: Path,
    *overrides: str,
    command: str = "train",
    reward: str = "odd",
    max_completions: int = 1,
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
) -> Program:
    (folder / f"{reward}.py").write_text(
        SLOW_REWARD.format(max_completions=max_completions) if reward == "slow" else REWARD
    )
    settings = [
        f"model.path={model}",
        f"reward.functions=['{folder / reward}.py:{reward}']",
        *SETTINGS,
        *overrides,
    ]
    environment = own_environment() | {"TMPDIR": str(folder)}
    if ranks > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = Path(__file__).with_name("one_rank.py")
    return Program([str(script), command, fault, str(folder / "run"), *settings], environment=environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_engine_that_stops_answering(random_model: str, tmp_path: Path) -> None:
    process = started("engine", random_model, tmp_path, "train.deadline_seconds=3")
    code = process.wait(PATIENCE)
    _, errors = process.printed()
    assert code == EXPIRED, errors[-3000:]
    assert (
        "for the transformers engine: to generate 4 x 2 completions of at most 8 tokens with version 1"
        in errors
    )
    assert "stops_answering" in errors  # the stack of where it hangs


def test_a_reward_pool_that_is_exhausted(random_model: str, tmp_path: Path) -> None:
    settings = ("train.deadline_seconds=4", "reward.seconds=500")
    process = started("none", random_model, tmp_path, *settings, reward="slow")
    code = process.wait(PATIENCE)
    _, errors = process.printed()
    assert code == EXPIRED, errors[-3000:]
    line = next(line for line in errors.splitlines() if line.startswith("deadline: rank 0:"))
    assert "slow" in line and "4" in line  # the reward's name and how many tasks are open
    assert "in _grade" in errors


def test_a_reward_that_never_answers_the_first_sample_ends_the_same_way_and_not_as_the_users_mistake(
    random_model: str, tmp_path: Path
) -> None:
    process = started(
        "none",
        random_model,
        tmp_path,
        "train.deadline_seconds=3",
        "reward.seconds=500",
        reward="slow",
        max_completions=0,
    )
    code = process.wait(PATIENCE)
    _, errors = process.printed()
    assert code == EXPIRED, errors[-3000:]
    assert (
        "rewards were not ready after 3 s" in errors and "slow on prompt" in errors and "in _grade" in errors
    )


def test_an_evaluation_waits_no_longer_than_training(random_model: str, tmp_path: Path) -> None:
    held_out = (
        "train.deadline_seconds=3",
        "data.eval=arithmetic",
        "eval.prompts=4",
        "eval.n=2",
        "eval.k=[1]",
    )
    process = started("mute", random_model, tmp_path, *held_out, command="eval")
    code = process.wait(PATIENCE)
    _, errors = process.printed()
    assert code == EXPIRED, errors[-3000:]
    assert "for the transformers engine: to generate 4 x 2 completions of at most 8 tokens" in errors
    assert "stops_answering" in errors


def test_a_doctor_that_waits_too_long_leaves_nothing_behind(random_model: str, tmp_path: Path) -> None:
    process = started("mute", random_model, tmp_path, "train.deadline_seconds=3", command="doctor")
    code = process.wait(PATIENCE)
    _, errors = process.printed()
    assert code == EXPIRED and "to generate 4 x 2 completions" in errors, errors[-3000:]
    assert not list(tmp_path.glob("rltrain-doctor-*"))


def test_a_doctor_that_is_sent_away_leaves_nothing_behind(random_model: str, tmp_path: Path) -> None:
    process = started("mute", random_model, tmp_path, command="doctor")
    begun = time.monotonic()
    while (
        not list(tmp_path.glob("rltrain-doctor-*/run/recipe.resolved.yaml"))
        and time.monotonic() - begun < PATIENCE
    ):
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code = process.wait(PATIENCE)
    _, errors = process.printed()
    assert code == -signal.SIGTERM, errors[-3000:]
    assert not list(tmp_path.glob("rltrain-doctor-*"))


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_a_rank_that_is_gone_is_named_by_the_others_within_the_deadline(
    fault: str, random_model: str, tmp_path: Path
) -> None:
    deadline, port = 30, free_port()
    ranks = [
        started(
            fault, random_model, tmp_path, f"train.deadline_seconds={deadline}", rank=rank, ranks=2, port=port
        )
        for rank in range(2)
    ]
    try:
        begun = time.monotonic()
        while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() - begun < PATIENCE:
            time.sleep(0.1)  # step 1 is reported; rank 1 goes in step 2
        code = ranks[0].wait(deadline + PATIENCE)
        _, errors = ranks[0].printed()
        assert code == EXPIRED, errors[-3000:]
        assert "rank 1 gave no sign of life" in errors and "Thread 0x" in errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
