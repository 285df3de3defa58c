"""One worker of a pool: where it comes from, what state it is in, and what it was asked for.

Imports no torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

from rltrain.rollout.worker.answers import GenerateRequest
from rltrain.rollout.worker.guard import Choice
from rltrain.types.samples import PolicyVersion

__all__ = ["Home", "Lease", "Member", "MemberState", "Part", "PoolClient"]

_DECAY = 0.5  # of what is known about a worker's speed, at the start of a batch


class MemberState(Enum):
    """STARTING -> ATTACHED -> LOADING -> SERVING, and from each to LOST or QUARANTINED.

    A lost worker is started or asked again, and serves after a complete push that was proved. A quarantined
    one never serves again in this run.
    """

    STARTING = "starting"
    ATTACHED = "attached"  # it answers and fits the recipe; its weights are no version's
    LOADING = "loading"  # a push to it is under way
    SERVING = "serving"  # was proved to hold ``version``
    LOST = "lost"
    QUARANTINED = "quarantined"


class PoolClient(Protocol):
    """The calls that the pool itself makes; a push uses more of them."""

    async def generate(
        self, request: GenerateRequest, *, vocabulary: int, labels: Collection[str]
    ) -> list[Choice]: ...

    def require_alive(self) -> None: ...

    async def close_async(self) -> None: ...

    def close(self) -> None: ...


class Home(Protocol):
    """Where a worker comes from: a process of this machine, or an address."""

    def open(self) -> tuple[Any, int]:
        """A new client of the worker, and how many rows it samples at once; blocks until it answers.

        A local worker that has died or hangs is started anew. Raises an error where there is no worker, or
        one that does not fit the recipe.
        """
        ...

    def require_process(self) -> None:
        """Raises an error if the worker is a process of this machine that has ended; returns at once."""
        ...

    def close(self) -> None:
        """Ends the worker if rltrain started it; an ``open`` under way raises. A second call does nothing."""
        ...


@dataclass
class Part:
    """Samples of a group that go to one worker in one request.

    batch: the call that they belong to. group: its place there. first: number of the first sample. losses:
    workers that were lost while they sampled it.
    """

    batch: Any
    group: int
    asked: GenerateRequest  # of ``asked.n`` samples, without an id
    first: int
    prompt: str  # id
    policy: PolicyVersion | None  # None: whatever the worker holds when it draws a token
    losses: int = 0

    def split(self, count: int) -> tuple[Part, Part | None]:
        """The first ``count`` samples, and the rest. A sample's seed does not depend on the part it is in."""
        rest = self.asked.n - count
        if rest <= 0:
            return self, None
        head = replace(self, asked=replace(self.asked, n=count))
        tail = replace(self.asked, n=rest, seed=self.asked.seed + count)
        return head, replace(self, asked=tail, first=self.first + count)


@dataclass
class Lease:
    """A part that a worker was asked for. tokens: as many as it will probably write. labels: of the weights
    that may draw them, more of them after a push while it is under way.
    """

    id: str
    part: Part
    tokens: float
    labels: set[str] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


@dataclass
class Member:
    """A worker. rows: as many as it samples at once. strikes: garbage answers that still count."""

    name: str
    home: Home
    state: MemberState = MemberState.STARTING
    client: Any = None  # PoolClient
    rows: int = 1
    version: PolicyVersion | None = None
    leases: dict[str, Lease] = field(default_factory=dict)
    strikes: int = 0
    sound: int = 0  # sound answers since the last strike
    reason: str = ""  # why it is lost or quarantined
    rest_until: float = 0.0  # in the loop's time: it said that it does not serve now
    written: float = 0.0  # tokens, while it was ``busy`` for so many seconds
    busy: float = 0.0
    since: float = 0.0  # when the present busy time began
    samples: int = 0  # that it was asked for and has not answered
    tokens: float = 0.0  # that it has still to write, as far as one can tell
    attached: int = 0  # times
    # since it last had nothing to do: seconds since 1970, what it was asked for and what it wrote
    spell_start: float = 0.0
    spell_requests: int = 0
    spell_tokens: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set when it is lost

    @property
    def room(self) -> int:
        """Samples that it takes now: as many as keep its rows full when some end."""
        return self.rows + (self.rows + 3) // 4 - self.samples

    def speed(self, usual: float) -> float:
        """Tokens a second while it has something to do: what was measured, and the pool's ``usual`` as if it
        had been measured for a second, so that a worker that was slow once is tried again.
        """
        return (self.written + usual) / (self.busy + 1.0)

    def begin_lease(self, lease: Lease, now: float) -> None:
        if not self.leases:
            self.since = now
            self.spell_start = time.time()
            self.spell_requests = 0
            self.spell_tokens = 0
        self.leases[lease.id] = lease
        self.samples += lease.part.asked.n
        self.tokens += lease.tokens

    def end_lease(self, lease: Lease, now: float, written: int = 0) -> bool:
        """Whether the lease was still its own: what a lost worker answers is nobody's."""
        if self.leases.pop(lease.id, None) is None:
            return False
        self.samples -= lease.part.asked.n
        self.spell_requests += 1
        self.spell_tokens += written
        self.tokens -= lease.tokens
        self.busy += now - self.since
        self.since = now
        self.written += written
        return True

    def forget_speed(self) -> None:
        """Lets a speed that has changed show."""
        self.written *= _DECAY
        self.busy *= _DECAY
