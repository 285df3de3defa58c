"""The pool: which worker samples what, and what becomes of it when the worker is lost.

A sample's seed depends on the run, the step, the prompt and its number, never on the worker or the attempt.
So a sample that was lost with its worker is sampled again by another with the same result, and neither the
number of workers nor their speed changes what a run trains on. Everything here runs in one event loop, and
nothing takes a lock. Imports no torch.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rltrain.errors import UserError
from rltrain.protocols import WorkersGone
from rltrain.rollout.pool.members import Home, Lease, Member, MemberState, Part
from rltrain.rollout.worker.answers import GarbageAnswer, GenerateRequest
from rltrain.rollout.worker.client import WorkerBusy, WorkerLost, WorkerRefused
from rltrain.rollout.worker.guard import Choice
from rltrain.rollout.worker.threads import call_in_thread
from rltrain.timeline import Timeline
from rltrain.types.samples import PolicyVersion

__all__ = ["ADMIT", "ALIVE_STATES", "Batch", "Counts", "PoolRules", "WorkerPool"]

NOWHERE = Timeline(None)
ADMIT = "admit"  # put into a batch's arrivals when a worker waits for weights

_STRIKES = 3  # garbage answers, after which a worker is quarantined
_FORGIVEN = 1000  # sound answers in a row, after which strikes are forgotten
_LOSSES = 10  # workers lost while they sampled one part, after which the part itself is suspected
_MISSES = 2  # calls in a row without a sign of life, after which a worker is lost
_SMALLEST_PART = 2  # samples: a batch of one row takes other kernels, which round otherwise
_OPEN_ERRORS = (WorkerLost, WorkerBusy, WorkerRefused, GarbageAnswer, UserError, OSError)
ALIVE_STATES = (MemberState.ATTACHED, MemberState.LOADING, MemberState.SERVING)


@dataclass(frozen=True)
class PoolRules:
    """Seconds. patience: without a worker that serves, while something is to be sampled. alive: between two
    signs of life; with the client's own deadline of the call, twice their sum is the longest that a worker
    which hangs goes unnoticed. poll: between looks at local processes. retry: before a lost worker is asked
    again, doubled every time up to ``retry_longest``. busy: of rest for a worker that does not serve now.

    update: what becomes of requests under way when a push begins. refuse: it is an error; drain: they are
    finished first; abort: they are asked for again, from their first token; in_flight: they go on with the
    new weights.
    """

    vocabulary: int
    patience: float = 300.0
    alive: float = 1.0
    poll: float = 0.1
    retry: float = 0.5
    retry_longest: float = 30.0
    busy: float = 0.5
    update: Literal["refuse", "drain", "abort", "in_flight"] = "refuse"


@dataclass
class Counts:
    """Requests to workers since the start: ``asked`` = ``answered`` + ``returned`` + those under way.

    returned: whose worker was lost, was busy or answered garbage; their samples were asked for again.
    """

    asked: int = 0
    answered: int = 0
    returned: int = 0
    refused: int = 0  # garbage answers, among those returned
    lost: int = 0  # workers
    restarts: int = 0  # workers that came back


@dataclass
class Batch:
    """The groups of one call, until every sample is there.

    put: receives ``(group, choices)`` when a group is whole, ADMIT, or the error that ended the batch.
    started: the version of the worker that was asked first, of what is still wanted.
    """

    put: Callable[[Any], None]
    sizes: Sequence[int]
    choices: list[list[Choice | None]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    open_groups: int = 0
    is_ended: bool = False
    started: PolicyVersion | None = None

    def __post_init__(self) -> None:
        self.choices = [[None] * size for size in self.sizes]
        self.missing = list(self.sizes)
        self.open_groups = len(self.sizes)

    def take(self, part: Part, choices: Sequence[Choice]) -> None:
        """Keeps a part's samples. Raises RuntimeError for a sample that is there already."""
        held = self.choices[part.group]
        for place, choice in enumerate(choices, start=part.first):
            if held[place] is not None:
                raise RuntimeError(f"sample {place} of prompt {part.prompt!r} arrived twice")
            held[place] = choice
        self.missing[part.group] -= len(choices)
        if self.missing[part.group] == 0:
            self.open_groups -= 1
            self.choices[part.group] = []
            self.put((part.group, held))
        self.is_ended = self.is_ended or self.open_groups == 0

    def restart(self) -> None:
        """Called when samples are given back: without any that is there, nothing is of an older version."""
        if self.missing == list(self.sizes):
            self.started = None

    def fail(self, error: BaseException) -> None:
        if not self.is_ended:
            self.is_ended = True
            self.put(error)


