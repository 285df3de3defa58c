"""Sends adapters to workers that hold the base themselves, and proves that they multiply with them.

The files of a version go through the worker's own server, so that no disk is shared. A version is loaded
under a name of its own beside the one before, which is then removed; nothing samples meanwhile. Proved are
every A and B, by two numbers each that both sides compute, and, of a worker that is new, every weight of its
base.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch

from rltrain.adapter_files import NamedAdapter, expected_fingerprints, write_adapter
from rltrain.errors import TemporaryError
from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.sync.pool import merge_fingerprints
from rltrain.sync.server import RTOL, WorkerLink, merge_copies
from rltrain.sync.targets import AdapterControl, WorkerControl
from rltrain.sync.transport import WORKER_ERRORS, start_call
from rltrain.tensor_ops import Fingerprint

__all__ = ["AdapterLink", "AdapterPoolPush"]

_Read = TypeVar("_Read")


@dataclass
class AdapterLink:
    """Everything about the adapters of one worker, on rank 0 of the learner.

    link: through whose store the worker's processes prove what they hold. name: of the adapter that was
    loaded last; empty: none. is_base_proved: its base is the other workers'.
    """

    link: WorkerLink
    name: str = ""
    is_base_proved: bool = False
    _rank: int = 0
    _sent: list[str] = field(default_factory=list)  # names that were not removed since

    @property
    def control(self) -> AdapterControl:
        return cast("AdapterControl", self.link.control)

    def load_adapter(self, adapter: NamedAdapter) -> None:
        """Uploads and loads ``adapter`` in the worker's precision, and removes the one before."""
        with write_files(adapter, self.link.dtype) as folder:
            self.load_folder(adapter, folder)

    def load_folder(self, adapter: NamedAdapter, folder: Path) -> None:
        """The same of files that are there."""
        self._join()
        if self.name == adapter.name:
            return
        call = self.link.channel.call
        if adapter.name in self._sent:
            call("remove what is left of an upload", self.control.unload_adapter, adapter.name)
        else:
            self._sent.append(adapter.name)
        path = call("take an adapter", self.control.upload_adapter, adapter.name, folder, size=adapter.size)
        call("load an adapter", self.control.load_adapter, adapter.name, path, size=adapter.size)
        self.name = adapter.name
        self._rank = adapter.config["r"]
        while len(self._sent) > 1:
            call("remove an adapter", self.control.unload_adapter, self._sent[0])
            self._sent.pop(0)

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """Of the base's weights; see ``WeightTarget.fingerprint``."""
        self._join()
        return self.link.fingerprint(names)

    def adapter_fingerprint(self) -> Mapping[str, Fingerprint]:
        """Of every A and scale B of the adapter that was loaded last; NaN where copies differ."""
        numbers = self.link.channel.call("say which adapters it has", self.control.find_adapters)
        if self.name not in numbers:
            raise RuntimeError(
                f"{self.link.name} does not offer adapter {self.name}; it has {sorted(numbers)}"
            )
        return merge_copies(self.link.read_adapter(numbers[self.name], self._rank))

    def prove(self, expected: Mapping[str, Fingerprint]) -> None:
        """Raises WeightMismatchError where the adapter is not the expected one."""
        try:
            compare(expected, self.adapter_fingerprint(), RTOL)
        except WeightMismatchError as error:
            raise WeightMismatchError(f"{self.link.name}, adapter: {error}") from None

    def prove_base(self, expected: Mapping[str, Fingerprint]) -> None:
        """Raises WeightMismatchError where the base is not the expected one."""
        try:
            compare(expected, self.fingerprint(), RTOL)
        except WeightMismatchError as error:
            raise WeightMismatchError(f"{self.link.name}, base of the adapter: {error}") from None
        self.is_base_proved = True

    def score(self, token_ids: Sequence[int], model: str) -> list[float]:
        """Nats of each token but the first, at temperature 1. model: the adapter's name, or the base's."""
        return self.link.channel.call("score the probe", self.control.score, token_ids, model)

    def _join(self) -> None:
        """Opens the store of the proofs to the worker's processes."""
        self.link.channel.error = None
        self.link.channel.join()

    def close(self) -> None:
        """Removes what was sent from a worker that goes on."""
        with contextlib.suppress(*WORKER_ERRORS):
            for name in self._sent if self.link.channel.error is None else ():
                self.link.channel.call("remove an adapter", self.control.unload_adapter, name)
        self.link.close()


