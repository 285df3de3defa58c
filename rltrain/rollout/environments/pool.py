"""Many episodes in few processes that can be killed: every call has a deadline, and a lost process costs one
episode.

An episode stays in the process in which it began. When that process is lost, the episode that it was busy
with has failed; its other episodes begin again in a new process, from the texts that they have received so
far, which by the promise of ``Environment`` leads to where they were.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rltrain.reward.processes import Child, Loss, MalformedAnswerError, ProcessPool
from rltrain.reward.received import validate_answer
from rltrain.rollout.environments import Step, Task
from rltrain.rollout.environments.worker import Answer, EndAll, EnvironmentSetup, Request, Reset, TakeTurn

__all__ = ["EnvironmentPool", "Failure", "Opening"]

_START_SECONDS = 120.0  # to import what an environment needs


@dataclass(frozen=True)
class Opening:
    """An episode has begun. ``text``: what it asks the policy first; None: the task's own prompt."""

    text: str | None


@dataclass(frozen=True)
class Failure:
    """Why an episode has no outcome. ``reason`` is counted ("timeout", "error", "died", "memory",
    "malformed"), ``message`` is for people.
    """

    reason: str
    message: str


@dataclass
class _Episode:
    number: int
    task: Task
    seed: int
    texts: list[str] = field(default_factory=list)  # the policy's turns
    answered_calls: int = 0  # by its present process: the reset, then one call per text
    is_waiting: bool = False  # for an answer to its latest call, which has not been handed out
    failure: Failure | None = None

    @property
    def next_call(self) -> Reset | TakeTurn:
        if self.answered_calls == 0:
            return Reset(self.number, self.task, self.seed)
        return TakeTurn(self.number, self.texts[self.answered_calls - 1])


class _Worker(Child):
    """One process with the episodes that live in it."""

    def __init__(self, setup: EnvironmentSetup, reset_seconds: float) -> None:
        self.episodes: list[_Episode] = []
        self.busy: _Episode | EndAll | None = None  # with a call that it has not answered
        self.must_end_all = False  # it has to close its episodes, or is closing them
        self._setup = setup
        self._reset_seconds = reset_seconds
        self._number = 0  # of the latest request
        super().__init__("rltrain.rollout.environments.worker", setup)

    @property
    def is_awaited(self) -> bool:
        is_starting = not self.is_ready and any(episode.is_waiting for episode in self.episodes)
        return self.busy is not None or is_starting

    @property
    def time_limit(self) -> float:
        if not self.is_ready:
            return _START_SECONDS
        return self._setup.seconds if self._takes_turn else self._reset_seconds

    @property
    def _takes_turn(self) -> bool:
        return isinstance(self.busy, _Episode) and self.busy.answered_calls > 0

    def send_call(self, work: _Episode | EndAll) -> bool:
        """False where the process is gone."""
        self.busy = work
        self.restart_clock()
        self._number = secrets.randbits(32)
        return self.send(Request(self._number, work if isinstance(work, EndAll) else work.next_call))

    def read_answer(self) -> Answer | None:
        body = self.receive()
        if body is None:
            return None
        answer = validate_answer(Answer, body)
        fits = not self.is_ready or bool(answer.failure) or (answer.step is not None) == self._takes_turn
        if answer.number != self._number or not fits:
            raise MalformedAnswerError("it is not to the latest request")
        return answer


