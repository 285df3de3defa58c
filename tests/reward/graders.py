"""Graders that misbehave on a completion that names the misbehaviour, and score any other by its length."""

import contextlib
import os
import pickle
import signal
import socket
import sys
import time

from rltrain.reward.reply import Reply, add_length, encode_reply
from rltrain.reward.score import RewardInputs, Score, reward


def misbehave(completion: str) -> float | str | None:  # noqa: C901  a table
    match completion:
        case "loop":
            while True:
                pass
        case "deaf":  # ignores SIGTERM and sleeps
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        case "grow":
            heap = []
            while True:
                heap.append(bytearray(256 << 20))
        case "raise":
            raise KeyError("no such thing")
        case "sys.exit":
            sys.exit(3)
        case "os._exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nan":
            return float("nan")
        case "infinity":
            return float("-inf")
        case "none":
            return None
        case "string":
            return "1.0"
        case "shout":
            sys.stdout.write("x" * (8 << 20))
            os.write(2, b"y" * (1 << 20))
    return float(len(completion))


def alone(inputs: RewardInputs):
    return [misbehave(completion) for completion in inputs.completions]


def pensive(inputs: RewardInputs):
    time.sleep(0.02)
    return alone(inputs)


@reward("together", scope="group")
def together(inputs: RewardInputs):
    return [misbehave(completion) for completion in inputs.completions]


@reward("pensive_together", scope="group")
def pensive_together(inputs: RewardInputs):
    time.sleep(0.4)
    return alone(inputs)


def one_for_all(inputs: RewardInputs):
    match inputs.completions[0]:
        case "bare":
            return 1.0
        case "nothing":
            return None
    return [1.0]


def vandal(inputs: RewardInputs):
    inputs.columns["answer"] = "999"
    inputs.columns["nested"]["list"].append(2)
    return [0.0] * len(inputs.completions)


def reads(inputs: RewardInputs):
    is_intact = inputs.columns == {"answer": "1", "nested": {"list": [1]}}
    return [float(is_intact)] * len(inputs.completions)


def trl_vandal(completions, answer, nested, **columns):
    answer[:] = ["999"] * len(answer)
    nested[0]["list"].append(2)
    return [0.0] * len(completions)


def trl_reads(completions, answer, nested):
    rewards = [
        float(gold == "1" and item == {"list": [1]}) for gold, item in zip(answer, nested, strict=True)
    ]
    nested[0]["list"].append(2)  # of the first completion only
    return rewards if nested[-1] == {"list": [1]} or len(nested) == 1 else [0.0] * len(completions)


class Executed:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, sentinel: str) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (self.sentinel, "w")


def intruder(inputs: RewardInputs, *, sentinel: str):
    """Writes invalid replies to the socket of its own process."""
    frames = {
        "junk": b"\0\0\0\0\0\0\0\4junk",
        "huge": b"\xff" * 64,
        "json": add_length(b'{"scores": [{"value": NaN}]}'),
        "pickle": add_length(pickle.dumps(Executed(sentinel))),
        "forged": encode_reply(Reply(task=0, scores=[Score(1e6)] * len(inputs.completions))),
        "short": encode_reply(Reply(task=0, scores=[])),
        "empty": add_length(b"{}"),
    }
    for completion in inputs.completions:
        for descriptor in range(3, 64) if completion in frames else ():
            with contextlib.suppress(OSError):
                socket.socket(fileno=os.dup(descriptor)).sendall(frames[completion])
    return [1.0] * len(inputs.completions)


def forks(inputs: RewardInputs, *, log: str = ""):
    """The child lingers, the parent goes on; with "return" the child runs into the worker's own loop."""
    if os.fork() == 0 and "return" not in inputs.completions:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1000)
    if "then loop" in inputs.completions:
        time.sleep(1000)
    return [1.0] * len(inputs.completions)


def daemonises(inputs: RewardInputs, *, log: str = ""):
    """Leaves a process that is outside the worker's session and whose parent has ended; then does as the
    completion says.
    """
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(1000)
        os._exit(0)
    os.wait()
    while not os.path.exists(log) or os.path.getsize(log) == 0:
        time.sleep(0.001)
    return alone(inputs)


def slow(inputs: RewardInputs):
    """0.3 s for each completion."""
    time.sleep(0.3 * len(inputs.completions))
    return [Score(1.0, {"correct": 1.0})] * len(inputs.completions)


def works(inputs: RewardInputs):
    """0.4 s of a CPU."""
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass
    return [1.0] * len(inputs.completions)


def modules(inputs: RewardInputs):
    others = [
        name
        for name in sys.modules
        if name == "torch" or (name.startswith("rltrain.") and not name.startswith("rltrain.reward"))
    ]
    return [float(len(others))] * len(inputs.completions)


def trl_form(completions, prompts, answer, **columns):
    assert prompts == ["p"] * len(completions) and columns["level"] == [2] * len(completions)
    return [1.0 if completion == gold else None for completion, gold in zip(completions, answer, strict=True)]


def scaled(inputs: RewardInputs, *, scale: float):
    return [scale] * len(inputs.completions)


def no_form(first, second):
    return []


NOT_A_FUNCTION = 3
