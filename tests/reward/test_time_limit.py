"""The limit of one comparison: CPU time, which what else the machine does cannot use up."""

import contextlib
import signal
import time

import pytest

from rltrain.reward.math_answer import math_answer
from rltrain.reward.score import RewardInputs
from rltrain.reward.time_limit import TimeUp, cpu_time_limit
from support.patience import PATIENCE


def work(seconds: float) -> None:
    """Uses the processor for so long."""
    started = time.process_time()
    while time.process_time() - started < seconds:
        pass


def test_work_is_limited_and_waiting_is_not():
    with cpu_time_limit(0.05):
        time.sleep(0.3)  # as a process does that others keep from its processor
    with pytest.raises(TimeUp), cpu_time_limit(0.05):
        work(600)


def test_the_wall_clock_is_the_backstop():
    with pytest.raises(TimeUp), cpu_time_limit(5, wall_clock_seconds=0.05):
        time.sleep(600)
    started = time.monotonic()
    with pytest.raises(TimeUp), cpu_time_limit(0.01):  # 20 times as many seconds
        time.sleep(600)
    assert 0.15 < time.monotonic() - started < PATIENCE


def test_a_verdict_does_not_change_while_the_process_waits(monkeypatch: pytest.MonkeyPatch):
    from rltrain.reward import math_answer as grader

    equal = grader._are_equal
    monkeypatch.setattr(grader, "_are_equal", lambda gold, answer: time.sleep(0.4) or equal(gold, answer))
    inputs = RewardInputs("p", ("\\boxed{1 + z + y}",), (1,), ("stop",), {"answer": "y+z+1"})
    assert math_answer(inputs, seconds=0.3)[0].parts == {"correct": 1.0}


def test_a_time_limit_that_is_swallowed_once_comes_again():
    # Python ignores what a destructor raises, and a bare except takes everything: the first alarm may be lost
    # in either.
    started = time.monotonic()
    with pytest.raises(TimeUp), cpu_time_limit(0.05):
        with contextlib.suppress(BaseException):
            work(600)
        work(600)
    assert time.monotonic() - started < PATIENCE


def test_timers_that_were_set_before_go_on():
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        with cpu_time_limit(1):
            time.sleep(0.02)
        assert 0.05 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.15
        assert signal.getitimer(signal.ITIMER_PROF)[0] == 0
        time.sleep(0.3)
        assert heard == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
