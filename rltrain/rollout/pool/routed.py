"""A pool behind a router that somebody else runs: it chooses the worker of a request, and nobody says which.

Weights, proofs and signs of life go to the workers themselves, at their own addresses. The router may send a
request to any of them at any time, so that nothing is asked for unless every worker that answers holds the
policy's version, proved. Imports no torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.protocols import WorkersGone
from rltrain.rollout.pool.members import Home, Lease, Member, MemberState, Part
from rltrain.rollout.pool.pool import ALIVE_STATES, NOWHERE, PoolRules, WorkerPool
from rltrain.rollout.worker.answers import GarbageAnswer
from rltrain.rollout.worker.guard import Choice
from rltrain.timeline import Timeline

__all__ = ["RoutedPool"]

_REFUSED = 100  # answers in a row, after which the router is not believed


@dataclass
class _Router(Member):
    """rows: the most samples of one request. total: rows of all workers behind it."""

    total: int = 1

    @property
    def room(self) -> int:
        return self.total + (self.total + 3) // 4 - self.samples


class RoutedPool(WorkerPool):
    """homes: of every worker behind the router. url, client: of the router."""

    def __init__(
        self,
        homes: Mapping[str, Home],
        rules: PoolRules,
        url: str,
        client: Any,
        say: Callable[[str], None],
        timeline: Timeline = NOWHERE,
    ) -> None:
        super().__init__(homes, rules, say, timeline)
        self.router = _Router(f"the router {url}", home=NoHome(), state=MemberState.SERVING, client=client)
        self._silent_since: float | None = None
        self._refused_in_a_row = 0
        self._reason = ""

    def holders(self) -> list[Member]:
        return [self.router]

    async def close(self) -> None:
        await super().close()
        await self._disconnect(self.router)

    def _open_members(self, part: Part) -> list[Member]:
        """The router, where every worker that answers holds the policy's version."""
        members = self.find_members(*ALIVE_STATES)
        is_ready = all(m.state is MemberState.SERVING and m.version == part.policy for m in members)
        if not members or not is_ready or self.find_members(MemberState.QUARANTINED):
            return []
        router = self.router
        router.rows = min(member.rows for member in members)
        router.total = sum(member.rows for member in members)
        is_resting = router.rest_until > asyncio.get_running_loop().time()
        has_room = router.room >= min(part.asked.n, router.rows)
        return [router] if has_room and not is_resting else []

    def _accept(self, lease: Lease, member: Member, choices: Sequence[Choice]) -> None:
        self._silent_since = None
        self._refused_in_a_row = 0
        super()._accept(lease, member, choices)

    def _give_back(self, lease: Lease, member: Member, reason: str) -> None:
        """One request has failed, perhaps with one worker, of which the signs of life will tell."""
        self._silent_since = self._silent_since or time.monotonic()
        self._reason = reason
        self._rest(lease, member)

    def _strike(self, lease: Lease, member: Member, error: GarbageAnswer) -> None:
        """A worker that came back may answer before it is sent the weights, with a label that says so."""
        self.counts.refused += 1
        self._refused_in_a_row += 1
        prompt = lease.part.prompt
        self._say(f"{member.name}: prompt {prompt!r} is sampled again, because {error}")
        self._rest(lease, member)
        if self._refused_in_a_row >= _REFUSED:
            self._fail_all(
                WorkersGone(
                    f"{_REFUSED} answers in a row through {member.name} were refused, last because {error}; "
                    "it must ask no other workers than rollout.workers.admin"
                )
            )

    def _leave(self, member: Member, state: MemberState, reason: str) -> None:
        """Which requests a lost worker had nobody knows, so that all are asked for again."""
        super()._leave(member, state, reason)
        for lease in list(self.router.leases.values()):
            self._return(lease, self.router)
            if lease.task is not None and lease.task is not asyncio.current_task():
                lease.task.cancel()

    def _check_patience(self) -> None:
        super()._check_patience()
        for member in self.find_members(MemberState.QUARANTINED):
            self._fail_all(
                WorkersGone(
                    f"{member.name} is quarantined: {member.reason}; the router may still ask it: take it "
                    "out of the router and of rollout.workers.admin"
                )
            )
        if not self._batches:
            self._silent_since = None
        since = self._silent_since
        if since is not None and time.monotonic() - since > self.rules.patience:
            name = self.router.name
            self._fail_all(WorkersGone(f"{name} has answered nothing for long: {self._reason}"))


class NoHome:
    """The router is nobody's to start or to end."""

    def open(self) -> tuple[Any, int]:
        raise RuntimeError("a router is not opened")

    def require_process(self) -> None: ...

    def close(self) -> None: ...