@dataclass
class AdapterPoolPush:
    """Sends adapters to the workers of a pool, which come and go between two pushes.

    make_link: the link to a worker, by its name and its client. dtype: of the workers' weights.
    """

    make_link: Callable[[str, WorkerControl], WorkerLink]
    dtype: torch.dtype
    _links: dict[str, AdapterLink] = field(default_factory=dict)
    _base: dict[str, Fingerprint] = field(default_factory=dict)  # of every worker, once it was compared
    _held: Mapping[str, Fingerprint] = field(default_factory=dict)  # of the adapter in use
    _proved: frozenset[str] = frozenset()  # workers whose adapter was compared after the last push

    def push_adapter(
        self, workers: Mapping[str, WorkerControl], adapter: NamedAdapter
    ) -> tuple[tuple[str, ...], Mapping[str, Exception], Mapping[str, Exception]]:
        """The workers that were served, lost and quarantined; workers are clients by name."""
        links = {name: self._link(name, control) for name, control in workers.items()}
        expected = expected_fingerprints(adapter.weights, adapter.scale, self.dtype) if links else {}
        served: list[str] = []
        lost: dict[str, Exception] = {}
        quarantined: dict[str, Exception] = {}
        with write_files(adapter, self.dtype) if links else contextlib.nullcontext(Path()) as folder:
            calls = [
                (name, start_call(self._serve, link, adapter, folder, expected))
                for name, link in links.items()
            ]
            for name, call in calls:
                try:
                    call.result()
                    served.append(name)
                except WeightMismatchError as error:
                    quarantined[name] = error
                except WORKER_ERRORS as error:
                    lost[name] = error
                    links[name].link.channel.fail(error)
        self._proved = frozenset(served)
        if served:
            self._held = expected
        elif quarantined:  # so that the comparison fails
            self._held = self._read_refused(next(iter(quarantined)), expected)
        for name in {*lost, *quarantined}:
            self._links.pop(name).close()
        return tuple(served), lost, quarantined

    def _serve(
        self, link: AdapterLink, adapter: NamedAdapter, folder: Path, expected: Mapping[str, Fingerprint]
    ) -> None:
        """An upload that fails has a second try. Raises WeightMismatchError where a proof fails."""
        try:
            link.load_folder(adapter, folder)
        except WORKER_ERRORS as error:
            link.link.channel.fail(error)
            link.load_folder(adapter, folder)
        if self._base and not link.is_base_proved:
            link.prove_base(self._base)
        link.prove(expected)

    def read(
        self, workers: Mapping[str, WorkerControl]
    ) -> tuple[Mapping[str, Fingerprint], Mapping[str, Exception]]:
        """The fingerprints of the bases, NaN where they differ, and the workers that do not answer."""
        known = [name for name in workers if name in self._links]
        held, errors = self._read_each(known, AdapterLink.fingerprint)
        for fingerprints in held:
            self._base = _merge(self._base, fingerprints)
        for name in known:
            self._links[name].is_base_proved = True
        if not self._base:
            raise TemporaryError(f"no worker is left that holds the adapter's base: {_list_errors(errors)}")
        return self._base, errors

    def read_adapter(
        self, workers: Mapping[str, WorkerControl]
    ) -> tuple[Mapping[str, Fingerprint], Mapping[str, Exception]]:
        """The same of the adapter. What a push has just proved is not read again."""
        known = [name for name in workers if name in self._links and name not in self._proved]
        self._proved = frozenset()
        held, errors = self._read_each(known, AdapterLink.adapter_fingerprint)
        merged = self._held
        for fingerprints in held:
            merged = _merge(merged, fingerprints)
        return merged, errors

    def score(
        self, workers: Mapping[str, WorkerControl], token_ids: Sequence[int], model: str
    ) -> tuple[list[list[float]], Mapping[str, Exception]]:
        """A row of every worker: nats of each token but the first; and the workers that do not answer."""
        known = [name for name in workers if name in self._links]
        return self._read_each(known, lambda link: link.score(token_ids, model))

    def _read_each(
        self, names: Sequence[str], read: Callable[[AdapterLink], _Read]
    ) -> tuple[list[_Read], dict[str, Exception]]:
        """What the workers answer, asked at once, and the errors of the others."""
        calls = [(name, start_call(read, self._links[name])) for name in names]
        answers: list[_Read] = []
        errors: dict[str, Exception] = {}
        for name, call in calls:
            try:
                answers.append(call.result())
            except WORKER_ERRORS as error:
                errors[name] = error
        return answers, errors

    def _read_refused(self, name: str, expected: Mapping[str, Fingerprint]) -> Mapping[str, Fingerprint]:
        """What a quarantined worker multiplies with."""
        try:
            return self._links[name].adapter_fingerprint()
        except WORKER_ERRORS:
            return {weight: Fingerprint(math.nan, math.nan) for weight in expected}

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _link(self, name: str, control: WorkerControl) -> AdapterLink:
        """The worker's link; a worker that came back has another client, and gets a new one."""
        link = self._links.get(name)
        if link is None or link.control is not control:
            if link is not None:
                link.link.channel.fail(RuntimeError("the worker came back with another client"))
                link.close()
            link = self._links[name] = AdapterLink(self.make_link(name, control))
        return link


def _merge(held: Mapping[str, Fingerprint], others: Mapping[str, Fingerprint]) -> dict[str, Fingerprint]:
    """What two workers have together; where they differ, the second's. Empty: nothing was held before."""
    return merge_fingerprints(held, others) if held else dict(others)


def _list_errors(errors: Mapping[str, Exception]) -> str:
    return "; ".join(f"{name}: {error}" for name, error in errors.items()) or "none answered"


@contextmanager
def write_files(adapter: NamedAdapter, dtype: torch.dtype) -> Iterator[Path]:
    """A folder with the adapter's files while the block lasts, rounded as an engine of ``dtype`` would."""
    with tempfile.TemporaryDirectory(prefix="rltrain-adapter-") as parent:
        folder = Path(parent) / adapter.name
        write_adapter(
            folder, adapter.config, ((name, weight.to(dtype)) for name, weight in adapter.weights.items())
        )
        yield folder
