"""Pushes of adapters to workers that fail, hold something else, or come later."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rltrain.adapter_files import NamedAdapter, expected_fingerprints
from rltrain.errors import TemporaryError
from rltrain.rollout.worker.requests import AdapterNames
from rltrain.sync.adapter_server import AdapterPoolPush
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.tensor_ops import Fingerprint, weight_fingerprint

DOWN = "base_model.model.x.lora_A.weight"
UP = "base_model.model.x.lora_B.weight"
CONFIG = {"r": 2, "lora_alpha": 8, "use_rslora": False}


@dataclass
class Worker:
    """Implements ``AdapterControl`` and the part of ``WorkerLink`` that is used, with faults to order.

    failures: calls that still fail, by name. spoilt: a matrix that it computes with otherwise.
    """

    base: Tensor = field(default_factory=lambda: torch.arange(6.0).reshape(2, 3))
    folder: Path = Path()
    failures: dict[str, int] = field(default_factory=dict)
    spoilt: str = ""
    calls: list[str] = field(default_factory=list)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    name: str = "worker"
    dtype: torch.dtype = torch.float32
    error: Exception | None = None
    is_closed: bool = False

    @property
    def control(self) -> Worker:
        return self

    @property
    def channel(self) -> Worker:
        return self

    def join(self) -> None: ...

    def fail(self, error: Exception) -> None:
        self.error = self.error or error

    def call(self, what: str, call: Any, *arguments: Any, size: int = 0) -> Any:
        return call(*arguments)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.failures.get(call, 0) > 0:
            self.failures[call] -= 1
            raise OSError(f"{call} by order")

    def upload_adapter(self, name: str, folder: Path) -> str:
        assert name not in self.files, "every version has a name of its own"
        self.files[name] = load_file(folder / "adapter_model.safetensors")
        self._note("upload")
        return name

    def load_adapter(self, name: str, path: str) -> None:
        self._note("load")
        assert name not in self.adapters
        self.adapters[name] = self.files[path]

    def unload_adapter(self, name: str) -> None:
        self._note("unload")
        self.adapters.pop(name, None)
        self.files.pop(name, None)

    def find_adapters(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.adapters)}

    def score(self, token_ids: Any, model: str) -> list[float]:
        self._note("score")
        return [-1.0] * (len(token_ids) - 1)

    def read_adapter(self, identity: int, rank: int) -> list[dict[str, Fingerprint]]:
        assert rank == CONFIG["r"]
        weights = dict(list(self.adapters.values())[identity])
        if self.spoilt:
            weights[self.spoilt] = weights[self.spoilt] + 1e-6
        return [expected_fingerprints(weights, 4.0, self.dtype)]

    def fingerprint(self, names: Any = None) -> dict[str, Fingerprint]:
        return {"w": weight_fingerprint("w", self.base)}

    def close(self) -> None:
        self.is_closed = True


def make_push() -> AdapterPoolPush:
    return AdapterPoolPush(lambda name, control: cast("Any", control), torch.float32)


def make_adapter(names: AdapterNames, version: int = 1) -> NamedAdapter:
    generator = torch.Generator().manual_seed(version)
    weights = {
        DOWN: torch.randn(2, 3, generator=generator),
        UP: torch.randn(4, 2, generator=generator),
    }
    return NamedAdapter(names.next(version), CONFIG, weights)


def clients(*workers: Worker) -> Any:
    for place, worker in enumerate(workers):
        worker.name = f"worker {place}"
    return {worker.name: worker for worker in workers}


def test_a_version_replaces_the_one_before_and_is_proved() -> None:
    push, names, worker = make_push(), AdapterNames(), Worker()
    first = make_adapter(names)
    assert push.push_adapter(clients(worker), first) == (("worker 0",), {}, {})
    assert list(worker.adapters) == [first.name]
    held, errors = push.read_adapter(clients(worker))
    assert not errors and held == expected_fingerprints(first.weights, 4.0, torch.float32)

    second = make_adapter(names, 2)
    push.push_adapter(clients(worker), second)
    assert list(worker.adapters) == list(worker.files) == [second.name]
    push.close()
    assert not worker.files and worker.is_closed


def test_one_that_is_there_is_not_sent_again() -> None:
    push, worker = make_push(), Worker()
    adapter = make_adapter(AdapterNames())
    push.push_adapter(clients(worker), adapter)
    push.push_adapter(clients(worker), adapter)
    assert worker.calls.count("upload") == 1


@pytest.mark.parametrize("call", ["upload", "load"])
def test_an_upload_that_fails_is_tried_once_more(call: str) -> None:
    push, names = make_push(), AdapterNames()
    mended, broken = Worker(failures={call: 1}), Worker(failures={call: 2})
    served, lost, quarantined = push.push_adapter(clients(mended, broken), make_adapter(names))
    assert served == ("worker 0",) and not quarantined
    assert list(lost) == ["worker 1"] and "by order" in str(lost["worker 1"])
    assert broken.is_closed and len(mended.files) == 1


@pytest.mark.parametrize("spoilt", [DOWN, UP])
def test_a_worker_that_computes_with_another_matrix_is_quarantined(spoilt: str) -> None:
    push, names = make_push(), AdapterNames()
    sound, wrong = Worker(), Worker(spoilt=spoilt)
    served, lost, quarantined = push.push_adapter(clients(sound, wrong), make_adapter(names))
    assert served == ("worker 0",) and not lost
    assert isinstance(quarantined["worker 1"], WeightMismatchError)
    assert spoilt in str(quarantined["worker 1"])


def test_where_nobody_is_left_what_the_wrong_worker_holds_is_told() -> None:
    push, adapter = make_push(), make_adapter(AdapterNames())
    push.push_adapter(clients(Worker(spoilt=UP)), adapter)
    held, _ = push.read_adapter({})
    expected = expected_fingerprints(adapter.weights, 4.0, torch.float32)
    assert held[DOWN] == expected[DOWN] and held[UP] != expected[UP]


def test_a_worker_that_changed_since_the_push_shows() -> None:
    push, adapter = make_push(), make_adapter(AdapterNames())
    first, second = Worker(), Worker()
    push.push_adapter(clients(first, second), adapter)
    push.read_adapter(clients(first, second))
    second.spoilt = DOWN
    held, _ = push.read_adapter(clients(first, second))
    assert held[DOWN] != expected_fingerprints(adapter.weights, 4.0, torch.float32)[DOWN]


def test_a_late_worker_has_the_base_of_the_others_or_is_quarantined() -> None:
    push, names = make_push(), AdapterNames()
    first = Worker()
    adapter = make_adapter(names)
    push.push_adapter(clients(first), adapter)
    base, _ = push.read(clients(first))
    assert base == first.fingerprint()
    late, other = Worker(), Worker(base=torch.zeros(2, 2))
    served, _, quarantined = push.push_adapter({"late": late, "other": other}, adapter)
    assert served == ("late",)
    assert "base of the adapter" in str(quarantined["other"])


def test_bases_that_differ_at_the_first_push_show() -> None:
    push = make_push()
    first, second = Worker(), Worker(base=torch.zeros(2, 2))
    workers = clients(first, second)
    push.push_adapter(workers, make_adapter(AdapterNames()))
    base, _ = push.read(workers)
    assert base != first.fingerprint()


def test_without_a_worker_that_has_the_base_the_run_ends_and_may_go_on_later() -> None:
    push = make_push()
    assert push.push_adapter({}, make_adapter(AdapterNames())) == ((), {}, {})
    with pytest.raises(TemporaryError, match="no worker is left"):
        push.read({})


def test_a_worker_that_does_not_score_is_told_apart() -> None:
    push = make_push()
    first, second = Worker(), Worker(failures={"score": 1})
    workers = clients(first, second)
    push.push_adapter(workers, make_adapter(AdapterNames()))
    rows, errors = push.score(workers, (1, 2, 3), "policy")
    assert rows == [[-1.0, -1.0]] and list(errors) == ["worker 1"]
