"""Tasks of grading, and the processes that carry them out, as the trainer sees them."""

from __future__ import annotations

import collections
import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.reward.output import OutputLog
from rltrain.reward.processes import Child, MalformedAnswerError
from rltrain.reward.received import validate_answer
from rltrain.reward.reply import Reply
from rltrain.reward.score import RewardInputs
from rltrain.reward.worker import Order, Setup


@dataclass(frozen=True)
class Task:
    """One function on some completions of one prompt."""

    call: int
    group: int
    rows: tuple[int, ...]  # which of the group's completions
    inputs: RewardInputs  # of these rows only
    is_last_attempt: bool = False  # a failure is this completion's own

    def split(self) -> list[Task]:
        """One task for each completion."""
        return [
            Task(
                self.call, self.group, (row,), select_completion(self.inputs, position), is_last_attempt=True
            )
            for position, row in enumerate(self.rows)
        ]


def select_completion(inputs: RewardInputs, row: int) -> RewardInputs:
    """The inputs of one completion of a prompt."""
    rows = slice(row, row + 1)
    return dataclasses.replace(
        inputs,
        completions=inputs.completions[rows],
        token_counts=inputs.token_counts[rows],
        finish=inputs.finish[rows],
        episodes=inputs.episodes[rows],
        completion_ids=inputs.completion_ids[rows],
    )


class GradingWorker(Child):
    """One grading process: starting (not ready), idle, or grading the first of ``tasks``."""

    def __init__(self, setup: Setup, output: OutputLog) -> None:
        self.tasks: collections.deque[Task] = collections.deque()
        self._setup = setup
        self._number = secrets.randbelow(1 << 32)  # of the first of ``tasks``
        super().__init__("rltrain.reward.worker", setup, output)

    @property
    def time_limit(self) -> float | None:
        return self._setup.seconds if self.tasks else None

    def send_tasks(self, tasks: Sequence[Task]) -> bool:
        """False where the worker is dead or does not read; then none of ``tasks`` has begun. Only for an idle
        worker: nobody writes to it while it grades, so that neither end waits for the other to read."""
        numbered = enumerate(tasks, start=self._number)
        if not self.send([Order.pack(number, task.call, task.inputs) for number, task in numbered]):
            return False
        self.tasks.extend(tasks)
        self.restart_clock()
        return True

    def read_answer(self) -> Reply | None:
        """The facts of all graders, or why there are none, then replies to the first of ``tasks``."""
        body = self.receive()
        if body is None:
            return None

        reply = validate_answer(Reply, body)
        if not self.is_ready:
            if not reply.reason and len(reply.graders) != len(self._setup.calls):
                raise MalformedAnswerError(
                    f"facts of {len(reply.graders)} graders; there are {len(self._setup.calls)}"
                )
            return reply

        rows = len(self.tasks[0].rows) if self.tasks else None
        is_to_this_task = rows is not None and reply.task == self._number
        is_complete = bool(reply.reason) if reply.scores is None else len(reply.scores) == rows
        if not (is_to_this_task and is_complete):
            raise MalformedAnswerError("it is not to the task in hand, or not of its length")
        return reply

    def finish_task(self) -> tuple[Task, float]:
        """The task in hand, which has been answered, and the seconds it took; the next task begins."""
        seconds = self.elapsed_seconds()
        self._number += 1
        self.restart_clock()
        return self.tasks.popleft(), seconds
