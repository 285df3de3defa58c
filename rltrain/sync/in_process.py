"""Weights from the learner to an engine in the same process, and the proof that they arrived.

After every push, learner and engine each say what they hold, one number per weight; before the learner trains on what was sampled,
the engine says it again. Weights outside the repeated layers (embedding, output head, final norm) are in every sample: they are
fused, tied and packed in ways of their own, and a stale head is the fault seen most often.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from rltrain.protocols import RolloutEngine
from rltrain.sync.fingerprint import NeverHeldError, WeightMismatchError, compare
from rltrain.tensor_ops import weight_fingerprint


@dataclass
class Sync:
    """Pushes weights into ``engine`` and compares fingerprints.

    sample: weights of the repeated layers compared per push, rotating in a seeded order, so that each is compared every
    ``layer weights / sample`` pushes. full_every: pushes between comparisons of all weights, the first included; 0: only the first.
    ties: second name of a weight to its first; the second is compared too where the learner sends the weight once.
    """

    engine: RolloutEngine
    ties: Mapping[str, str]
    sample: int
    full_every: int
    seed: int
    pushes: int = 0
    _version: int = -1
    _always: tuple[str, ...] = ()
    _rotating: list[str] = field(default_factory=list)
    _streamed: set[str] = field(default_factory=set)  # names that the learner sends
    _sent: dict[str, float] = field(default_factory=dict)  # of what the engine should hold, by name
    _learner: dict[str, float] = field(default_factory=dict)  # of the learner's own precision, as last sent

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int, *, expect_change: bool) -> dict[str, float]:
        """Load ``weights`` as ``version`` and prove it; what the report shows of it.

        The learner's fingerprints are taken while the weights stream by, so shards are gathered once. expect_change: the updates
        since the last push had a learning rate and a gradient above 0. Raises WeightMismatchError when a weight did not arrive,
        and when a newer version that should have changed has the fingerprints of the older one.
        """
        full = not self._sent or (self.full_every > 0 and self.pushes % self.full_every == 0)
        # the sample, and the next push's, which will be asked whether it changed
        taken = None if full else self._names(self.pushes) | self._names(self.pushes + 1)
        before, self._learner, self._sent = self._learner, {}, {}
        self.engine.load(self._tapped(weights, taken), version)
        if not self._rotating:
            self._sort_names()
        if expect_change and version > self._version:
            self._require_change(before, version)
        sent = self._sent if full else self._of_sample(self.pushes)
        worst = self._compare(sent, full, f"after the push of version {version}")
        self.pushes, self._version = self.pushes + 1, version
        return {"sync/checked": float(len(sent)), "sync/difference": worst}

    def verify(self, *, every: bool = False) -> None:
        """What the engine has just sampled with is what was pushed last. Raises WeightMismatchError. Call before it sleeps.

        every: all weights, after a push that compared all, as the first does.
        """
        sent = self._sent if every else self._of_sample(self.pushes - 1)
        self._compare(sent, every, f"after sampling with version {self._version}")

    def verify_all(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """What the engine has just sampled with is ``weights``, the learner's, every one of them. Raises WeightMismatchError.

        For samples that are reported as this version's, held-out ones: a comparison that takes turns would let one pass.
        """
        expected, seconds = dict[str, float](), self._seconds()
        for name, weight in weights:
            held = weight.detach().to(self.engine.dtype)
            expected.update({called: weight_fingerprint(called, held) for called in (*seconds.get(name, ()), name)})
        self._compare(expected, True, f"after sampling with version {self._version}")

    @contextlib.contextmanager
    def lend(self, weights: Mapping[str, Tensor], version: int, own: Callable[[], Iterable[tuple[str, Tensor]]]) -> Iterator[None]:
        """Inside, the engine holds other ``weights`` as ``version``; afterwards the learner's, ``own()``, as the version they were.

        What the engine sampled with is compared before either goes, and all of ``weights`` after both loading and sampling. Raises
        WeightMismatchError. weights: by every name they have, a tied head's included.
        """
        self.verify()
        self.engine.load(iter(weights.items()), version)
        expected = {name: weight_fingerprint(name, weight.detach().to(self.engine.dtype)) for name, weight in weights.items()}
        self._compare(expected, True, f"after loading version {version}")
        yield
        self._compare(expected, True, f"after sampling with version {version}")
        self.push(own(), self._version, expect_change=False)

    def _tapped(self, weights: Iterable[tuple[str, Tensor]], names: set[str] | None) -> Iterator[tuple[str, Tensor]]:
        """Passes ``weights`` on; takes the fingerprints of ``names`` (None: of all), in the learner's precision and in the engine's."""
        seconds = self._seconds()
        for name, weight in weights:
            self._streamed.add(name)
            for called in (*seconds.get(name, ()), name):
                if names is None or called in names:
                    held = weight.detach()
                    self._learner[called] = self._sent[called] = weight_fingerprint(called, held)
                    if held.dtype != self.engine.dtype:
                        self._sent[called] = weight_fingerprint(called, held.to(self.engine.dtype))
            yield name, weight

    def _seconds(self) -> dict[str, list[str]]:
        """The second names, by the first, of weights that the learner sends once."""
        found: dict[str, list[str]] = {}
        for second, first in self.ties.items():
            if second not in self._streamed:  # empty before the first push
                found.setdefault(first, []).append(second)
        return found

    def _sort_names(self) -> None:
        """After the first push: which weights are in every sample, and in which order the others take turns."""
        layered = [name for name in self._sent if any(part.isdigit() for part in name.split("."))]
        self._always = tuple(name for name in self._sent if name not in set(layered))
        self._rotating = random.Random(self.seed).sample(layered, len(layered))

    def _names(self, push: int) -> set[str]:
        """The sample of one push."""
        count = len(self._rotating)
        turn = {self._rotating[(push * self.sample + offset) % count] for offset in range(min(self.sample, count))}
        return turn.union(self._always)

    def _of_sample(self, push: int) -> dict[str, float]:
        names = self._names(push)
        return {name: number for name, number in self._sent.items() if name in names}

    def _require_change(self, before: Mapping[str, float], version: int) -> None:
        known = [name for name in self._learner if name in before]
        if known and all(self._learner[name] == before[name] for name in known):
            raise WeightMismatchError(
                f"version {version}: the learner took updates with a learning rate and a gradient above 0, but its weights are those of "
                f"version {self._version}: {known[0]!r} still has fingerprint {self._learner[known[0]]:.9g}, and so do the other "
                f"{len(known) - 1} compared. The optimizer does not hold the weights that are sent; look at what wraps the model"
            )

    def _compare(self, sent: Mapping[str, float], full: bool, when: str) -> float:
        """Largest relative difference of the engine's fingerprints from ``sent``."""
        held = self.engine.fingerprint(None if full else frozenset(sent))
        try:
            compare(sent, held, self.engine.fingerprint_rtol)
        except WeightMismatchError as error:
            if self.pushes == 0:
                raise NeverHeldError(
                    f"{when}: {error}. No load has reached it yet: this engine cannot be given this architecture; "
                    "choose the other rollout.engine"
                ) from None
            raise WeightMismatchError(
                f"{when}: {error}. Look for what writes the engine's weights besides this push (a reload from disk, a wake after sleep), "
                "or keeps it from reaching a layer that is fused, packed or tied; what was sampled since the last comparison is suspect"
            ) from None
        return max(abs(held[name] - number) / max(abs(number), 1e-30) for name, number in sent.items())
