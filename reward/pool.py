"""Rewards in killable processes, with limits of time and memory: a grader's failure costs its own completion,
never the run.

A task is one function on one prompt's completions. When a task fails (limit, exception, death), each of its
completions is graded separately, so that only the guilty completion stays ungraded; where scores depend on
one another (scope "group"), the whole group stays ungraded.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rltrain.reward.combine import combine, distinct_labels
from rltrain.reward.output import OutputLog
from rltrain.reward.processes import Loss, ProcessPool
from rltrain.reward.reply import GraderFacts, Reply
from rltrain.reward.resolve import RewardCall
from rltrain.reward.score import RewardInputs, Score
from rltrain.reward.score_checks import ContractError
from rltrain.reward.tasks import GradingWorker, Task
from rltrain.reward.worker import Setup

__all__ = ["RewardCall", "RewardPool"]

_MAX_FAILED_STARTS = 3  # in a row
# of quick grading that a worker receives at once: a round trip costs more than comparing two numbers
_BATCH_SECONDS = 0.01
_ERRORS_KEPT = 32

Results = list[list[list[Score]]]  # [call][group][row]


class RewardPool:
    """Grades prompts' completions with ``calls`` in ``workers`` processes, which start immediately and import
    in the background.

    The first ``check`` or ``score`` waits until a worker is ready. Call ``check`` once before training.
    seconds: of one completion's grading on the wall clock, waits for a CPU not counted (a group graded
    together has as much; if that is too little, each of its completions has it). memory_gib: address space of
    one worker. deadline_seconds: of one whole ``score``; beyond it TimeoutError says what was awaited. What
    graders print goes to the file that ``log_to`` names. Threads may share a pool; one grades at a time.
    """

    def __init__(
        self,
        calls: Sequence[RewardCall],
        *,
        workers: int,
        seconds: float,
        memory_gib: float,
        deadline_seconds: float,
    ) -> None:
        if not calls:
            raise ValueError("a reward pool needs at least one function; name one in reward.functions")
        self._labels = distinct_labels([call.label for call in calls])
        self._weights = [call.weight for call in calls]
        self._seconds = seconds
        self._deadline_seconds = deadline_seconds
        self._counts: collections.Counter[str] = collections.Counter()
        self._errors: collections.deque[tuple[str, str]] = collections.deque(maxlen=_ERRORS_KEPT)
        self._lock = threading.Lock()
        self._slow_calls: set[int] = set()  # whose groups take longer than one completion may
        self._pace: dict[int, float] = {}  # seconds that the latest task of each call took
        self._waiting: collections.deque[Task] = collections.deque()  # for a worker, in this ``score``
        self._graders: tuple[GraderFacts, ...] = ()  # known once a worker is ready
        self._failed_starts = 0

        self._output = OutputLog()
        plain_calls = tuple(dataclasses.replace(call, hp=dict(call.hp)) for call in calls)
        setup = Setup(plain_calls, seconds, int(memory_gib * 2**30), self._output.nonce)
        self._pool: ProcessPool[GradingWorker, Reply] = ProcessPool(
            lambda: GradingWorker(setup, self._output), workers
        )

    @property
    def deadline_seconds(self) -> float:
        return self._deadline_seconds

    @property
    def counts(self) -> Mapping[str, int]:
        """Since the start: ungraded completions by reason ("timeout", "memory", "error", "died", "malformed",
        "nan", "none", or a reason that a grader gives), and "workers_replaced"."""
        return dict(self._counts)

    @property
    def errors(self) -> list[tuple[str, str]]:
        """The latest (reason, message) of completions left ungraded."""
        return list(self._errors)

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        """One Score per completion, groups and completions in the same order.

        Raises ValueError where a grader cannot be loaded, ContractError where one does not return a score per
        completion, TimeoutError after ``deadline_seconds``.
        """
        with self._lock:
            results = self._grade(groups, preflight=False)
        combined = [
            [combine(self._labels, self._weights, list(scores)) for scores in zip(*by_call, strict=True)]
            for by_call in zip(*results, strict=True)
        ]
        for scores in combined:
            self._counts.update(
                score.ungraded.rpartition("/")[2] for score in scores if score.ungraded is not None
            )
        return combined

    def check(self, sample: RewardInputs) -> None:
        """Grades one sample before training. Raises ValueError with the grader's message where it fails,
        gives NaN, or leaves the sample ungraded for a reason outside the completion. A wrong number of scores
        shows from two completions on."""
        with self._lock:
            self._errors.clear()
            self._grade([sample], preflight=True)
            failures = list(self._errors)
        if failures:
            raise ValueError(f"a reward fails on the first sample ({failures[0][0]}): {failures[0][1]}")

    def log_to(self, path: Path) -> None:
        """Keep what graders print at ``path``, under the occasion and the grader, in two files of 8 MiB at
        most."""
        self._output.open(path)

    def close(self) -> None:
        """Ends every worker and what it has started."""
        if not self._pool.is_closed:
            self._pool.close()
            self._output.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _grade(self, groups: Sequence[RewardInputs], *, preflight: bool) -> Results:
        if self._pool.is_closed:
            raise RuntimeError("this reward pool is closed")
        results: Results = [
            [[Score(0.0)] * len(inputs.completions) for inputs in groups] for _ in self._labels
        ]
        self._waiting = collections.deque(self._make_tasks(groups))
        late_groups: set[tuple[int, int]] = set()  # (call, group) whose completions together were late
        deadline = time.monotonic() + self._deadline_seconds
        try:
            while self._waiting or any(worker.tasks for worker in self._pool.workers):
                self._hand_out()
                for task, reply in self._poll():
                    if reply.scores is not None:
                        self._record_scores(task, reply.scores, results)
                    elif reply.reason == "contract":
                        raise ContractError(reply.message)
                    elif (not preflight or reply.reason == "timeout") and self._may_be_innocent(task, reply):
                        self._waiting.extend(task.split())
                        if reply.reason == "timeout":
                            late_groups.add((task.call, task.group))
                    else:
                        self._record_failure(task, reply, results)
                if time.monotonic() > deadline:
                    raise TimeoutError(self._describe_wait())
        finally:
            self._abandon_tasks()

        self._slow_calls |= {
            call
            for call, group in late_groups
            if all(score.ungraded is None for score in results[call][group])
        }
        return results

    def _abandon_tasks(self) -> None:
        """Whatever is still being graded when ``score`` has failed."""
        for worker in list(self._pool.workers):
            if worker.tasks:
                self._replace(worker)

    def _may_be_innocent(self, task: Task, reply: Reply) -> bool:
        """Whether each completion of a failed task deserves an attempt: the fault may be that of another
        completion, or lie outside the process."""
        if task.is_last_attempt or self._graders[task.call].scope == "group":
            return False
        return len(task.rows) > 1 or reply.reason in ("died", "malformed")

    def _make_tasks(self, groups: Sequence[RewardInputs]) -> Iterator[Task]:
        for group, inputs in enumerate(groups):
            plain = dataclasses.replace(inputs, columns=dict(inputs.columns), prompt_ids=())
            for call in range(len(self._labels)):
                task = Task(call, group, tuple(range(len(inputs.completions))), plain)
                yield from task.split() if call in self._slow_calls else [task]

    def _hand_out(self) -> None:
        """Give idle workers the tasks that wait."""
        for worker in list(self._pool.workers):
            if not self._waiting or not worker.is_ready or worker.tasks:
                continue
            batch = self._next_batch()
            if not worker.send_tasks([self._drop_unread_ids(task) for task in batch]):
                self._waiting.extendleft(reversed(batch))
                self._replace(worker)

    def _drop_unread_ids(self, task: Task) -> Task:
        """Without the completions' token ids where its grader does not read them."""
        if self._graders[task.call].reads_ids:
            return task
        return dataclasses.replace(task, inputs=dataclasses.replace(task.inputs, completion_ids=()))

    def _next_batch(self) -> list[Task]:
        """The next task, and as many after it as one worker grades in a moment, within its share of all."""
        share = -(-len(self._waiting) // len(self._pool.workers))
        batch = [self._waiting.popleft()]
        seconds = 0.0
        while len(batch) < share:
            seconds += self._pace.get(batch[-1].call, _BATCH_SECONDS)
            if seconds >= _BATCH_SECONDS:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _poll(self) -> Iterator[tuple[Task, Reply]]:
        """Tasks that have ended by now, waiting a moment for them."""
        for worker, event in self._pool.poll():
            if isinstance(event, Loss):
                yield from self._give_up(worker, event)
            elif not worker.is_ready:
                if event.reason:
                    raise ValueError(event.message)
                worker.is_ready = True
                self._graders = event.graders
                self._failed_starts = 0
            else:
                task, seconds = worker.finish_task()
                self._pace[task.call] = seconds
                if event.reason == "memory":
                    self._replace(worker)  # its heap is full of what the grader left
                yield task, event

    def _give_up(self, worker: GradingWorker, loss: Loss) -> Iterator[tuple[Task, Reply]]:
        """Replaces a lost worker. The task that it was busy with has failed, the others wait again."""
        task = worker.finish_task()[0] if worker.tasks else None
        end = self._replace(worker)
        if task is not None:
            message = f"took more than reward.seconds = {self._seconds:g} s"
            if loss.reason != "timeout":
                message = f"{loss.message} ({end})"
            yield task, Reply(reason=loss.reason, message=message)
        elif not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"reward workers die while they import {', '.join(self._labels)} ({loss.message}: "
                    f"{end}); raise reward.memory_gib or run one by hand"
                )

    def _replace(self, worker: GradingWorker) -> str:
        """A new worker in its place, which has nothing to do yet; how the old worker ended."""
        self._waiting.extendleft(reversed(worker.tasks))
        worker.tasks.clear()
        self._counts["workers_replaced"] += 1
        return self._pool.replace(worker)[1]

    def _record_scores(self, task: Task, scores: list[Score], results: Results) -> None:
        label = self._labels[task.call]
        for row, score, completion in zip(task.rows, scores, task.inputs.completions, strict=True):
            results[task.call][task.group][row] = score
            if score.ungraded == "nan":
                reason = f": {score.why}" if score.why else ""
                message = f"{label} gave NaN or infinity on {completion[:80]!r}{reason}"
                self._errors.append(("nan", message))
            elif score.ungraded is not None and score.why is not None:
                self._errors.append((score.ungraded, f"{label} on {completion[:80]!r}: {score.why}"))

    def _record_failure(self, task: Task, reply: Reply, results: Results) -> None:
        completion = task.inputs.completions[0]
        message = f"{self._labels[task.call]} on {completion[:80]!r}: {reply.message}"
        self._errors.append((reply.reason, message))
        for row in task.rows:
            results[task.call][task.group][row] = Score(0.0, ungraded=reply.reason)

    def _describe_wait(self) -> str:
        workers = self._pool.workers
        running = [
            f"{self._labels[worker.tasks[0].call]} on prompt {worker.tasks[0].inputs.prompt[:60]!r} "
            f"for {worker.elapsed_seconds():.1f} s in process {worker.process.pid}"
            for worker in workers
            if worker.tasks
        ]
        starting = sum(not worker.is_ready for worker in workers)
        behind = len(self._waiting) + sum(len(worker.tasks) - 1 for worker in workers if worker.tasks)
        return (
            f"rewards were not ready after {self._deadline_seconds:g} s: {behind} tasks not begun, "
            f"{starting} workers still starting, running: {'; '.join(running) or 'none'}. "
            "Raise train.deadline_seconds or reward.workers, or make the grader faster"
        )
