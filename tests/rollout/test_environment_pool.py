"""Environments in processes: deadlines, crashes, and what becomes of the neighbours."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rltrain.rollout.environment_pool import EnvironmentPool, Failure
from rltrain.rollout.environment_worker import EnvironmentSetup
from rltrain.rollout.environments import Step, Task

MINE = str(Path(__file__).with_name("environments_for_tests.py"))
Make = Callable[..., EnvironmentPool]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[EnvironmentPool] = []

    def pool(module: str = MINE, attribute: str = "Counting", workers: int = 1, seconds: float = 20.0, **options: Any) -> EnvironmentPool:
        setup = EnvironmentSetup(module, attribute, options, seconds, 2**32)
        made.append(EnvironmentPool(setup, workers=workers, reset_seconds=30.0))
        return made[-1]

    yield pool
    for one in made:
        one.close()


def tasks(count: int, **columns: Any) -> list[tuple[Task, int]]:
    return [(Task(f"t{number}", "", columns), number) for number in range(count)]


def step_of(answer: Step | Failure) -> Step:
    assert isinstance(answer, Step), answer
    return answer


def test_episodes_keep_their_state_and_seed_whatever_the_number_of_processes(make: Make) -> None:
    pool = make(workers=2)
    assert pool.reset(tasks(5)) == [None] * 5
    pool.step({0: "a", 3: "x", 4: "p"})
    answers = pool.step({4: "q", 0: "b"})
    assert {number: step_of(answer).observation for number, answer in answers.items()} == {0: "a b", 4: "p q"}
    assert [step_of(answers[number]).parts["seed"] for number in (0, 4)] == [0.0, 4.0]
    assert step_of(pool.step({0: "c"})[0]).done


def test_what_an_episode_asks_arrives(make: Make) -> None:
    assert make().reset(tasks(2, opening="look around")) == ["look around"] * 2


def test_a_late_step_costs_its_episode_only(make: Make) -> None:
    # One process for all: it is killed, and the neighbours begin again from their texts in a new one.
    pool = make(seconds=1.0, process=True)
    pool.reset(tasks(3))
    before = pool.step({0: "a", 1: "b", 2: "c"})
    started = time.monotonic()
    late = pool.step({0: "aa", 1: "sleep", 2: "cc"})
    assert time.monotonic() - started < 20
    assert isinstance(late[1], Failure) and late[1].reason == "timeout" and "1 s" in late[1].message
    assert (step_of(late[0]).observation, step_of(late[2]).observation) == ("a aa", "c cc")
    assert step_of(before[2]).parts["process"] != step_of(late[2]).parts["process"]
    later = pool.step({0: "x", 1: "y", 2: "z"})
    assert isinstance(later[1], Failure) and step_of(later[0]).observation == "a aa x" and step_of(later[2]).done


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("raise", "error", "does not want to"),
        ("exit", "died", "exit code 3"),
        ("memory", "memory", "MemoryError"),
        ("nan", "error", "finite"),
        ("nonsense", "error", "not a step"),
        ("beyond float32", "error", "finite"),
        ("beyond floats", "error", "finite"),
        ("endless text", "error", "a text of 20000000 characters; at most 10000000"),
        ("junk", "malformed", "no answer: it begins with b'junk'"),
        ("pickled", "malformed", "no answer: it begins with"),
        ("forged", "malformed", "not to the latest request"),
        ("huge", "malformed", "no answer: it begins with"),
    ],
)
def test_a_failing_step_says_why_and_leaves_the_others_alone(make: Make, text: str, reason: str, message: str) -> None:
    pool = make()
    pool.reset(tasks(2))
    answers = pool.step({0: text, 1: "fine"})
    failure = answers[0]
    assert isinstance(failure, Failure) and failure.reason == reason and message in failure.message
    assert step_of(answers[1]).observation == "fine"
    assert step_of(pool.step({1: "still"})[1]).observation == "fine still"


@pytest.mark.skipif(sys.platform != "linux", reason="orphans find their way to the worker's parent on Linux only")
@pytest.mark.parametrize("end", ["exit", "sleep", "closed"])
def test_a_daemon_of_an_environment_dies_with_its_process(make: Make, end: str) -> None:
    pool = make(seconds=1.0)
    pool.reset(tasks(1))
    daemon = Path("/proc") / step_of(pool.step({0: "daemon"})[0]).observation
    assert daemon.exists()
    if end == "closed":
        pool.close()
    else:
        assert isinstance(pool.step({0: end})[0], Failure)
    assert not daemon.exists()


def test_a_pool_plays_on_after_failures_and_unfinished_episodes(make: Make) -> None:
    pool = make()
    pool.reset(tasks(2))
    pool.step({0: "raise", 1: "stubborn"})  # this one refuses to be closed
    assert pool.reset(tasks(2)) == [None, None]
    assert step_of(pool.step({0: "a"})[0]).observation == "a"


def test_an_end_that_takes_its_time_is_not_mistaken_for_an_answer(make: Make) -> None:
    pool = make()
    pool.reset(tasks(1))
    pool.step({0: "slow to end"})
    pool.reset(tasks(1, opening="again"))
    assert [step_of(pool.step({0: text})[0]).observation for text in ("a", "b")] == ["a", "a b"]


def test_an_environment_that_cannot_be_made_is_the_user_s_to_mend(make: Make) -> None:
    with pytest.raises(ValueError, match=r"Unmakeable.*no display"):
        make(attribute="Unmakeable").reset(tasks(1))
    with pytest.raises(ValueError, match="no class 'Countnig'"):
        make(attribute="Countnig").reset(tasks(1))
    with pytest.raises(ValueError, match="turms"):
        make(turms=3).reset(tasks(1))


def test_a_reset_that_fails_is_an_answer(make: Make) -> None:
    pytest.importorskip("textworld", reason="textworld is not installed (pip install rltrain[textworld])")
    [answer] = make("rltrain.rollout.environments.text_game", "TextGame").reset([(Task("t", "no number"), 0)])
    assert isinstance(answer, Failure) and "game" in answer.message and answer.reason == "error"


def test_no_episodes_are_no_work(make: Make) -> None:
    pool = make("rltrain.rollout.environments.calculator", "Calculator")
    assert pool.reset([]) == [] and pool.step({}) == {}
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.reset([])
