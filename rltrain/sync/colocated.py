"""Sends the learner's weights to the engines of its process, and proves that they arrived.

After every push, the fingerprints of the learner's weights are compared with the engines', one per weight;
before the learner trains on samples, the engines' fingerprints are compared again. Weights outside the
repeated layers (embedding, output head, final norm) are compared every time: they are fused, tied and packed
in special ways, and a stale head is the most frequent fault.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from rltrain.protocols import WeightTarget
from rltrain.sync import targets
from rltrain.sync.fingerprint import NeverHeldError, WeightMismatchError, compare
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.types.samples import PolicyVersion
from rltrain.watchdog import Deadline, no_deadline

SHARDS_RTOL = 1e-12  # the sums of equal weights differ by their order, below 1e-14
Weights = Iterable[tuple[str, Tensor]]  # by Hugging Face name
# The learner's weights for a target of this dtype, to which shards may be rounded before they are gathered.
WeightStream = Callable[[torch.dtype], Weights]


class WeightOwner(Protocol):
    """The part of a learner whose weights are sent."""

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]: ...


_Fingerprints = dict[str, Fingerprint]  # by Hugging Face name


@dataclass(frozen=True)
class _Repeated:
    """Weights that a target may read again as long as they are the learner's, as for a worker that comes
    back in the middle of a step.
    """

    read: Callable[[], Weights]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.read())


@dataclass
class Sync:
    """Pushes weights into every one of ``targets`` and compares fingerprints.

    sample: weights of the repeated layers compared per push, rotating in a seeded order, so that each is
    compared every ``layer weights / sample`` pushes. full_every: pushes between comparisons of all weights;
    0: only the first push compares all, as it always does. ties: second name of a weight to its first; the
    second is compared too where the learner sends the weight once. deadline: wraps each call of a target.
    shard_sums: fingerprints from the ranks' shards, none of them gathered; a collective. Where it is given,
    what was gathered to be sent is compared with it, so that a fault of the gathering is not on both sides.
    """

    targets: Sequence[WeightTarget]
    ties: Mapping[str, str]
    sample: int
    full_every: int
    seed: int
    deadline: Deadline = no_deadline
    shard_sums: Callable[[torch.dtype], Mapping[str, Fingerprint]] | None = None
    pushes: int = 0
    _version: PolicyVersion = -1
    _always: tuple[str, ...] = ()
    _rotating: list[str] = field(default_factory=list)
    _streamed: set[str] = field(default_factory=set)  # names that the learner sends
    # Fingerprints that targets of each precision should have.
    _sent: dict[torch.dtype, _Fingerprints] = field(default_factory=dict)
    # Fingerprints of weights that were sent in float32, at the last push.
    _learner: _Fingerprints = field(default_factory=dict)
    # Norms of the learner's weights at the last push.
    _norms: tuple[float, ...] = ()

    def stream_of(self, learner: WeightOwner) -> WeightStream:
        """What a push of ``learner`` sends."""
        return learner.weights

    def push(
        self,
        weights: WeightStream,
        version: PolicyVersion,
        *,
        expect_change: bool,
        norms: Callable[[], tuple[float, ...]] = tuple,
    ) -> dict[str, float]:
        """Wake the targets, load ``weights`` into each as ``version`` and prove it; returns metrics.

        weights: called once for each target, with its dtype. Fingerprints are computed while the weights
        stream to the target, so that shards are not gathered a second time. expect_change: the updates since
        the last push had a learning rate and a gradient above 0. norms: of the learner's weights before they
        are rounded to the target's dtype, which may hide a small update. Raises WeightMismatchError when a
        weight did not arrive, and when a newer version that should have changed has the norms or the float32
        fingerprints of the older one.
        """
        full = not self._sent or (self.full_every > 0 and self.pushes % self.full_every == 0)
        # This push's sample, and the next push's, which will be checked for a change since this one.
        names = None if full else self._sample_names(self.pushes) | self._sample_names(self.pushes + 1)
        before = self._learner
        norms_before = self._norms
        self._learner = {}
        is_rounded = any(target.dtype != torch.float32 for target in self.targets)
        self._norms = norms() if is_rounded else ()  # fingerprints of float32 weights say the same
        self._sent = {}
        for target in self.targets:
            targets.wake(target, self.deadline)
        for target in self.targets:
            is_first = target.dtype not in self._sent  # targets of one precision hold equal weights
            stream = _Repeated(partial(self._stream, weights, target.dtype, names if is_first else set()))
            targets.load(target, stream, version, self.deadline)

        if not self._rotating:
            self._sort_names()
        if full and self.shard_sums is not None:
            self._require_gathered(self.shard_sums, version)
        if expect_change and version > self._version:
            self._require_change(before, norms_before, version)
        sent = self._sent if full else self._sample_fingerprints(self.pushes)
        worst = self._compare(sent, full, f"after the push of version {version}")
        self.pushes += 1
        self._version = version
        return {"sync/checked": float(len(next(iter(sent.values())))), "sync/difference": worst}

    def verify(self, *, every: bool = False) -> None:
        """Raises WeightMismatchError unless the targets have just sampled with the weights pushed last.

        Call before they sleep. every: compare all weights; only after a push that compared all, as the first
        does.
        """
        sent = self._sent if every else self._sample_fingerprints(self.pushes - 1)
        self._compare(sent, every, f"after sampling with version {self._version}")

    def verify_all(self, weights: WeightStream) -> None:
        """Raises WeightMismatchError unless the targets have just sampled with the learner's ``weights``, all
        of them.

        For held-out samples, whose results are reported for this version: ``verify`` compares only a part of
        the weights each time and could miss a stale one.
        """
        expected = self._fingerprint_all(weights, self._second_names())
        self._compare(expected, True, f"after sampling with version {self._version}")

    def sleep(self) -> None:
        """Let every target release its device memory; none holds weights until the next push."""
        for target in self.targets:
            targets.sleep(target, self.deadline)

    @contextlib.contextmanager
    def load_temporarily(
        self, weights: Mapping[str, Tensor], version: PolicyVersion, learner_weights: WeightStream
    ) -> Iterator[None]:
        """Inside, the targets hold other ``weights`` as ``version``; afterwards the learner's again.

        The learner's weights are verified before they are replaced, and all of ``weights`` both after loading
        and after sampling. Raises WeightMismatchError. weights: by all their names, a tied head's included.
        """
        self.verify()
        for target in self.targets:
            targets.load(target, weights.items(), version, self.deadline)
        expected = self._fingerprint_all(lambda dtype: weights.items(), {})
        self._compare(expected, True, f"after loading version {version}")
        yield
        self._compare(expected, True, f"after sampling with version {version}")
        self.push(learner_weights, self._version, expect_change=False)

    def _stream(self, weights: WeightStream, dtype: torch.dtype, names: set[str] | None) -> Weights:
        """The learner's weights for a target, recorded; no ``names``: as they are."""
        stream = weights(dtype)
        return stream if names == set() else self._record_fingerprints(stream, names, dtype)

    def _record_fingerprints(self, weights: Weights, names: set[str] | None, dtype: torch.dtype) -> Weights:
        """Passes ``weights`` on and records the fingerprints of ``names`` (None: of all) in ``dtype``, and
        in float32 if they come in float32.
        """
        sent = self._sent.setdefault(dtype, {})
        second_names = self._second_names()
        for name, weight in weights:
            self._streamed.add(name)
            for alias in (*second_names.get(name, ()), name):
                if names is None or alias in names:
                    value = weight.detach()
                    sent[alias] = weight_fingerprint(alias, value.to(dtype))
                    if value.dtype == torch.float32:
                        exact = dtype == torch.float32
                        self._learner[alias] = sent[alias] if exact else weight_fingerprint(alias, value)
                    del value
            yield name, weight
            del weight

    def _fingerprint_all(
        self, weights: WeightStream, second_names: Mapping[str, Sequence[str]]
    ) -> dict[torch.dtype, _Fingerprints]:
        """The fingerprints that targets of each precision should have.

        second_names: further names of a weight, by its name in ``weights``.
        """
        expected: dict[torch.dtype, _Fingerprints] = {target.dtype: {} for target in self.targets}
        for dtype, fingerprints in expected.items():
            for name, weight in weights(dtype):
                value = weight.detach().to(dtype)
                for alias in (*second_names.get(name, ()), name):
                    fingerprints[alias] = weight_fingerprint(alias, value)
        return expected

    def _second_names(self) -> dict[str, list[str]]:
        """The second names, by the first, of tied weights that the learner sends once."""
        second_names: dict[str, list[str]] = {}
        for second, first in self.ties.items():
            if second not in self._streamed:  # empty before the first push
                second_names.setdefault(first, []).append(second)
        return second_names

    def _sort_names(self) -> None:
        """Decide which weights are in every sample, and in which order the others take turns.

        Called after the first push, which shows the learner's names.
        """
        names = list(next(iter(self._sent.values())))
        layered = [name for name in names if any(part.isdigit() for part in name.split("."))]
        self._always = tuple(name for name in names if name not in set(layered))
        self._rotating = random.Random(self.seed).sample(layered, len(layered))

    def _sample_names(self, push: int) -> set[str]:
        """The weights that a push compares."""
        count = len(self._rotating)
        offsets = range(min(self.sample, count))
        turn = {self._rotating[(push * self.sample + offset) % count] for offset in offsets}
        return turn.union(self._always)

    def _sample_fingerprints(self, push: int) -> dict[torch.dtype, _Fingerprints]:
        """The fingerprints in ``_sent`` of the weights that a push compares."""
        names = self._sample_names(push)
        return {
            dtype: {name: fingerprint for name, fingerprint in sent.items() if name in names}
            for dtype, sent in self._sent.items()
        }

    def _require_change(
        self, before: Mapping[str, Fingerprint], norms_before: tuple[float, ...], version: PolicyVersion
    ) -> None:
        """Raises WeightMismatchError where no norm, or no fingerprint known from ``before``, has changed."""
        known = [name for name in self._learner if name in before]
        evidence = ""
        if known and all(self._learner[name].number == before[name].number for name in known):
            evidence = (
                f"{known[0]!r} still has fingerprint {self._learner[known[0]].number:.9g}, and so do the "
                f"other {len(known) - 1} compared"
            )
        elif norms_before and norms_before == self._norms:
            evidence = f"the norms of all {len(norms_before)} tensors are equal to the last bit"
        if evidence:
            raise WeightMismatchError(
                f"version {version}: the learner took updates with a learning rate and a gradient above 0, "
                f"but its weights are those of version {self._version}: {evidence}. The optimizer does not "
                "hold the weights that are sent; look at what wraps the model"
            )

    def _require_gathered(
        self, shard_sums: Callable[[torch.dtype], Mapping[str, Fingerprint]], version: PolicyVersion
    ) -> None:
        """Raises WeightMismatchError where what this rank gathered is not what the ranks hold."""
        for dtype in dict.fromkeys(target.dtype for target in self.targets):
            held = shard_sums(dtype)
            for name, gathered in self._sent.get(dtype, {}).items():
                if not math.isclose(gathered.number, held[name].number, rel_tol=SHARDS_RTOL):
                    raise WeightMismatchError(
                        f"version {version}: weight {name!r} was gathered with fingerprint "
                        f"{gathered.number:.9g}, the shards of the ranks add up to {held[name].number:.9g} "
                        f"(rtol {SHARDS_RTOL:g}); look at what wraps the model, or at the ranks' connection"
                    )

    def _compare(self, sent: Mapping[torch.dtype, Mapping[str, Fingerprint]], full: bool, when: str) -> float:
        """The largest relative difference of a target's fingerprints from those ``sent`` in its precision.

        Raises WeightMismatchError where a weight differs, NeverHeldError if that is so at the first push.
        """
        worst = 0.0
        for place, target in enumerate(self.targets):
            expected = sent[target.dtype]
            held = targets.fingerprint(target, None if full else frozenset(expected), self.deadline)
            try:
                compare(expected, held, target.fingerprint_rtol)
            except WeightMismatchError as error:
                if self.pushes == 0:
                    raise NeverHeldError(
                        f"{when}: {error}. No load has reached it yet: this engine cannot load this "
                        "architecture; choose the other rollout.engine"
                    ) from None
                which = f", target {place} of {len(self.targets)}" if len(self.targets) > 1 else ""
                raise WeightMismatchError(
                    f"{when}{which}: {error}. Look for code that also writes the engine's weights "
                    "(a reload from disk, a wake after sleep), or that keeps the push from reaching a fused, "
                    "packed or tied layer; all samples since the last comparison are suspect"
                ) from None
            for name, fingerprint in expected.items():
                difference = abs(held[name].number - fingerprint.number)
                worst = max(worst, difference / max(abs(fingerprint.number), 1e-30))
        return worst
