"""Sends the learner's adapter to engines that hold the base model themselves, and proves that they use it.

Three proofs: every weight of the base is compared once, and again with every ``full_every``-th push; every A
and B is compared at every push, after sampling too; and the log-probs of one fixed row are compared with the
learner's at every push, which shows that the adapter takes part in a forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rltrain.adapter_files import expected_fingerprints
from rltrain.protocols import WeightTarget
from rltrain.sync import targets
from rltrain.sync.colocated import WeightStream
from rltrain.sync.fingerprint import NeverHeldError, WeightMismatchError, compare
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.types.samples import PolicyVersion
from rltrain.watchdog import Deadline, no_deadline

__all__ = ["AdapterSync", "AdapterTarget", "Probe"]


class AdapterTarget(WeightTarget, Protocol):
    """An engine that holds the base model and takes adapters."""

    def load_adapter(
        self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], version: PolicyVersion
    ) -> None:
        """Sample with this adapter as ``version`` from now on, and forget the one before.

        config: the content of its adapter_config.json. weights: by peft's names, unsharded.
        """
        ...

    def use_base(self, version: PolicyVersion) -> None:
        """Sample with the base alone as ``version`` from now on."""
        ...

    def adapter_fingerprint(self) -> Mapping[str, Fingerprint]:
        """Fingerprints of A and of scale times B, by peft's names, over the weights in use."""
        ...

    def prompt_log_probs(self, token_ids: Sequence[int]) -> Sequence[Sequence[float]]:
        """Nats of each token but the first, at temperature 1, of the weights in use: a row of every server
        that has them.
        """
        ...


class AdapterLearner(Protocol):
    """The part of a learner whose weights are sent."""

    def adapter_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Probe:
    """A row that engine and learner both score. tolerance: nats, of the mean difference of its tokens."""

    token_ids: tuple[int, ...]
    log_probs: Callable[[], Sequence[float]]  # the learner's; a collective
    tolerance: float


