"""Many episodes in few processes that can be killed: every call has a deadline, and a lost process costs one
episode.

An episode stays in the process it began in. When that one is lost, the episode it was busy with has failed;
the others begin again in a new process, from the texts they have been given so far, which by the promise of
``Environment`` leads to where they were.
"""

from __future__ import annotations

import secrets
import selectors
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from reward.process import Child
from reward.received import MalformedAnswerError, received
from rltrain.rollout.environments import Step, Task
from rltrain.rollout.environments.worker import Answer, EndAll, EnvironmentSetup, Request, Reset, TakeTurn

__all__ = ["EnvironmentPool", "Failure", "Opening"]

_START_SECONDS = 120.0  # to import what an environment needs
_POLL_SECONDS = 0.05


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
    seen: int = 0  # calls that the process in hand has answered: the reset, then one per text
    waits: bool = False  # for an answer to its latest call, which somebody asked for
    failure: Failure | None = None

    @property
    def next(self) -> Reset | TakeTurn:
        return (
            Reset(self.number, self.task, self.seed)
            if self.seen == 0
            else TakeTurn(self.number, self.texts[self.seen - 1])
        )


class _Worker:
    """One process with the episodes that live in it."""

    def __init__(self, setup: EnvironmentSetup) -> None:
        self.child = Child("rltrain.rollout.environments.worker", setup)
        self.episodes: list[_Episode] = []
        self.ready = False
        self.busy: _Episode | EndAll | None = None  # what it has been sent and not answered
        self.ending = False  # it must close its episodes, or is at it
        self._number = 0  # of the latest request

    def ask(self, body: Reset | TakeTurn | EndAll) -> bool:
        """False where the process is gone."""
        self._number = secrets.randbits(32)
        return self.child.send(Request(self._number, body))

    def answer(self) -> Answer | None:
        """What it has answered by now.

        Raises MalformedAnswerError where that is no answer to what it was asked.
        """
        body = self.child.receive()
        if body is None:
            return None
        answer = received(Answer, body)
        if answer.number != self._number or (self.ready and not self._fits(answer)):
            raise MalformedAnswerError("it is not to the latest request")
        return answer

    def _fits(self, answer: Answer) -> bool:
        if self.busy is None:
            return False
        step = isinstance(self.busy, _Episode) and self.busy.seen > 0
        return bool(answer.failure) or (answer.step is not None) == step


