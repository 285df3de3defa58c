"""Which groups a step trains on when they are sampled without a break: none with a token that is too old.

Time is counted in pushes. A group is due at the last push at which its oldest token may still be trained on.
Groups are drawn only as long as all that are outstanding can be trained on in time, and a step takes those
that are due first. So a bound holds by construction, and nobody waits for more than the step needs. This
module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.types.samples import PolicyVersion, ScoredGroup

__all__ = ["Draw", "Window"]


@dataclass
class Draw:
    """A group that is outstanding. prompt: its place in the data. begun: push at which it was asked for, or
    that of its oldest token once it is there.
    """

    number: int
    prompt: int
    begun: int
    is_there: bool = False


@dataclass
class Window:
    """versions: pushes by which a token may be older than the policy that trains on it. size: groups of a
    step. waits: a step waits for groups that would be too old at the next; otherwise those are dropped.
    """

    versions: int
    size: int
    waits: bool
    pushes: int = 0  # so far; the present one has this number
    # the latest pushes by their version, as many as a token may be of: their numbers
    known: dict[PolicyVersion, int] = field(default_factory=dict)
    draws: dict[int, Draw] = field(default_factory=dict)  # outstanding, by number
    drawn: int = 0  # ever
    dropped: int = 0  # ever

    def advance(self, version: PolicyVersion) -> None:
        """A step begins, with the policy of ``version``, which was pushed."""
        if version in self.known and self.known[version] == self.pushes:
            return  # no update changed the weights
        self.pushes += 1
        self.known[version] = self.pushes
        self.known = {each: push for each, push in self.known.items() if push >= self.pushes - self.versions}

    def room(self, steps_left: int) -> int:
        """Groups that may be drawn now. steps_left: of the run, with the one that begins."""
        return min(self.versions + 1, steps_left) * self.size - len(self.draws)

    def draw(self, prompt: int) -> Draw:
        self.drawn += 1
        self.draws[self.drawn] = Draw(self.drawn, prompt, self.pushes)
        return self.draws[self.drawn]

    def note_arrival(self, number: int, group: ScoredGroup) -> None:
        """The group is whole. Where its oldest token is younger than it had to be, it is due later."""
        draw = self.draws[number]
        draw.is_there = True
        draw.begun = min(self.find_push(span.version) for each in group.completions for span in each.versions)

    def find_push(self, version: PolicyVersion) -> int:
        """Of a token. One pushed since the step began is the next; one that is not known is too old."""
        if version in self.known:
            return self.known[version]
        newest = max(self.known, default=-1)
        return self.pushes + 1 if version > newest else self.pushes - self.versions - 1

    def note_start(self, number: int, version: PolicyVersion | None) -> None:
        """The group is not there, and its oldest token may be of ``version``; None: it has none yet."""
        self.draws[number].begun = self.pushes if version is None else self.find_push(version)

    def find_stale(self) -> list[int]:
        """The groups with a token that is too old now."""
        return [draw.number for draw in self.draws.values() if self._due(draw) < self.pushes]

    def drop(self, number: int) -> None:
        del self.draws[number]
        self.dropped += 1

    def choose(self) -> list[int] | None:
        """The groups of the step, first drawn first; None: it has to wait for more of them."""
        there = [draw for draw in self.draws.values() if draw.is_there]
        chosen = sorted(there, key=lambda draw: (self._due(draw), draw.number))[: self.size]
        if len(chosen) < self.size or (self.waits and not self._leaves_time(chosen)):
            return None
        return sorted(draw.number for draw in chosen)

    def take(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            del self.draws[number]

    def require_young(self, number: int, group: ScoredGroup) -> None:
        """Raises RuntimeError for a token that is older than the bound when a step takes its group."""
        for completion in group.completions:
            for span in completion.versions:
                age = self.pushes - self.find_push(span.version)
                if age > self.versions or age < 0:
                    raise RuntimeError(
                        f"rollout.schedule bounded: tokens {span.start} to {span.stop} of a completion of "
                        f"prompt {group.prompt.id!r} (draw {number}) are of version {span.version}; the step "
                        f"trains on the latest {self.versions + 1} that were pushed, {sorted(self.known)}"
                    )

    def state_dict(self) -> dict[str, Any]:
        return {
            "pushes": self.pushes,
            "known": sorted(self.known.items()),
            "draws": [[draw.number, draw.prompt] for draw in self.draws.values()],
            "drawn": self.drawn,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was outstanding is not there, and is asked for anew."""
        self.pushes = state["pushes"]
        self.known = dict(state["known"])
        self.draws = {number: Draw(number, prompt, self.pushes) for number, prompt in state["draws"]}
        self.drawn = state["drawn"]
        self.dropped = state["dropped"]

    def _due(self, draw: Draw) -> int:
        return draw.begun + self.versions

    def _leaves_time(self, chosen: Sequence[Draw]) -> bool:
        """Whether all that is left can still be trained on in time, a step after each push."""
        for push in range(self.pushes, self.pushes + self.versions + 1):
            due = sum(self._due(draw) <= push for draw in self.draws.values())
            taken = sum(self._due(draw) <= push for draw in chosen)
            if due - taken > self.size * (push - self.pushes):
                return False
        return True
