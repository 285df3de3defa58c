"""Rewards in killable processes, with limits of time and memory: a grader costs its own completion, never the
run.

A task is one function on one prompt's completions. When a task fails (limit, exception, death), each of its
completions is graded alone, so that only the guilty one stays ungraded; where scores depend on one another
(scope "group"), the group does.
"""

from __future__ import annotations

import collections
import dataclasses
import selectors
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from reward.combine import combine, distinct_labels
from reward.output import OutputLog
from reward.process import Task, WorkerProcess
from reward.received import MalformedAnswerError
from reward.reply import GraderFacts, Reply
from reward.resolve import RewardCall
from reward.score import RewardInputs, Score
from reward.score_checks import ContractError
from reward.worker import Setup

__all__ = ["RewardCall", "RewardPool"]

_POLL_SECONDS = 0.05  # a death that the socket does not show (a forked child holds it open) is seen this late
_FAILED_STARTS = 3  # in a row
# of quick grading that a worker is given at once: a round trip costs more than comparing two numbers
_HANDFUL_SECONDS = 0.01
_ERRORS_KEPT = 32

Results = list[list[list[Score]]]  # [call][group][row]


class RewardPool:
    """Grades prompts' completions with ``calls`` in ``workers`` processes. Workers start at once and import
    in the background.

    The first ``check`` or ``score`` waits until a worker is ready. Call ``check`` once before training.
    seconds: of one completion's grading on the wall clock, waits for a CPU not counted (a group graded
    together has as much, then its completions have it one by one). memory_gib: address space of one worker.
    deadline_seconds: of one whole ``score``; beyond it TimeoutError says what was waited for. What graders
    print goes to the file that ``log_to`` names. May be shared by threads; one grades at a time.
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
        self._output = OutputLog()
        plain_calls = tuple(dataclasses.replace(call, hp=dict(call.hp)) for call in calls)
        self._setup = Setup(plain_calls, seconds, int(memory_gib * 2**30), self._output.nonce)
        self._labels = distinct_labels([call.label for call in calls])
        self._weights = [call.weight for call in calls]
        self._seconds, self._deadline_seconds = seconds, deadline_seconds
        self._counts: collections.Counter[str] = collections.Counter()
        self._errors: collections.deque[tuple[str, str]] = collections.deque(maxlen=_ERRORS_KEPT)
        self._lock = threading.Lock()
        self._one_by_one: set[int] = set()  # calls whose groups take longer than one completion may
        self._pace: dict[int, float] = {}  # seconds that the latest task of each call took
        self._waiting: collections.deque[Task] = (
            collections.deque()
        )  # tasks of this ``score`` that no worker has
        self._graders: tuple[GraderFacts, ...] = ()  # known once a worker is ready
        self._failed_starts = 0
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._workers = [self._start() for _ in range(workers)]

    @property
    def counts(self) -> Mapping[str, int]:
        """Since the start: ungraded completions by reason ("timeout", "memory", "error", "died", "malformed",
        "nan", "none", or a grader's own), and "workers_replaced"."""
        return dict(self._counts)

    @property
    def errors(self) -> list[tuple[str, str]]:
        """The latest (reason, message) of completions left ungraded."""
        return list(self._errors)

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        """One Score per completion, groups and completions in the order given.

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
        """Grades one sample before training. Raises ValueError with the grader's own message where it fails,
        gives NaN, or leaves it ungraded for a reason outside the completion. Two completions or more show a
        wrong number of scores."""
        with self._lock:
            self._errors.clear()
            self._grade([sample], preflight=True)
            failures = list(self._errors)
        if failures:
            raise ValueError(f"a reward fails on the first sample ({failures[0][0]}): {failures[0][1]}")

    def log_to(self, path: Path) -> None:
        """Where what graders print is kept, under the occasion and the grader, in two files of 8 MiB
        at most.
        """
        self._output.open(path)

    def close(self) -> None:
        """Ends every worker and what it started."""
        if not self._closed:
            self._closed = True
            for worker in self._workers:
                worker.kill()
            self._selector.close()
            self._output.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _grade(self, groups: Sequence[RewardInputs], *, preflight: bool) -> Results:
        if self._closed:
            raise RuntimeError("this reward pool is closed")
        results: Results = [
            [[Score(0.0)] * len(inputs.completions) for inputs in groups] for _ in self._labels
        ]
        self._waiting = collections.deque(self._tasks(groups))
        slow: set[tuple[int, int]] = set()  # (call, group) that ran out of time together
        deadline = time.monotonic() + self._deadline_seconds
        try:
            while self._waiting or any(worker.tasks for worker in self._workers):
                self._hand_out()
                for task, reply in self._finished():
                    if reply.scores is not None:
                        self._keep(task, reply.scores, results)
                    elif reply.reason == "contract":
                        raise ContractError(reply.message)
                    elif (not preflight or reply.reason == "timeout") and self._may_be_innocent(task, reply):
                        self._waiting.extend(task.split())
                        slow |= {(task.call, task.group)} if reply.reason == "timeout" else set()
                    else:
                        self._fail(task, reply, results)
                if time.monotonic() > deadline:
                    raise TimeoutError(self._waited_for())
        finally:
            for worker in list(self._workers):
                if worker.tasks:
                    self._replace(worker)
        self._one_by_one |= {
            call for call, group in slow if all(score.ungraded is None for score in results[call][group])
        }
        return results

    def _may_be_innocent(self, task: Task, reply: Reply) -> bool:
        """Whether completions of a failed task deserve an attempt each: the fault is another's, or
        whoever killed the process.
        """
        if task.alone or self._graders[task.call].scope == "group":
            return False
        return len(task.rows) > 1 or reply.reason in ("died", "malformed")

    def _tasks(self, groups: Sequence[RewardInputs]) -> Iterator[Task]:
        for group, inputs in enumerate(groups):
            plain = dataclasses.replace(inputs, columns=dict(inputs.columns), prompt_ids=())
            for call in range(len(self._labels)):
                task = Task(call, group, tuple(range(len(inputs.completions))), plain)
                yield from task.split() if call in self._one_by_one else [task]

    def _hand_out(self) -> None:
        for worker in list(self._workers):
            if not self._waiting or not worker.ready or worker.tasks:
                continue
            handful = self._handful()
            if not worker.take([self._lightened(task) for task in handful]):
                self._waiting.extendleft(reversed(handful))
                self._replace(worker)

    def _lightened(self, task: Task) -> Task:
        """Without token ids where its grader does not read them."""
        if self._graders[task.call].reads_ids:
            return task
        return dataclasses.replace(task, inputs=dataclasses.replace(task.inputs, completion_ids=()))

    def _handful(self) -> list[Task]:
        """The next task, and as many after it as one worker grades in a moment, if there are more
        than one for every worker.
        """
        share, seconds = -(-len(self._waiting) // len(self._workers)), 0.0
        handful = [self._waiting.popleft()]
        while len(handful) < share:
            seconds += self._pace.get(handful[-1].call, _HANDFUL_SECONDS)
            if seconds >= _HANDFUL_SECONDS:
                break
            handful.append(self._waiting.popleft())
        return handful

    def _finished(self) -> Iterator[tuple[Task, Reply]]:
        """What is done by now, waiting a moment for it; replaces workers that are over their limits
        or dead.
        """
        for key, _ in self._selector.select(_POLL_SECONDS):
            yield from self._replied(key.data)
        for worker in list(self._workers):
            late = bool(worker.tasks) and worker.is_late(self._seconds)
            if not late and not worker.has_died():
                continue
            before = len(worker.tasks)
            yield from self._replied(worker)  # it may have finished before we looked
            if worker not in self._workers or (late and len(worker.tasks) < before):
                continue
            task = worker.done()[0] if worker.tasks else None
            end = self._replace(worker)
            if late and task is not None:
                yield (
                    task,
                    Reply(reason="timeout", message=f"took more than reward.seconds = {self._seconds:g} s"),
                )
            elif task is not None:
                yield task, Reply(reason="died", message=f"the process that ran it is gone ({end})")
            else:
                self._count_failed_start(worker, end)

    def _replied(self, worker: WorkerProcess) -> Iterator[tuple[Task, Reply]]:
        """Everything that ``worker`` has said by now."""
        try:
            while (reply := worker.reply()) is not None:
                if not worker.ready:
                    self._take_in(worker, reply)
                    continue
                task, self._pace[task.call] = worker.done()
                if reply.reason == "memory":
                    self._replace(worker)  # its heap is full of what the grader left
                yield task, reply
                if worker not in self._workers:
                    return
        except MalformedAnswerError as error:
            yield from self._distrusted(worker, error)

    def _take_in(self, worker: WorkerProcess, reply: Reply) -> None:
        """The first reply of a worker: it is ready, or says why it never will be."""
        if reply.reason:
            raise ValueError(reply.message)
        if len(reply.graders) != len(self._labels):
            raise MalformedAnswerError(
                f"facts of {len(reply.graders)} graders; there are {len(self._labels)}"
            )
        worker.ready, self._graders, self._failed_starts = True, reply.graders, 0

    def _distrusted(self, worker: WorkerProcess, error: MalformedAnswerError) -> Iterator[tuple[Task, Reply]]:
        """Ends a worker to whose socket somebody else has written."""
        task = worker.done()[0] if worker.tasks else None
        self._replace(worker)
        if task is not None:
            yield (
                task,
                Reply(reason="malformed", message=f"its process sent what is no answer to it: {error}"),
            )
        elif not worker.ready:
            self._count_failed_start(worker, f"what it sent first is no answer: {error}")

    def _keep(self, task: Task, scores: list[Score], results: Results) -> None:
        for row, score, completion in zip(task.rows, scores, task.inputs.completions, strict=True):
            results[task.call][task.group][row] = score
            if score.ungraded == "nan":
                what = f": {score.why}" if score.why else ""
                self._errors.append(
                    ("nan", f"{self._labels[task.call]} gave NaN or infinity on {completion[:80]!r}{what}")
                )
            elif score.ungraded is not None and score.why is not None:
                self._errors.append(
                    (score.ungraded, f"{self._labels[task.call]} on {completion[:80]!r}: {score.why}")
                )

    def _fail(self, task: Task, reply: Reply, results: Results) -> None:
        self._errors.append(
            (
                reply.reason,
                f"{self._labels[task.call]} on {task.inputs.completions[0][:80]!r}: {reply.message}",
            )
        )
        for row in task.rows:
            results[task.call][task.group][row] = Score(0.0, ungraded=reply.reason)

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._setup, self._output)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _replace(self, worker: WorkerProcess) -> str:
        """A new worker in its place; how the old one ended. What it had not done waits again."""
        self._waiting.extendleft(reversed(worker.tasks))
        worker.tasks.clear()
        self._selector.unregister(worker.socket)
        end = worker.kill()
        self._workers[self._workers.index(worker)] = self._start()
        self._counts["workers_replaced"] += 1
        return end

    def _count_failed_start(self, worker: WorkerProcess, end: str) -> None:
        self._failed_starts += not worker.ready
        if self._failed_starts >= _FAILED_STARTS:
            raise RuntimeError(
                f"reward workers die while they import {', '.join(self._labels)} ({end}); raise "
                "reward.memory_gib or run one by hand"
            )

    def _waited_for(self) -> str:
        busy = [
            f"{self._labels[worker.tasks[0].call]} on prompt {worker.tasks[0].inputs.prompt[:60]!r} "
            f"for {worker.seconds():.1f} s in process {worker.process.pid}"
            for worker in self._workers
            if worker.tasks
        ]
        starting = sum(not worker.ready for worker in self._workers)
        behind = len(self._waiting) + sum(len(worker.tasks) - 1 for worker in self._workers if worker.tasks)
        return (
            f"rewards were not ready after {self._deadline_seconds:g} s: {behind} tasks not begun, "
            f"{starting} workers still starting, running: {'; '.join(busy) or 'none'}. "
            "Raise train.deadline_seconds or reward.workers, or make the grader faster"
        )