class EnvironmentPool:
    """``workers`` processes of one environment, which answer episode by episode.

    seconds, reset_seconds: wall-clock limits of one step and of the start of an episode. Raises ValueError
    from the first call on where the environment cannot be made.
    """

    def __init__(self, setup: EnvironmentSetup, *, workers: int, reset_seconds: float) -> None:
        self._setup, self._reset_seconds = setup, reset_seconds
        self._workers = [_Worker(setup) for _ in range(workers)]
        self._episodes: dict[int, _Episode] = {}
        self._found: dict[int, Answer | Failure] = {}  # answers that nobody has been handed yet
        self._closed = False

    def begin(self, tasks: Sequence[tuple[Task, int]]) -> None:
        """One episode per (task, seed), numbered from 0; each answers with an Opening.

        Earlier ones are over.
        """
        self.end()
        for number, (task, seed) in enumerate(tasks):
            episode = _Episode(number, task, seed, waits=True)
            self._episodes[number] = episode
            self._workers[number % len(self._workers)].episodes.append(episode)

    def step(self, texts: Mapping[int, str]) -> None:
        """Hand each episode the policy's turn; each answers with a Step.

        An episode that failed stays failed.
        """
        for number, text in texts.items():
            self._episodes[number].texts.append(text)
            self._episodes[number].waits = True

    def end(self) -> None:
        """Every episode is over."""
        self._episodes.clear()
        self._found.clear()
        for worker in self._workers:
            worker.ending = worker.ending or (worker.ready and bool(worker.episodes))
            worker.episodes.clear()
        for _ in self.answers():  # nobody waits for one: this returns once the processes have ended theirs
            pass

    def close(self) -> None:
        """Ends every process."""
        if not self._closed:
            self._closed = True
            for worker in self._workers:
                worker.child.kill()

    def answers(self) -> Iterator[tuple[int, Opening | Step | Failure]]:
        """(episode, its answer to its latest call) as they come, until nobody waits.

        Episodes may be stepped in between. Answers that were not taken are there at the next call.
        """
        if self._closed:
            raise RuntimeError("this pool of environments is closed")
        with selectors.DefaultSelector() as selector:
            while True:
                for worker in self._workers:
                    self._hand_out(worker)
                    self._collect_failures(worker)
                if self._found:
                    number = next(iter(self._found))
                    yield number, _outcome(self._found.pop(number))
                    continue  # whoever has the answer may have stepped an episode
                waiting = [
                    worker
                    for worker in self._workers
                    if worker.busy is not None or worker.ending or self._has_work(worker)
                ]
                if not waiting:
                    return
                for worker in waiting:
                    selector.register(worker.child.socket, selectors.EVENT_READ, worker)
                ready = [key.data for key, _ in selector.select(_POLL_SECONDS)]
                for worker in waiting:
                    selector.unregister(worker.child.socket)
                for worker in waiting:
                    self._look_at(worker, worker in ready, self._found)

    def _collect_failures(self, worker: _Worker) -> None:
        """Of episodes that wait for an answer and will not get one."""
        for episode in worker.episodes:
            if episode.waits and episode.failure is not None:
                self._found[episode.number] = episode.failure
                episode.waits = False

    def _has_work(self, worker: _Worker) -> bool:
        return any(one.waits for one in worker.episodes)

    def _hand_out(self, worker: _Worker) -> None:
        """Give an idle worker the next call of an episode that waits."""
        if not worker.ready or worker.busy is not None:
            return
        work = (
            EndAll()
            if worker.ending
            else next((one for one in worker.episodes if one.waits and one.failure is None), None)
        )
        if work is None:
            return
        worker.busy = work
        worker.child.begins()
        if not worker.ask(work if isinstance(work, EndAll) else work.next):
            self._lost(worker, Failure("died", "the process that played it is gone"))

    def _look_at(self, worker: _Worker, spoke: bool, found: dict[int, Answer | Failure]) -> None:
        """Take an answer, or give up on a process that is late, dead, or not the only one to write to
        its socket.
        """
        try:
            self._wait_for(worker, spoke, found)
        except MalformedAnswerError as error:
            message = f"its process sent what is no answer: {error}"
            if not worker.ready:
                raise ValueError(
                    f"rollout.environment {self._name}: {message} ({worker.child.kill()})"
                ) from error
            self._lost(worker, Failure("malformed", message))

    def _wait_for(self, worker: _Worker, spoke: bool, found: dict[int, Answer | Failure]) -> None:
        if spoke and (answer := worker.answer()) is not None:
            self._take(worker, answer, found)
            return
        late = worker.child.is_late(self._allowed(worker))
        if not late and not worker.child.has_died():
            return
        if (answer := worker.answer()) is not None:  # it spoke before we looked
            self._take(worker, answer, found)
        elif not worker.ready:
            what = f"not ready after {_START_SECONDS:g} s" if late else "gone before it was ready"
            raise ValueError(
                f"an environment process of {self._name} is {what} ({worker.child.kill()}); raise "
                "rollout.environment.memory_gib?"
            )
        elif late:
            self._lost(worker, Failure("timeout", f"{self._name} took more than {self._allowed(worker):g} s"))
        else:
            self._lost(worker, Failure("died", "the process that played it is gone"))

    def _allowed(self, worker: _Worker) -> float:
        if not worker.ready:
            return _START_SECONDS
        steps = isinstance(worker.busy, _Episode) and worker.busy.seen > 0
        return self._setup.seconds if steps else self._reset_seconds

    def _take(self, worker: _Worker, answer: Answer, found: dict[int, Answer | Failure]) -> None:
        if not worker.ready:
            if answer.failure:
                raise ValueError(f"rollout.environment {self._name}: {answer.message}")
            worker.ready = True
        elif isinstance(worker.busy, EndAll):
            worker.busy, worker.ending = None, False
            if answer.failure:
                self._lost(
                    worker, Failure("died", answer.message)
                )  # what it holds cannot be let go of: a new process holds nothing
        elif answer.failure == "memory":
            self._lost(
                worker, Failure(answer.failure, answer.message)
            )  # its heap is full of what the environment left
        else:
            episode, worker.busy = worker.busy, None
            assert isinstance(episode, _Episode)
            self._advance(episode, answer, found)

    def _advance(self, episode: _Episode, answer: Answer, found: dict[int, Answer | Failure]) -> None:
        if answer.failure:
            episode.failure = Failure(answer.failure, answer.message)
            return
        episode.seen += 1
        if episode.seen == 1 + len(episode.texts):
            episode.waits = False
            found[episode.number] = answer

    def _lost(self, worker: _Worker, failure: Failure) -> None:
        """A new process in the worker's place. Its episode has failed, the others will begin again there."""
        ended = worker.child.kill()
        if isinstance(worker.busy, _Episode):
            worker.busy.failure = Failure(failure.reason, f"{failure.message} ({ended})")
        fresh = _Worker(self._setup)
        fresh.episodes = worker.episodes
        for one in fresh.episodes:
            one.seen = 0
        self._workers[self._workers.index(worker)] = fresh

    @property
    def _name(self) -> str:
        return self._setup.attribute


def _outcome(answer: Answer | Failure) -> Opening | Step | Failure:
    if isinstance(answer, Failure):
        return answer
    return Opening(answer.opening) if answer.step is None else answer.step
