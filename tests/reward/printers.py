"""Graders that print."""

import io
import os
import subprocess
import sys
import time

from rltrain.reward.score import RewardInputs

sys.stdout.write("imported\n")


def chatty(inputs: RewardInputs):
    for completion in inputs.completions:
        sys.stdout.write(f"chatty: {completion}\n")
        if completion == "unfinished":
            sys.stdout.write("no line break")
        if completion == "then hang":
            time.sleep(1000)
        if completion == "echo":
            subprocess.run(["echo", "from a child"], check=True)
        if completion == "shout":
            sys.stdout.write("x" * 1_000_000)
    return [1.0] * len(inputs.completions)


def quiet(inputs: RewardInputs):
    return [1.0] * len(inputs.completions)


def to_stderr(inputs: RewardInputs):
    sys.stderr.write(f"err: {inputs.completions[0]}\n")
    return [1.0] * len(inputs.completions)


def breaks_stdout(inputs: RewardInputs):
    match inputs.completions[0]:
        case "close":
            sys.stdout.close()
        case "replace":
            sys.stdout = io.StringIO()
        case "descriptor":
            os.close(1)
    return [1.0] * len(inputs.completions)