@dataclass
class AdapterSync:
    """Implements the methods of ``Sync`` for an adapter.

    base: the learner's base weights by checkpoint name. config: the adapter's. scale: of B A. full_every:
    pushes between comparisons of the base; 0: only the first.
    """

    targets: Sequence[AdapterTarget]
    base: WeightStream
    ties: Mapping[str, str]
    config: Mapping[str, Any]
    scale: float
    probe: Probe
    full_every: int
    deadline: Deadline = no_deadline
    pushes: int = 0
    _version: PolicyVersion = -1
    _sent: dict[torch.dtype, dict[str, Fingerprint]] = field(default_factory=dict)
    _learner: dict[str, Fingerprint] = field(default_factory=dict)  # unrounded
    _is_base_proved: bool = False

    def stream_of(self, learner: AdapterLearner) -> WeightStream:
        """What a push of ``learner`` sends."""
        return learner.adapter_weights

    def push(
        self,
        weights: WeightStream,
        version: PolicyVersion,
        *,
        expect_change: bool,
        norms: Callable[[], tuple[float, ...]] = tuple,
    ) -> dict[str, float]:
        """Wake the targets, load the adapter ``weights`` as ``version`` and prove it; returns metrics.

        Raises WeightMismatchError as ``Sync.push`` does, NeverHeldError where the base is not the learner's.
        norms: not read, since fingerprints of the unrounded adapter show a change.
        """
        del norms
        before = self._learner
        adapter = {name: weight.detach().clone() for name, weight in weights(torch.float32)}
        self._learner = {name: weight_fingerprint(name, weight) for name, weight in adapter.items()}
        self._sent = {
            target.dtype: expected_fingerprints(adapter, self.scale, target.dtype) for target in self.targets
        }
        for target in self.targets:
            targets.wake(target, self.deadline)
            with self.deadline(f"the {target.name} engine", f"to load the adapter of version {version}"):
                target.load_adapter(self.config, adapter.items(), version)
        if expect_change and version > self._version:
            self._require_change(before, version)
        is_due = self.full_every > 0 and self.pushes % self.full_every == 0
        checked = 0
        if is_due or not self._is_base_proved:
            checked = self._compare_base()
        when = f"after the push of version {version}"
        worst = self._compare(when)
        difference = self._compare_probe(when)
        self.pushes += 1
        self._version = version
        checked += len(self._learner)
        return {"sync/checked": float(checked), "sync/difference": worst, "sync/probe": difference}

    def verify(self, *, every: bool = False) -> None:
        """Raises WeightMismatchError unless the targets still hold the adapter that was pushed last.

        every: compares the base too.
        """
        if every:
            self._compare_base()
        self._compare(f"after sampling with version {self._version}")

    def verify_all(self, weights: WeightStream) -> None:
        """Raises WeightMismatchError unless the targets hold the base and the adapter ``weights``."""
        adapter = dict(weights(torch.float32))
        self._sent = {
            target.dtype: expected_fingerprints(adapter, self.scale, target.dtype) for target in self.targets
        }
        self.verify(every=True)

    def sleep(self) -> None:
        """Let every target release its device memory until the next push."""
        for target in self.targets:
            targets.sleep(target, self.deadline)

    @contextlib.contextmanager
    def switch_off(self, version: PolicyVersion, weights: WeightStream) -> Iterator[None]:
        """Inside, the targets sample with the base alone, as ``version``; afterwards with the adapter."""
        self.verify()
        for target in self.targets:
            target.use_base(version)
        yield
        self._compare_base()
        self.push(weights, self._version, expect_change=False)

    def _expect(self, adapter: Mapping[str, Tensor]) -> dict[torch.dtype, dict[str, Fingerprint]]:
        """The fingerprints that engines should have, by their type."""
        return {
            target.dtype: expected_fingerprints(adapter, self.scale, target.dtype) for target in self.targets
        }

    def _require_change(self, before: Mapping[str, Fingerprint], version: PolicyVersion) -> None:
        if before and before == self._learner:
            raise WeightMismatchError(
                f"version {version}: the learner took updates with a learning rate and a gradient above 0, "
                f"but its adapter is that of version {self._version}, to the last of {len(before)} "
                "fingerprints. The optimizer does not hold the weights that are sent; look at what wraps the "
                "model"
            )

    def _compare(self, when: str) -> float:
        """The largest relative difference of an adapter's fingerprint from the one sent."""
        worst = 0.0
        for target in self.targets:
            expected = self._sent[target.dtype]
            with self.deadline(f"the {target.name} engine", "to say which adapter it holds"):
                held = target.adapter_fingerprint()
            self._require_equal(expected, held, target, f"{when}, adapter")
            for name, fingerprint in expected.items():
                difference = abs(held[name].number - fingerprint.number)
                worst = max(worst, difference / max(abs(fingerprint.number), 1e-30))
        return worst

    def _compare_base(self) -> int:
        """The number of base weights that were compared. Raises WeightMismatchError where one differs."""
        count = 0
        for target in self.targets:
            expected: dict[str, Fingerprint] = {}
            for name, weight in self.base(target.dtype):
                for alias in (*(second for second, first in self.ties.items() if first == name), name):
                    expected[alias] = weight_fingerprint(alias, weight.detach().to(target.dtype))
            held = targets.fingerprint(target, None, self.deadline)
            self._require_equal(expected, held, target, "base of the adapter")
            count = len(expected)
        self._is_base_proved = True
        return count

    def _require_equal(
        self,
        expected: Mapping[str, Fingerprint],
        held: Mapping[str, Fingerprint],
        target: AdapterTarget,
        when: str,
    ) -> None:
        try:
            compare(expected, held, target.fingerprint_rtol)
        except WeightMismatchError as error:
            if self.pushes == 0:
                raise NeverHeldError(
                    f"{when}: {error}. This engine cannot hold this model with an adapter; choose the other "
                    "rollout.engine"
                ) from None
            raise WeightMismatchError(
                f"{when}: {error}. All samples since the last comparison are suspect"
            ) from None

    def _compare_probe(self, when: str) -> float:
        """The mean difference in nats between the engines' and the learner's log-probs of the probe."""
        worst = 0.0
        expected = torch.tensor(list(self.probe.log_probs()))
        for target in self.targets:
            with self.deadline(f"the {target.name} engine", "to score the probe"):
                rows = target.prompt_log_probs(self.probe.token_ids)
            differences = [float((torch.tensor(list(row)) - expected).abs().mean()) for row in rows]
            worst = max(worst, *differences)
        if not worst <= self.probe.tolerance:
            raise WeightMismatchError(
                f"{when}: the engine's log-probs of the probe differ from the learner's by {worst:.3g} nats "
                f"a token (at most {self.probe.tolerance:g} is rounding), though its weights are the same: "
                "it does not multiply with the adapter"
            )
        return worst