class EnvironmentPool:
    """``workers`` processes of one environment, which answer episode by episode.

    seconds, reset_seconds: wall-clock limits of one step and of the start of an episode. Raises ValueError
    from the first call on where the environment cannot be made.
    """

    def __init__(self, setup: EnvironmentSetup, *, workers: int, reset_seconds: float) -> None:
        self._name = setup.attribute
        self._pool: ProcessPool[_Worker, Answer] = ProcessPool(lambda: _Worker(setup, reset_seconds), workers)
        self._episodes: dict[int, _Episode] = {}
        self._answers: dict[int, Opening | Step | Failure] = {}  # by episode, not yet handed out

    def begin(self, tasks: Sequence[tuple[Task, int]]) -> None:
        """One episode per (task, seed), numbered from 0; each answers with an Opening.

        Earlier episodes are over.
        """
        self.end()
        for number, (task, seed) in enumerate(tasks):
            episode = _Episode(number, task, seed, is_waiting=True)
            self._episodes[number] = episode
            self._pool.workers[number % len(self._pool.workers)].episodes.append(episode)

    def step(self, texts: Mapping[int, str]) -> None:
        """Hand each episode the policy's turn; each answers with a Step.

        An episode that failed stays failed.
        """
        for number, text in texts.items():
            self._episodes[number].texts.append(text)
            self._episodes[number].is_waiting = True

    def end(self) -> None:
        """Every episode is over."""
        self._episodes.clear()
        self._answers.clear()
        for worker in self._pool.workers:
            worker.must_end_all = worker.must_end_all or (worker.is_ready and bool(worker.episodes))
            worker.episodes.clear()
        for _ in self.answers():  # no episode waits: returns once the processes have ended theirs
            pass

    def close(self) -> None:
        """Ends every process."""
        self._pool.close()

    def answers(self) -> Iterator[tuple[int, Opening | Step | Failure]]:
        """(episode, its answer to its latest call) as the answers arrive, until no episode waits.

        Episodes may be stepped in between. Answers that were not taken are there at the next call.
        """
        if self._pool.is_closed:
            raise RuntimeError("this pool of environments is closed")
        while True:
            for worker in list(self._pool.workers):
                self._hand_out(worker)
                self._collect_failures(worker)
            if self._answers:
                number = next(iter(self._answers))
                yield number, self._answers.pop(number)
                continue  # the caller may have stepped an episode
            if not any(worker.is_awaited for worker in self._pool.workers):
                return
            for worker, event in self._pool.poll():
                if isinstance(event, Loss):
                    self._give_up(worker, event)
                else:
                    self._accept(worker, event)

    def _hand_out(self, worker: _Worker) -> None:
        """Give an idle worker the next call of an episode that waits."""
        if not worker.is_ready or worker.busy is not None:
            return
        waiting = (episode for episode in worker.episodes if episode.is_waiting and episode.failure is None)
        work = EndAll() if worker.must_end_all else next(waiting, None)
        if work is not None and not worker.send_call(work):
            self._give_up(worker, Loss("died", "its process is gone"))

    def _collect_failures(self, worker: _Worker) -> None:
        """Answer for episodes that wait and have failed."""
        for episode in worker.episodes:
            if episode.is_waiting and episode.failure is not None:
                self._answers[episode.number] = episode.failure
                episode.is_waiting = False

    def _accept(self, worker: _Worker, answer: Answer) -> None:
        if not worker.is_ready:
            if answer.failure:
                raise ValueError(f"rollout.environment {self._name}: {answer.message}")
            worker.is_ready = True
        elif answer.failure == "memory":
            self._give_up(worker, Loss(answer.failure, answer.message))  # the environment has filled its heap
        elif isinstance(worker.busy, _Episode):
            self._advance(worker.busy, answer)
            worker.busy = None
        elif answer.failure:
            self._give_up(worker, Loss("died", answer.message))  # a new process has no episodes to close
        else:
            worker.busy = None
            worker.must_end_all = False

    def _advance(self, episode: _Episode, answer: Answer) -> None:
        if answer.failure:
            episode.failure = Failure(answer.failure, answer.message)
            return
        episode.answered_calls += 1
        if episode.answered_calls == 1 + len(episode.texts):
            episode.is_waiting = False
            self._answers[episode.number] = Opening(answer.opening) if answer.step is None else answer.step

    def _give_up(self, worker: _Worker, loss: Loss) -> None:
        """Replaces a lost worker. The episode that it was busy with has failed, the others will begin again
        in the new process. Raises ValueError where the worker has not even started."""
        successor, end = self._pool.replace(worker)
        successor.episodes = worker.episodes
        for episode in successor.episodes:
            episode.answered_calls = 0
        if not worker.is_ready:
            raise ValueError(
                f"rollout.environment {self._name}: a process did not start: {loss.message} ({end}); raise "
                "rollout.environment.memory_gib?"
            )
        if isinstance(worker.busy, _Episode):
            worker.busy.failure = Failure(loss.reason, f"{self._name}: {loss.message} ({end})")
