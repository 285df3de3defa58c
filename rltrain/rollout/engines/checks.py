"""Checks that every engine makes: the version of the weights, the length of a prompt, the names and shapes of
weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from rltrain.protocols import EngineState, WeightTarget, WrongVersionError
from rltrain.types.samples import PolicyVersion, Request


def require_version(engine: WeightTarget, version: PolicyVersion) -> None:
    """Raises WrongVersionError unless the engine holds ``version`` and is awake."""
    if engine.state not in (EngineState.LOADED, EngineState.SERVING):
        raise WrongVersionError(
            f"asked to generate for version {version} while {engine.state.value}: no weights are held; call "
            f"load(weights, {version}) first"
        )
    if engine.version != version:
        raise WrongVersionError(
            f"asked to generate for version {version} but the weights held are version {engine.version}; "
            "load it first"
        )


def require_fit(requests: Sequence[Request], limit: int, what: str) -> None:
    """Raises ValueError for an empty prompt, or one that with its ``max_tokens`` exceeds ``limit`` tokens."""
    for request in requests:
        prompt = request.prompt
        sampling = request.sampling
        length = len(prompt.token_ids)
        if sampling.max_tokens < 1 or not sampling.temperature >= 0:
            raise ValueError(f"max_tokens must be at least 1 and temperature at least 0, got {sampling}")
        if length == 0:
            raise ValueError(
                f"prompt {prompt.id!r} has no tokens; give it at least one (a BOS token, or a chat template)"
            )
        if length + sampling.max_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id!r} has {length} tokens and rollout.max_tokens is {sampling.max_tokens}: "
                f"together over the {limit} of {what}; lower data.max_prompt_tokens or rollout.max_tokens"
            )


class WeightShapes:
    """The weights that a model expects, by checkpoint name.

    A tied head is optional, because it is the embedding under a second name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], parameters: Collection[str]) -> None:
        self.allowed = shapes
        self.required = frozenset(parameters)

    def check(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields ``weights`` unchanged.

        Raises ValueError at an unknown name or a wrong shape, and at the end if a weight is missing.
        """
        missing = set(self.required)
        for name, tensor in weights:
            if name not in self.allowed:
                raise ValueError(
                    f"weight {name!r} is not one of the engine's model (for example {min(self.required)!r}); "
                    "load takes the names of a checkpoint, without wrapper or adapter prefixes"
                )
            if tuple(tensor.shape) != self.allowed[name]:
                raise ValueError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, the engine's model "
                    f"{self.allowed[name]}; gather shards into full tensors"
                )
            missing.discard(name)
            yield name, tensor
        if missing:
            raise ValueError(
                f"{len(missing)} weights never arrived, first {min(missing)!r}; load takes every weight of "
                "the model"
            )
