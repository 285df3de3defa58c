"""The names of a model's weights in a checkpoint: transformers renames and fuses some of them as it loads.

The experts of one layer, in a file ``experts.0.gate_proj.weight`` and so on, are one tensor
``experts.gate_up_proj`` inside the model. Files, vLLM and the fingerprints of a sync use the names of the
checkpoint; parameters and the optimizer's state use those inside the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from rltrain.shard_sums import Block

__all__ = ["CheckpointNames"]

Weights = Iterable[tuple[str, Tensor]]


class CheckpointNames:
    """Translates weights between the names inside ``model`` and those of its checkpoints, one group of
    tensors at a time.

    A group is the set of tensors that transformers converts together, at most the experts of one layer, so no
    second copy of the model is ever in memory. Built from the bare model, before a wrapper changes its
    classes. The names are those that ``save_pretrained`` writes for a model that was not loaded from a
    checkpoint, also where this model was loaded from one with older names.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        steps = get_model_conversion_mapping(model, add_legacy=False)
        loading = [step for step in steps if not isinstance(step, PrefixChange)]
        saving = [step.reverse_transform() for step in reversed(loading)]
        state = {name: _without_values(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        self._outward = _Conversion(saving, state, model.config, reverse=True)
        outside = dict(self._outward.apply(state.items()))
        self._inward = _Conversion(loading, outside, model.config, reverse=False)

        # Shapes by the names inside the model, and by checkpoint name.
        self.inside = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in outside.items()}

        # Where each weight of a checkpoint lies in a tensor of the model; without those that transformers
        # computes from several, or whose entries lie apart.
        with _WithoutCopies():
            views = dict(self._outward.apply(state.items()))
        sources = {tensor.untyped_storage()._cdata: name for name, tensor in state.items()}
        self.blocks = {
            name: Block(source, int(tensor.storage_offset()), tuple(tensor.shape))
            for name, tensor in views.items()
            if (source := sources.get(tensor.untyped_storage()._cdata)) is not None
            if tensor.is_contiguous()
        }

        # Checkpoint names of the parameters; a tied weight under its first name.
        trained = [(name, state[name]) for name, _ in model.named_parameters()]
        self.parameters = frozenset(name for name, _ in self._outward.apply(trained))
        self.ties = {
            self._checkpoint_name(second): self._checkpoint_name(first)
            for second, first in model.all_tied_weights_keys.items()
        }

    @property
    def are_blocks(self) -> bool:
        """Whether each weight of a checkpoint lies in one tensor of the model, whose shards can be summed."""
        return self.shapes.keys() <= self.blocks.keys()

    def to_checkpoint(
        self, weights: Weights, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """``weights`` of the model under their checkpoint names; fused ones are split, into views where
        possible.

        only: the checkpoint names to convert; others of the same groups may come with them. None: all.
        """
        return self._outward.apply(weights if only is None else self._select(weights, only))

    def from_checkpoint(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """``weights`` of a checkpoint under the names inside the model.

        Raises KeyError for a name that the model does not have.
        """
        return self._inward.apply(weights)

    def _select(self, weights: Weights, only: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The ``weights`` that are converted together with a checkpoint name of ``only``."""
        groups = {self._inward.keys[name][0] for name in only if name in self._inward.keys}
        return ((name, tensor) for name, tensor in weights if not groups.isdisjoint(self._group_of(name)))

    def _group_of(self, name: str) -> set[str]:
        """The names inside the model of all weights that are converted together with ``name``."""
        return self._outward.members[self._outward.keys[name][0]]

    def _checkpoint_name(self, name: str) -> str:
        """The checkpoint name of a weight that is not fused with others; tied ones never are."""
        return self._outward.keys[name][0]


class _WithoutCopies(TorchFunctionMode):
    """Inside, a copy of a tensor in another layout is the tensor itself, so that its place can be read."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def _without_values(tensor: Any) -> Tensor:
    """An empty tensor of a weight's type and shape; the full shape where ZeRO-3 has split the weight."""
    return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")


class _Conversion:
    """One direction of a model's conversion: which tensors are converted together, and how."""

    def __init__(
        self, steps: Collection[Any], weights: Mapping[str, Tensor], config: Any, *, reverse: bool
    ) -> None:
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        self._by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
        self._config = config
        self.keys: dict[str, tuple[str, str | None]] = {}  # name -> (group, pattern of its converter)
        self.members: dict[str, set[str]] = {}
        for name in sorted(weights, key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, reverse=reverse)
            self.keys[name] = key, pattern
            self.members.setdefault(key, set()).add(name)

    def apply(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """Yields each group as soon as its last tensor has come; groups that stay incomplete are dropped."""
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights:
            key, pattern = self.keys[name]
            if pattern is None:
                yield key, tensor
                continue
            group = waiting.setdefault(key, {})
            group[name] = tensor
            if len(group) == len(self.members[key]):
                yield from self._convert_group(key, waiting.pop(key))

    def _convert_group(self, key: str, group: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        names = sorted(group, key=dot_natural_key)
        converter: Any = deepcopy(self._by_pattern[self.keys[names[0]][1] or ""])
        for name in names:
            converter.add_tensor(key, name, self.keys[name][1], group[name].detach())
        for name, tensor in converter.convert(key, model=None, config=self._config).items():
            yield name, tensor[0] if isinstance(tensor, list) else tensor
