"""A second device on a machine without a GPU: its tensors are computed on the CPU, but say that they are
elsewhere, and an operation on tensors of both devices fails as it fails on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy")  # one that every build of torch knows and that needs no driver
_TAKES_INDICES_FROM_THE_CPU = ("aten::index", "aten::index_put_", "aten::index_put")
_COPIES = ("aten::_to_copy", "aten::copy_")


class _Elsewhere(Tensor):
    """A tensor on ``DEVICE``; ``values`` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=DEVICE
        )
        made.values = values
        return made

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        raise AssertionError(f"{operator} ran outside of FakeGpu")


class FakeGpu(TorchDispatchMode):
    """Inside, tensors of ``DEVICE`` can be made and used."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        tensors = [item for item in tree_flatten((arguments, options))[0] if isinstance(item, Tensor)]
        here = [item for item in tensors if not isinstance(item, _Elsewhere)]
        name = operator._schema.name
        target = options.get("device")
        is_elsewhere = len(here) < len(tensors)
        if is_elsewhere and name not in _COPIES:
            self._refuse_two_devices(name, here)
        if target is not None:
            is_elsewhere = torch.device(target).type == DEVICE.type
            options["device"] = torch.device("cpu")
        elif name == "aten::copy_":
            is_elsewhere = isinstance(arguments[0], _Elsewhere)

        wrappers = {id(item.values): item for item in tensors if isinstance(item, _Elsewhere)}

        def unwrap(item: Any) -> Any:
            return item.values if isinstance(item, _Elsewhere) else item

        def wrap(item: Any) -> Any:
            if not isinstance(item, Tensor) or not is_elsewhere:
                return item
            wrapper = wrappers.get(id(item))  # an operation in place returns its first argument
            return _Elsewhere(item) if wrapper is None else wrapper

        return tree_map(wrap, operator(*tree_map(unwrap, arguments), **tree_map(unwrap, options)))

    def _refuse_two_devices(self, name: str, here: list[Tensor]) -> None:
        if name not in _TAKES_INDICES_FROM_THE_CPU and any(item.dim() for item in here):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got two devices")


class _TensorsFromLists(TorchFunctionMode):
    """``torch.tensor`` and ``new_tensor`` allocate before any dispatch: here on the CPU, before a move."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        if function is torch.tensor and (device := options.pop("device", None)) is not None:
            return torch.tensor(*arguments, **options).to(device)
        if function is Tensor.new_tensor:
            tensor, values = arguments
            return torch.tensor(values, dtype=options.get("dtype", tensor.dtype)).to(tensor.device)
        return function(*arguments, **options)


def compute_elsewhere(function: Callable[[Any], Any], batch: Any) -> Any:
    """``function(batch)`` with the tensors of ``batch``, a dataclass with ``to``, on a device of their own;
    the result is on the CPU. Raises RuntimeError where tensors of two devices meet.
    """
    with FakeGpu(), _TensorsFromLists():
        result = function(batch.to(DEVICE))
        tensors, _ = tree_flatten([getattr(result, item.name) for item in dataclasses.fields(result)])
        for tensor in tensors:
            assert not isinstance(tensor, Tensor) or tensor.device.type == DEVICE.type
        return result.to("cpu")
