"""Models that are never trained: checks that one fits the policy, loading, and weights for an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from rltrain.config.schema import Model
from rltrain.errors import UserError
from rltrain.learner.adapter_off import AdapterOff, FrozenModel
from rltrain.learner.forward import PolicyForward
from rltrain.learner.loading import Head, load_causal_lm, require_weights
from rltrain.learner.trained_model import TrainedModel
from rltrain.model_files import config_source
from rltrain.model_limits import require_context, require_room_for_tokens
from rltrain.remote_code import refusing_untrusted, trusts
from rltrain.weight_names import CheckpointNames

__all__ = [
    "frozen_model",
    "frozen_or_adapter_off",
    "load_frozen",
    "reference_weights",
    "require_companion",
    "require_same_tokens",
    "weights_of",
]

# The fields of a config that decide the shapes of the weights.
_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def require_same_tokens(tokenizer: PreTrainedTokenizerBase, model: str, key: str, path: str) -> None:
    """Raises UserError unless the model at ``path`` has the tokens of ``model``: otherwise its log-probs
    would be of another text.

    key: the recipe key that names ``path``, such as "model.reference".
    """
    try:
        with refusing_untrusted(path):
            other = AutoTokenizer.from_pretrained(path, trust_remote_code=trusts(path)).get_vocab()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{key} {path!r} is no model folder and cannot be downloaded from the Hub ({reason})"
        ) from error
    vocabulary = tokenizer.get_vocab()
    if differing := sorted(vocabulary.items() ^ other.items(), key=lambda item: item[1]):
        token = differing[0][0]
        raise UserError(
            f"{key} {path} has another tokenizer than {model}: token {token!r} is {other.get(token)} there "
            f"and {vocabulary.get(token)} here ({len(other)} and {len(vocabulary)} tokens); choose a model "
            "of the same family, since log-probs are compared token by token"
        )


def require_companion(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    key: str,
    path: str,
    *,
    head: Head,
    sizes: Mapping[str, int],
) -> None:
    """Raises UserError unless the model at ``path`` can read the rows of ``model``: their tokens and their
    lengths, with complete weights.

    head: the kind of output that it must have. sizes: the most tokens of each part of a row, by recipe key.
    """
    require_same_tokens(tokenizer, model, key, path)
    with refusing_untrusted(path):
        source, revision = config_source(path, None)
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trusts(source))
        require_context(config, f"{key} {path}", sizes)
        require_room_for_tokens(tokenizer, int(config.get_text_config().vocab_size), path)
    require_weights(path, None, head)


def frozen_or_adapter_off(path: str | None, model: Model, trained: TrainedModel) -> FrozenModel:
    """``load_frozen``; the model as an adapter started from it is ``trained`` with the adapter off."""
    if path is None and trained.adapter is not None:
        return AdapterOff(trained)
    return load_frozen(path, model, trained.device)


def load_frozen(path: str | None, model: Model, device: torch.device) -> PolicyForward:
    """The model at ``path``, ready for passes without gradients. path: None means ``model`` as it started."""
    frozen = load_causal_lm(path or model.path, None if path else model.revision, model.attention)
    return PolicyForward(frozen.requires_grad_(False)).to(device).eval()


@contextmanager
def frozen_model(path: str | None, model: Model, trained: TrainedModel) -> Iterator[FrozenModel]:
    """``frozen_or_adapter_off`` as a block, after which a second model can be freed."""
    yield frozen_or_adapter_off(path, model, trained)


def weights_of(frozen: FrozenModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of ``frozen`` under the names that ``weights`` of a learner gives them."""
    if isinstance(frozen, AdapterOff):
        yield from frozen.weights()
        return
    yield from ((name.removeprefix("model."), weight) for name, weight in frozen.state_dict().items())


def reference_weights(model: Model, trained: TrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The frozen reference's weights by checkpoint name, in an engine's ``dtype``, in host memory.

    Raises UserError if their shapes are not the policy's. A collective where ``trained`` has an adapter.
    """
    if model.reference is None and trained.adapter is not None:
        return {name: weight.to("cpu", dtype, copy=True) for name, weight in trained.base_weights()}
    policy = trained.model
    frozen = load_causal_lm(
        model.reference or model.path, None if model.reference else model.revision, model.attention
    )
    fields = policy.config.get_text_config().to_dict()
    frozen_fields = frozen.config.get_text_config().to_dict()
    if differing := [key for key in _SHAPE if fields.get(key) != frozen_fields.get(key)]:
        raise UserError(
            f"rollout.extra_samples reference: one engine samples from {model.path} and {model.reference}, "
            f"but their {differing[0]} differ: {fields.get(differing[0])} and "
            f"{frozen_fields.get(differing[0])}; set model.reference to a model of the same shape"
        )
    weights = CheckpointNames(frozen).to_checkpoint(frozen.state_dict().items())
    return {name: weight.to(dtype) for name, weight in weights}
