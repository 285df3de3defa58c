"""Weights from the learner to the engines of its process, and the proof that they arrived.

After every push, learner and engines each say what they hold, one fingerprint per weight; before the learner
trains on what was sampled, the engines say it again. Weights outside the repeated layers (embedding, output
head, final norm) are in every sample: they are fused, tied and packed in ways of their own, and a stale head
is the fault seen most often.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rltrain.protocols import WeightTarget
from rltrain.sync import targets
from rltrain.sync.fingerprint import NeverHeldError, WeightMismatchError, compare
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.types.samples import PolicyVersion
from rltrain.watchdog import Deadline, no_deadline

Weights = Iterable[tuple[str, Tensor]]  # by Hugging Face name
_Fingerprints = dict[str, Fingerprint]  # by Hugging Face name


@dataclass
class Sync:
    """Pushes weights into every one of ``targets`` and compares fingerprints.

    sample: weights of the repeated layers compared per push, rotating in a seeded order, so that each is
    compared every ``layer weights / sample`` pushes. full_every: pushes between comparisons of all weights,
    the first included; 0: only the first. ties: second name of a weight to its first; the second is compared
    too where the learner sends the weight once. deadline: of each thing a target is asked to do.
    """

    targets: Sequence[WeightTarget]
    ties: Mapping[str, str]
    sample: int
    full_every: int
    seed: int
    deadline: Deadline = no_deadline
    pushes: int = 0
    _version: PolicyVersion = -1
    _always: tuple[str, ...] = ()
    _rotating: list[str] = field(default_factory=list)
    _streamed: set[str] = field(default_factory=set)  # names that the learner sends
    _sent: dict[torch.dtype, _Fingerprints] = field(
        default_factory=dict
    )  # what targets of each precision should hold
    _learner: _Fingerprints = field(default_factory=dict)  # of float32 weights as they were last sent
    _norms: tuple[float, ...] = ()  # of the learner's weights at the last push

    def push(
        self,
        weights: Callable[[torch.dtype], Weights],
        version: PolicyVersion,
        *,
        expect_change: bool,
        norms: Callable[[], tuple[float, ...]] = tuple,
    ) -> dict[str, float]:
        """Wake the targets, load ``weights`` into each as ``version`` and prove it; what the report shows of
        it.

        weights: called once for each target, with its dtype, to which shards may be rounded before they are
        gathered. Fingerprints are taken while the weights stream by, so shards are gathered no more often
        than that. expect_change: the updates since the last push had a learning rate and a gradient above 0.
        norms: of the learner's weights, in float32 or wider. Raises WeightMismatchError when a weight did
        not arrive, and when a newer version that should have changed has the norms of the older one.
        """
        full = not self._sent or (self.full_every > 0 and self.pushes % self.full_every == 0)
        # the sample, and the next push's, which will be asked whether it changed
        names = None if full else self._names(self.pushes) | self._names(self.pushes + 1)
        before = (self._learner, self._norms)
        self._learner = {}
        self._norms = norms()
        self._sent = {}
        for target in self.targets:
            targets.wake(target, self.deadline)
        for target in self.targets:
            stream = weights(target.dtype)
            if target.dtype not in self._sent:  # targets of one precision hold the same
                stream = self._tapped(stream, names, target.dtype)
            targets.load(target, stream, version, self.deadline)

        if not self._rotating:
            self._sort_names()
        if expect_change and version > self._version:
            self._require_change(*before, version)
        sent = self._sent if full else self._of_sample(self.pushes)
        worst = self._compare(sent, full, f"after the push of version {version}")
        self.pushes += 1
        self._version = version
        return {"sync/checked": float(len(next(iter(sent.values())))), "sync/difference": worst}

    def verify(self, *, every: bool = False) -> None:
        """What the targets have just sampled with is what was pushed last. Raises WeightMismatchError.

        Call before they sleep. every: all weights, after a push that compared all, as the first does.
        """
        sent = self._sent if every else self._of_sample(self.pushes - 1)
        self._compare(sent, every, f"after sampling with version {self._version}")

    def verify_all(self, weights: Callable[[torch.dtype], Weights]) -> None:
        """What the targets have just sampled with is ``weights``, the learner's, every one of them.

        For samples that are reported as this version's, held-out ones: a comparison that takes turns would
        let one pass. Raises WeightMismatchError.
        """
        expected = self._of_every(weights, self._seconds())
        self._compare(expected, True, f"after sampling with version {self._version}")

    def sleep(self) -> None:
        """Every target gives its device memory back; none holds weights until the next push."""
        for target in self.targets:
            targets.sleep(target, self.deadline)

    @contextlib.contextmanager
    def temporarily_loaded(
        self,
        weights: Mapping[str, Tensor],
        version: PolicyVersion,
        own: Callable[[torch.dtype], Weights],
    ) -> Iterator[None]:
        """Inside, the targets hold other ``weights`` as ``version``; afterwards the learner's ``own``, as
        before.

        What the targets sampled with is compared before either goes, and all of ``weights`` after both
        loading and sampling. Raises WeightMismatchError. weights: by every name they have, a tied head's
        included.
        """
        self.verify()
        for target in self.targets:
            targets.load(target, iter(weights.items()), version, self.deadline)
        expected = self._of_every(lambda dtype: weights.items(), {})
        self._compare(expected, True, f"after loading version {version}")
        yield
        self._compare(expected, True, f"after sampling with version {version}")
        self.push(own, self._version, expect_change=False)

    def _tapped(self, weights: Weights, names: set[str] | None, dtype: torch.dtype) -> Weights:
        """Passes ``weights`` on; takes the fingerprints of ``names`` (None: of all) in ``dtype``."""
        sent = self._sent.setdefault(dtype, {})
        seconds = self._seconds()
        for name, weight in weights:
            self._streamed.add(name)
            for called in (*seconds.get(name, ()), name):
                if names is None or called in names:
                    sent[called] = weight_fingerprint(called, weight.detach().to(dtype))
                    if weight.dtype == torch.float32:
                        self._learner[called] = weight_fingerprint(called, weight.detach())
            yield name, weight
            del weight

    def _of_every(
        self, weights: Callable[[torch.dtype], Weights], seconds: Mapping[str, Sequence[str]]
    ) -> dict[torch.dtype, _Fingerprints]:
        """What targets of each precision should hold. seconds: further names of a weight, by the one it comes
        under.
        """
        expected: dict[torch.dtype, _Fingerprints] = {target.dtype: {} for target in self.targets}
        for dtype, fingerprints in expected.items():
            for name, weight in weights(dtype):
                held = weight.detach().to(dtype)
                for called in (*seconds.get(name, ()), name):
                    fingerprints[called] = weight_fingerprint(called, held)
        return expected

    def _seconds(self) -> dict[str, list[str]]:
        """The second names, by the first, of weights that the learner sends once."""
        seconds: dict[str, list[str]] = {}
        for second, first in self.ties.items():
            if second not in self._streamed:  # empty before the first push
                seconds.setdefault(first, []).append(second)
        return seconds

    def _sort_names(self) -> None:
        """After the first push: which weights are in every sample, and in which order the others take
        turns.
        """
        names = list(next(iter(self._sent.values())))
        layered = [name for name in names if any(part.isdigit() for part in name.split("."))]
        self._always = tuple(name for name in names if name not in set(layered))
        self._rotating = random.Random(self.seed).sample(layered, len(layered))

    def _names(self, push: int) -> set[str]:
        """The sample of one push."""
        count = len(self._rotating)
        turn = {
            self._rotating[(push * self.sample + offset) % count] for offset in range(min(self.sample, count))
        }
        return turn.union(self._always)

    def _of_sample(self, push: int) -> dict[torch.dtype, _Fingerprints]:
        names = self._names(push)
        return {
            dtype: {name: fingerprint for name, fingerprint in sent.items() if name in names}
            for dtype, sent in self._sent.items()
        }

    def _require_change(
        self, before: Mapping[str, Fingerprint], norms: tuple[float, ...], version: PolicyVersion
    ) -> None:
        known = [name for name in self._learner if name in before]
        same = ""
        if norms and norms == self._norms:
            same = f"the norms of all {len(norms)} tensors are the same to the last bit"
        elif known and all(self._learner[name].number == before[name].number for name in known):
            same = (
                f"{known[0]!r} still has fingerprint {self._learner[known[0]].number:.9g}, and so do the other "
                f"{len(known) - 1} compared"
            )
        if same:
            raise WeightMismatchError(
                f"version {version}: the learner took updates with a learning rate and a gradient above 0, "
                f"but its weights are those of version {self._version}: {same}. The optimizer does not hold "
                "the weights that are sent; look at what wraps the model"
            )

    def _compare(self, sent: Mapping[torch.dtype, Mapping[str, Fingerprint]], full: bool, when: str) -> float:
        """Largest relative difference of a target's fingerprints from those ``sent`` to its precision."""
        worst = 0.0
        for place, target in enumerate(self.targets):
            expected = sent[target.dtype]
            held = targets.fingerprint(target, None if full else frozenset(expected), self.deadline)
            try:
                compare(expected, held, target.fingerprint_rtol)
            except WeightMismatchError as error:
                if self.pushes == 0:
                    raise NeverHeldError(
                        f"{when}: {error}. No load has reached it yet: this engine cannot be given this "
                        "architecture; "
                        "choose the other rollout.engine"
                    ) from None
                which = f", target {place} of {len(self.targets)}" if len(self.targets) > 1 else ""
                raise WeightMismatchError(
                    f"{when}{which}: {error}. Look for what writes the engine's weights besides this push (a "
                    "reload from "
                    "disk, a wake after sleep), or keeps it from reaching a layer that is fused, packed or "
                    "tied; what "
                    "was sampled since the last comparison is suspect"
                ) from None
            for name, fingerprint in expected.items():
                difference = abs(held[name].number - fingerprint.number)
                worst = max(worst, difference / max(abs(fingerprint.number), 1e-30))
        return worst
