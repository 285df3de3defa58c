"""Environments in processes: deadlines, crashes, and what becomes of the neighbours."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rltrain.rollout.environments import Step, Task
from rltrain.rollout.environments.pool import EnvironmentPool, Failure, Opening
from rltrain.rollout.environments.worker import EnvironmentSetup
from support.patience import PATIENCE

MINE = str(Path(__file__).parents[2] / "support/environments.py")
Make = Callable[..., EnvironmentPool]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[EnvironmentPool] = []

    def pool(
        module: str = MINE,
        attribute: str = "Counting",
        workers: int = 1,
        seconds: float = 20.0,
        **options: Any,
    ) -> EnvironmentPool:
        setup = EnvironmentSetup(module, attribute, options, seconds, 2**32)
        made.append(EnvironmentPool(setup, workers=workers, reset_seconds=30.0))
        return made[-1]

    yield pool
    for environments in made:
        environments.close()


def tasks(count: int, **columns: Any) -> list[tuple[Task, int]]:
    return [(Task(f"t{number}", "", columns), number) for number in range(count)]


def reset(pool: EnvironmentPool, tasks: list[tuple[Task, int]]) -> list[str | Failure | None]:
    """What each episode asks first."""
    pool.begin(tasks)
    answers = dict(pool.answers())
    assert sorted(answers) == list(range(len(tasks)))
    return [
        answer.text if isinstance(answer := answers[number], Opening) else answer
        for number in range(len(tasks))
    ]  # type: ignore[misc]


def step(pool: EnvironmentPool, texts: dict[int, str]) -> dict[int, Step | Failure]:
    pool.step(texts)
    answers = dict(pool.answers())
    assert answers.keys() == texts.keys()
    return answers  # type: ignore[return-value]


def step_of(answer: Step | Failure) -> Step:
    assert isinstance(answer, Step), answer
    return answer


def test_episodes_keep_their_state_and_seed_whatever_the_number_of_processes(make: Make) -> None:
    pool = make(workers=2)
    assert reset(pool, tasks(5)) == [None] * 5
    step(pool, {0: "a", 3: "x", 4: "p"})
    answers = step(pool, {4: "q", 0: "b"})
    assert {number: step_of(answer).observation for number, answer in answers.items()} == {0: "a b", 4: "p q"}
    assert [step_of(answers[number]).parts["seed"] for number in (0, 4)] == [0.0, 4.0]
    assert step_of(step(pool, {0: "c"})[0]).done


def test_what_an_episode_asks_arrives(make: Make) -> None:
    assert reset(make(), tasks(2, opening="look around")) == ["look around"] * 2


def test_a_late_step_costs_its_episode_only(make: Make) -> None:
    # One process for all: it is killed, and the neighbours begin again from their texts in a new one.
    pool = make(seconds=1.0, process=True)
    reset(pool, tasks(3))
    before = step(pool, {0: "a", 1: "b", 2: "c"})
    started = time.monotonic()
    late = step(pool, {0: "aa", 1: "sleep", 2: "cc"})
    assert time.monotonic() - started < PATIENCE
    assert isinstance(late[1], Failure) and late[1].reason == "timeout" and "1 s" in late[1].message
    assert (step_of(late[0]).observation, step_of(late[2]).observation) == ("a aa", "c cc")
    assert step_of(before[2]).parts["process"] != step_of(late[2]).parts["process"]
    later = step(pool, {0: "x", 1: "y", 2: "z"})
    assert (
        isinstance(later[1], Failure) and step_of(later[0]).observation == "a aa x" and step_of(later[2]).done
    )


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
def test_a_failing_step_says_why_and_leaves_the_others_alone(
    make: Make, text: str, reason: str, message: str
) -> None:
    pool = make()
    reset(pool, tasks(2))
    answers = step(pool, {0: text, 1: "fine"})
    failure = answers[0]
    assert isinstance(failure, Failure) and failure.reason == reason and message in failure.message
    assert step_of(answers[1]).observation == "fine"
    assert step_of(step(pool, {1: "still"})[1]).observation == "fine still"


@pytest.mark.skipif(
    sys.platform != "linux", reason="orphans find their way to the worker's parent on Linux only"
)
@pytest.mark.parametrize("end", ["exit", "sleep", "closed"])
def test_a_daemon_of_an_environment_dies_with_its_process(make: Make, end: str) -> None:
    pool = make(seconds=1.0)
    reset(pool, tasks(1))
    daemon = Path("/proc") / step_of(step(pool, {0: "daemon"})[0]).observation
    assert daemon.exists()
    if end == "closed":
        pool.close()
    else:
        assert isinstance(step(pool, {0: end})[0], Failure)
    assert not daemon.exists()


def kill_with_its_program(supervisor: subprocess.Popen[bytes]) -> None:
    """Returns when the program can no longer answer: it dies a moment after its supervisor."""
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    supervisor.kill()
    deadline = time.monotonic() + PATIENCE
    while any(is_running(Path("/proc", child, "stat")) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_dies_between_two_calls_costs_one_episode(make: Make) -> None:
    pool = make()
    reset(pool, tasks(2))
    kill_with_its_program(pool._pool.workers[0].process)
    answers = step(pool, {0: "a", 1: "b"})
    failure = answers[0]
    assert isinstance(failure, Failure) and failure.reason == "died" and "SIGKILL" in failure.message
    assert step_of(answers[1]).observation == "b"


def test_a_pool_plays_on_after_failures_and_unfinished_episodes(make: Make) -> None:
    pool = make()
    reset(pool, tasks(2))
    step(pool, {0: "raise", 1: "stubborn"})  # this one refuses to be closed
    assert reset(pool, tasks(2)) == [None, None]
    assert step_of(step(pool, {0: "a"})[0]).observation == "a"


def test_an_end_that_takes_its_time_is_not_mistaken_for_an_answer(make: Make) -> None:
    pool = make()
    reset(pool, tasks(1))
    step(pool, {0: "slow to end"})
    reset(pool, tasks(1, opening="again"))
    assert [step_of(step(pool, {0: text})[0]).observation for text in ("a", "b")] == ["a", "a b"]


def test_an_environment_that_cannot_be_made_is_the_user_s_to_mend(make: Make) -> None:
    with pytest.raises(ValueError, match=r"Unmakeable.*no display"):
        reset(make(attribute="Unmakeable"), tasks(1))
    with pytest.raises(ValueError, match="no class 'Countnig'"):
        reset(make(attribute="Countnig"), tasks(1))
    with pytest.raises(ValueError, match="turms"):
        reset(make(turms=3), tasks(1))


def test_a_process_that_ends_before_it_is_ready_is_not_started_again(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "ends.py"
    file.write_text("import os\nos._exit(3)\n")
    with pytest.raises(
        ValueError, match=r"did not start: its process is gone \(exit code 3\); raise .*memory_gib"
    ):
        reset(make(str(file), "Any"), tasks(1))


def test_a_reset_that_fails_is_an_answer(make: Make) -> None:
    pytest.importorskip("textworld", reason="textworld is not installed (pip install rltrain[textworld])")
    [answer] = reset(
        make("rltrain.rollout.environments.text_game", "TextGame"), [(Task("t", "no number"), 0)]
    )
    assert isinstance(answer, Failure) and "game" in answer.message and answer.reason == "error"


def test_no_episodes_are_no_work(make: Make) -> None:
    pool = make("rltrain.rollout.environments.calculator", "Calculator")
    assert reset(pool, []) == [] and step(pool, {}) == {}
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        reset(pool, [])


def test_each_episode_answers_by_itself_and_may_go_on_while_another_takes_its_time(make: Make) -> None:
    pool = make(workers=2, seconds=3.0)
    assert reset(pool, tasks(2)) == [None, None]
    pool.step({0: "sleep", 1: "a"})
    answers: list[tuple[int, Any]] = []
    for number, answer in pool.answers():
        answers.append((number, answer))
        if number == 1 and not step_of(answer).done:
            pool.step({1: "b"})
    # three turns of one episode within the first turn of the other
    assert [number for number, _ in answers] == [1, 1, 1, 0]
    assert step_of(answers[2][1]).observation == "a b b"
    assert isinstance(answers[3][1], Failure) and answers[3][1].reason == "timeout"


def test_answers_that_nobody_has_taken_yet_are_there_later(make: Make) -> None:
    pool = make()
    pool.begin(tasks(3))
    first = next(iter(pool.answers()))
    rest = dict(pool.answers())
    assert {first[0], *rest} == {0, 1, 2} and first[0] not in rest
    pool.begin(tasks(1))
    assert [number for number, _ in pool.answers()] == [0]  # those of episodes that are over are not
