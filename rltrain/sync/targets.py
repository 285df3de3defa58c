"""The calls of a weight target, each with a deadline, so that a hanging target ends the process."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from rltrain.protocols import WeightTarget
from rltrain.tensor_ops import Fingerprint
from rltrain.types.samples import PolicyVersion
from rltrain.watchdog import Deadline


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