class WorkerPool:
    """homes: where its workers come from, by name. say: receives a line about a worker that comes or goes.
    timeline: gets when workers sample, and when pushes are.
    """

    def __init__(
        self,
        homes: Mapping[str, Home],
        rules: PoolRules,
        say: Callable[[str], None] = warnings.warn,
        timeline: Timeline = NOWHERE,
    ) -> None:
        self.members = {name: Member(name, home) for name, home in homes.items()}
        self.counts = Counts()
        self.rules = rules
        self._say = say
        self._timeline = timeline
        self._noted = Counts()  # at the last ``notes``
        self._most_tokens = 0.0  # outstanding, since then
        self._push_began: tuple[float, tuple[str, ...]] = (0.0, ())
        self._queue: deque[Part] = deque()
        self._batches: list[Batch] = []
        self._lengths: dict[str, float] = {}  # mean tokens of a prompt's samples when it was last sampled
        self._session = secrets.token_hex(4)  # a learner that starts again repeats no request's id
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle_since: float | None = None
        self._is_draining = False  # a push waits until nothing is sampled any more
        self._lease_ended = asyncio.Event()

    # life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to open every worker; ``wait_for_workers`` waits."""
        for member in self.members.values():
            self._start(self._keep(member))
        self._start(self._mind())

    async def add(self, name: str, home: Home) -> None:
        """A worker that joins while the run goes on; one of this name that is there stays."""
        if name not in self.members:
            self.members[name] = Member(name, home)
            self._start(self._keep(self.members[name]))

    async def wait_for_workers(self, seconds: float) -> None:
        """Returns when every worker is attached or has failed once, and one at least is attached.

        Raises UserError where local workers have all failed, and where no worker came in time.
        """
        until = time.monotonic() + seconds
        while True:
            attached = self.find_members(*ALIVE_STATES)
            waiting = [m for m in self.members.values() if m.state is MemberState.STARTING and not m.reason]
            if attached and not waiting:
                return
            is_hopeless = bool(self.members) and not waiting and self._are_all_local()
            is_late = time.monotonic() > until and not self._is_local_one_starting()
            if not attached and (is_hopeless or is_late):
                raise UserError(f"no worker can be used: {self._reasons()}")
            await asyncio.sleep(self.rules.poll)

    async def close(self) -> None:
        """Ends local workers; any other goes on."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for batch in self._batches:
            batch.fail(RuntimeError("the pool was closed"))
        members = list(self.members.values())
        await asyncio.gather(*(self._disconnect(member) for member in members))
        await asyncio.gather(*(call_in_thread(member.home.close) for member in members))

    def holders(self) -> list[Member]:
        """Those that requests are sent to."""
        return list(self.members.values())

    def find_members(self, *states: MemberState) -> list[Member]:
        """The workers in one of these states, in the order of their names."""
        members = [member for member in self.members.values() if member.state in states]
        return sorted(members, key=lambda member: member.name)

    async def use_timeline(self, timeline: Timeline) -> None:
        """From now on it gets when workers sample."""
        self._timeline = timeline

    async def notes(self) -> dict[str, float]:
        """Numbers since the last call, as metrics."""
        before = self._noted
        self._noted = replace(self.counts)
        outstanding = self._most_tokens
        self._most_tokens = 0.0
        now = self.counts
        return {
            "pool/workers": float(len(self.find_members(MemberState.SERVING))),
            "pool/outstanding_tokens": outstanding,
            "pool/strikes": float(now.refused - before.refused),
            "pool/redispatched": float(now.returned - before.returned),
            "pool/restarts": float(now.restarts - before.restarts),
            "pool/lost": float(now.lost - before.lost),
        }

    # weights ------------------------------------------------------------------------------------------------

    async def begin_push(
        self, *, waiting_only: bool = False, version: PolicyVersion | None = None
    ) -> dict[str, Any]:
        """The clients, by name, of the workers that a push of ``version`` goes to; they are asked for nothing
        until it ends.

        waiting_only: those that hold no version, while the others go on sampling. Raises RuntimeError where
        one of them still samples, unless ``rules.update`` says what becomes of that.
        """
        states = (MemberState.ATTACHED,) if waiting_only else (MemberState.ATTACHED, MemberState.SERVING)
        if not waiting_only:
            await self._prepare_update(str(version))
        chosen = self.find_members(*states)
        samplers = chosen if waiting_only else self.holders()
        busy = [member.name for member in samplers if member.leases]
        if busy and (waiting_only or self.rules.update != "in_flight"):
            raise RuntimeError(f"a push begins while {', '.join(busy)} still samples")
        for member in chosen:
            member.state = MemberState.LOADING
            member.version = None
        self._push_began = time.time(), tuple(member.name for member in chosen)
        return {member.name: member.client for member in chosen}

    async def _prepare_update(self, label: str) -> None:
        """Does with the requests under way what ``rules.update`` says. label: of the weights that come."""
        if self.rules.update == "drain":
            self._is_draining = True
            while any(member.leases for member in self.holders()):
                self._lease_ended.clear()
                await self._lease_ended.wait()
            self._is_draining = False  # from now on the workers are being loaded, which keeps them idle
        leases = [(lease, member) for member in self.holders() for lease in member.leases.values()]
        for lease, member in reversed(leases):  # the first that was asked for is the first in the queue
            if self.rules.update == "in_flight":
                lease.labels.add(label)
            if self.rules.update == "abort":
                self._return(lease, member)
                if lease.task is not None:
                    lease.task.cancel()

    async def end_push(
        self,
        version: PolicyVersion,
        served: Collection[str],
        lost: Mapping[str, Exception],
        quarantined: Mapping[str, Exception],
    ) -> None:
        """served: proved to hold ``version``, and resumed."""
        began, names = self._push_began
        if names:
            self._timeline.add("pushes", "push", began, version=version, workers=names)
        for name, error in quarantined.items():
            self._quarantine(self.members[name], str(error))
        for name, error in lost.items():
            self._lose(self.members[name], f"the push of version {version} failed: {error}")
        for name in served:
            member = self.members[name]
            if member.state is MemberState.LOADING:  # it may have died since
                member.version = version
                member.state = MemberState.SERVING
        self._dispatch()

    async def serving(self) -> dict[str, Any]:
        """The clients, by name, of the workers that serve."""
        return {member.name: member.client for member in self.find_members(MemberState.SERVING)}

    async def waits_for_weights(self) -> bool:
        """Whether a worker has come that holds no version."""
        return bool(self.find_members(MemberState.ATTACHED))

    async def lose(self, errors: Mapping[str, Exception]) -> None:
        """Workers that failed a call of somebody else's."""
        for name, error in errors.items():
            self._lose(self.members[name], str(error))

    # samples ------------------------------------------------------------------------------------------------

    async def submit(
        self,
        asked: Sequence[tuple[str, GenerateRequest]],
        policy: PolicyVersion | None,
        put: Callable[[Any], None],
    ) -> Batch:
        """Asks for every group (prompt id, request), in this order; ``put`` receives them whole.

        policy: whose samples they are. None: each token is drawn by the weights that its worker holds then;
        such groups wait behind all others.
        """
        batch = Batch(put, [request.n for _, request in asked])
        if not asked:
            return batch
        if policy is not None:
            for member in self.holders():
                member.forget_speed()
        self._batches.append(batch)
        parts = [
            Part(batch, group, request, 0, prompt, policy) for group, (prompt, request) in enumerate(asked)
        ]
        ahead = [part for part in self._queue if policy is None or part.policy is not None]
        behind = [part for part in self._queue if policy is not None and part.policy is None]
        self._queue = deque([*ahead, *parts, *behind])
        if self.find_members(MemberState.ATTACHED):
            put(ADMIT)
        self._dispatch()
        return batch

    async def give_up(self, batch: Batch) -> None:
        """Ends what is left of a batch."""
        batch.is_ended = True
        self._forget_ended()

    def _dispatch(self) -> None:
        """Gives parts to workers as long as there are both."""
        self._forget_ended()
        while self._queue and not self._is_draining:
            part = self._queue[0]
            open_members = self._open_members(part)
            if not open_members:
                return
            self._queue.popleft()
            member = self._choose(open_members, self._expect(part))
            head, rest = part.split(self._part_size(part, open_members, member))
            if rest is not None:
                self._queue.appendleft(rest)
            self._lease(head, member)

    def _open_members(self, part: Part) -> list[Member]:
        """The workers that can take the part now."""
        now = asyncio.get_running_loop().time()
        return [
            member
            for member in self.find_members(MemberState.SERVING)
            if part.policy in (None, member.version)
            and member.rest_until <= now
            and member.room >= min(part.asked.n, member.rows)
        ]

    def _choose(self, members: Sequence[Member], tokens: float) -> Member:
        """The worker that would be done first, by its speed and what it still has to write."""
        busy = sum(member.busy for member in self.members.values())
        written = sum(member.written for member in self.members.values())
        usual = written / busy if busy > 0 and written > 0 else 1.0
        return min(members, key=lambda member: (member.tokens + tokens) / member.speed(usual))

    def _part_size(self, part: Part, members: Sequence[Member], member: Member) -> int:
        """Samples of the part for ``member``: all of them, since they share the prompt's cache, unless there
        are fewer groups left than workers without work.
        """
        count = min(part.asked.n, member.rows)
        idle = [each for each in members if not each.leases]
        if len(idle) <= len(self._queue) + 1 or member not in idle:
            return count
        shares = len(idle) // (len(self._queue) + 1)
        return min(count, max(_SMALLEST_PART, -(-count // shares)))

    def _expect(self, part: Part) -> float:
        """Tokens that a part will probably take."""
        length = self._lengths.get(part.prompt, float(part.asked.max_tokens))
        return part.asked.n * min(length, float(part.asked.max_tokens))

    def _lease(self, part: Part, member: Member) -> None:
        self.counts.asked += 1
        version = member.version if part.policy is None else part.policy
        name = f"rltrain-{self._session}-{self.counts.asked}"
        lease = Lease(name, part, self._expect(part), {str(version)})
        if part.batch.started is None:
            part.batch.started = version
        member.begin_lease(lease, time.monotonic())
        self._most_tokens = max(self._most_tokens, sum(each.tokens for each in self.holders()))
        lease.task = self._start(self._serve(lease, member))

    async def _serve(self, lease: Lease, member: Member) -> None:
        """One request: its samples are kept, or go back to the queue."""
        part = lease.part
        try:
            choices = await member.client.generate(
                replace(part.asked, id=lease.id),
                vocabulary=self.rules.vocabulary,
                labels=lease.labels,
            )
        except WorkerBusy:
            self._rest(lease, member)
        except WorkerLost as error:
            self._give_back(lease, member, str(error))
        except GarbageAnswer as error:
            self._strike(lease, member, error)
        except (WorkerRefused, UserError) as error:
            if self._end(lease, member):
                part.batch.fail(error)
        else:
            if any(choice.finish == "abort" for choice in choices):  # the server ends, or another's pause
                self._rest(lease, member)
            else:
                self._accept(lease, member, choices)
        self._dispatch()

    def _accept(self, lease: Lease, member: Member, choices: Sequence[Choice]) -> None:
        written = sum(len(choice.token_ids) for choice in choices)
        if not self._end(lease, member, written):
            return
        self.counts.answered += 1
        member.sound += 1
        if member.sound >= _FORGIVEN:
            member.strikes = 0
        self._lengths[lease.part.prompt] = written / len(choices)
        if not lease.part.batch.is_ended:
            named = [replace(choice, worker=member.name) for choice in choices]
            lease.part.batch.take(lease.part, named)

    def _end(self, lease: Lease, member: Member, written: int = 0) -> bool:
        """See ``Member.end_lease``."""
        if not member.end_lease(lease, time.monotonic(), written):
            return False
        self._lease_ended.set()
        if not member.leases:
            facts = {"requests": member.spell_requests, "tokens": member.spell_tokens}
            self._timeline.add(member.name, "sample", member.spell_start, **facts)
        return True

    def _return(self, lease: Lease, member: Member) -> None:
        """Puts a lease's samples back, before all others."""
        if not self._end(lease, member):
            return
        self.counts.returned += 1
        if not lease.part.batch.is_ended:
            lease.part.batch.restart()
            self._queue.appendleft(lease.part)

    def _give_back(self, lease: Lease, member: Member, reason: str) -> None:
        """A request failed with its worker."""
        del lease
        self._lose(member, reason)

    def _rest(self, lease: Lease, member: Member) -> None:
        loop = asyncio.get_running_loop()
        member.rest_until = loop.time() + self.rules.busy
        loop.call_later(self.rules.busy * 1.01, self._dispatch)
        self._return(lease, member)

    # workers that come and go -------------------------------------------------------------------------------

    def _strike(self, lease: Lease, member: Member, error: GarbageAnswer) -> None:
        self.counts.refused += 1
        member.strikes += 1
        member.sound = 0
        prompt = lease.part.prompt
        self._say(f"{member.name}: prompt {prompt!r} is sampled again, because {error}")
        self._return(lease, member)
        if member.strikes >= _STRIKES:
            self._quarantine(member, f"{member.strikes} of its answers were refused, last because {error}")

    def _lose(self, member: Member, reason: str) -> None:
        """Its samples go to others, and it is started or asked again."""
        if member.state in (MemberState.LOST, MemberState.QUARANTINED):
            return
        self.counts.lost += 1
        self._leave(member, MemberState.LOST, reason)

    def _quarantine(self, member: Member, reason: str) -> None:
        if member.state is not MemberState.QUARANTINED:
            self._leave(member, MemberState.QUARANTINED, reason)
            self._start(call_in_thread(member.home.close))

    def _leave(self, member: Member, state: MemberState, reason: str) -> None:
        count = len(member.leases)
        self._say(f"{member.name} is {state.value}: {reason}. Requests that go to other workers: {count}")
        member.state = state
        member.reason = reason
        self._timeline.add(member.name, state.value, now := time.time(), now, reason=reason)
        member.version = None
        for lease in list(member.leases.values()):
            lease.part.losses += 1
            self._return(lease, member)
            if lease.task is not None and lease.task is not asyncio.current_task():
                lease.task.cancel()
            if lease.part.losses >= _LOSSES:
                prompt = lease.part.prompt
                lease.part.batch.fail(
                    WorkerLost(f"{_LOSSES} workers were lost while they sampled prompt {prompt!r}: {reason}")
                )
        member.left.set()
        self._dispatch()

    async def _keep(self, member: Member) -> None:
        """Opens a worker and watches it, again and again, until it is quarantined."""
        delay = self.rules.retry
        while member.state is not MemberState.QUARANTINED:
            member.state = MemberState.STARTING
            try:
                client, rows = await call_in_thread(member.home.open)
            except _OPEN_ERRORS as error:
                member.state = MemberState.LOST
                if member.reason != str(error):
                    self._say(f"{member.name} cannot be used, and is asked again: {error}")
                member.reason = str(error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, self.rules.retry_longest)
                continue
            delay = self.rules.retry
            self._attach(member, client, rows)
            await self._watch(member)
            await self._disconnect(member)

    def _attach(self, member: Member, client: Any, rows: int) -> None:
        self.counts.restarts += member.attached > 0
        self._timeline.add(member.name, "attached", now := time.time(), now)
        if member.reason:
            self._say(f"{member.name} is back, and serves after a push that is proved")
        member.client = client
        member.attached += 1
        member.rows = rows
        member.reason = ""
        member.left.clear()
        member.state = MemberState.ATTACHED
        for batch in self._batches:
            if not batch.is_ended:
                batch.put(ADMIT)

    async def _watch(self, member: Member) -> None:
        """Returns when the worker is lost. ``/health`` of a stopped one still answers, hence a round trip
        through its processes; not while a push holds them, which has deadlines of its own.
        """
        misses = 0
        while not member.left.is_set():
            if await _is_set_within(member.left, self.rules.alive):
                return
            if member.state is MemberState.LOADING:
                misses = 0
                continue
            try:
                await call_in_thread(member.client.require_alive)
                misses = 0
            except (WorkerLost, WorkerBusy) as error:
                misses += member.state is not MemberState.LOADING
                if misses >= _MISSES:
                    self._lose(member, f"{error}; and so {misses} times in a row: it has died or hangs")
            except (WorkerRefused, UserError) as error:
                self._lose(member, str(error))

    async def _mind(self) -> None:
        """Looks after local processes, and after a pool in which nobody serves."""
        while True:
            await asyncio.sleep(self.rules.poll)
            for member in self.find_members(*ALIVE_STATES):
                try:
                    member.home.require_process()
                except UserError as error:
                    self._lose(member, str(error))
            self._forget_ended()
            self._check_patience()

    def _check_patience(self) -> None:
        """Ends the batches where nobody has served for too long, or where nobody ever can again."""
        if not self._batches or self.find_members(MemberState.SERVING):
            self._idle_since = None
            return
        now = time.monotonic()
        self._idle_since = self._idle_since or now
        is_hopeless = bool(self.members) and all(
            member.state is MemberState.QUARANTINED for member in self.members.values()
        )
        is_late = now - self._idle_since > self.rules.patience and not self._is_local_one_starting()
        if is_hopeless or is_late:
            self._fail_all(WorkersGone(f"no worker serves: {self._reasons()}"))

    def _fail_all(self, error: BaseException) -> None:
        for batch in self._batches:
            batch.fail(error)

    def _are_all_local(self) -> bool:
        """Then a failed start is the recipe's fault, and no worker comes by waiting."""
        return all(getattr(member.home, "is_local", False) for member in self.members.values())

    def _is_local_one_starting(self) -> bool:
        """Then no patience ends: a start takes minutes on a busy machine, and has a deadline of its own."""
        return any(
            getattr(member.home, "is_local", False) for member in self.find_members(MemberState.STARTING)
        )

    def _reasons(self) -> str:
        members = self.members.values()
        return "; ".join(f"{m.name} is {m.state.value}: {m.reason or '-'}" for m in members) or "none came"

    async def _disconnect(self, member: Member) -> None:
        client, member.client = member.client, None
        if client is not None:
            await client.close_async()
            client.close()

    def _forget_ended(self) -> None:
        """Cancels what ended batches still wait for."""
        ended = [batch for batch in self._batches if batch.is_ended]
        if not ended:
            return
        self._batches = [batch for batch in self._batches if not batch.is_ended]
        self._queue = deque(part for part in self._queue if not part.batch.is_ended)
        for member in self.holders():
            for lease in list(member.leases.values()):
                if lease.part.batch.is_ended:
                    self._return(lease, member)
                    if lease.task is not None and lease.task is not asyncio.current_task():
                        lease.task.cancel()

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[Any]) -> None:
        """A fault of the pool itself ends what waits for it."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._fail_all(error)


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
