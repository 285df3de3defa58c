"""The calls of a weight target, each with a deadline, so that a hanging target ends the process."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from rltrain.protocols import WeightTarget
from rltrain.tensor_ops import Fingerprint
from rltrain.types.samples import PolicyVersion
from rltrain.watchdog import Deadline


class WorkerControl(Protocol):
    """The calls of a rollout worker that stop it, send it weights and start it again. All of them block."""

    def pause(self, mode: Literal["keep", "wait", "abort"], clear_cache: bool) -> None: ...

    def init_transfer(self, init_info: Mapping[str, object]) -> None: ...

    def start_update(self) -> None: ...

    def update(self, update_info: Mapping[str, object]) -> None: ...

    def finish_update(self, version: str) -> None: ...

    def call_workers(self, method: str, arguments: Mapping[str, str]) -> list[object]: ...

    def world_size(self) -> int:
        """Number of the processes that hold weights: tensor x pipeline x data parallel."""
        ...

    def resume(self) -> None: ...


class AdapterControl(WorkerControl, Protocol):
    """The calls of a worker that takes adapters beside a base of its own."""

    def upload_adapter(self, name: str, folder: Path) -> str:
        """Sends the files of one version; returns their folder on the worker's machine."""
        ...

    def load_adapter(self, name: str, path: str) -> None: ...

    def unload_adapter(self, name: str) -> None: ...

    def find_adapters(self) -> dict[str, int]:
        """vLLM's numbers of the adapters that are loaded, by name."""
        ...

    def score(self, token_ids: Sequence[int], model: str) -> list[float]:
        """Nats of each token but the first, at temperature 1."""
        ...


def load(
    target: WeightTarget, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion, deadline: Deadline
) -> None:
    with deadline(f"the {target.name} engine", f"to load version {version}"):
        target.load(stream, version)


def fingerprint(
    target: WeightTarget, names: Collection[str] | None, deadline: Deadline
) -> Mapping[str, Fingerprint]:
    with deadline(f"the {target.name} engine", "to say which weights it holds"):
        return target.fingerprint(names)


def sleep(target: WeightTarget, deadline: Deadline) -> None:
    with deadline(f"the {target.name} engine", "to fall asleep"):
        target.sleep()


def wake(target: WeightTarget, deadline: Deadline) -> None:
    with deadline(f"the {target.name} engine", "to wake up"):
        target.wake()
