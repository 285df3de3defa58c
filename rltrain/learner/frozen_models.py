"""Models that are never trained: checks that one fits the policy, loading, and weights for an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from rltrain.config.schema import Model
from rltrain.errors import UserError
from rltrain.learner.adapter_off import AdapterOff, FrozenModel
from rltrain.learner.forward import PolicyForward
from rltrain.learner.loading import Head, load_causal_lm, require_weights
from rltrain.learner.precision import COMPUTE_DTYPES, computes_throughout, stored_dtypes
from rltrain.learner.ranks import loading_on_rank_0
from rltrain.learner.shards import gather_rows, put_full
from rltrain.learner.trained_model import TrainedModel
from rltrain.model_files import config_source
from rltrain.model_limits import require_context, require_room_for_tokens
from rltrain.remote_code import refusing_untrusted, trusts
from rltrain.tensor_ops import weight_fingerprint
from rltrain.weight_names import CheckpointNames

__all__ = [
    "frozen_model",
    "frozen_or_adapter_off",
    "load_frozen",
    "reference_weights",
    "require_companion",
    "require_same_tokens",
    "weights_digest",
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
    return load_frozen(path, model, trained)


def load_frozen(path: str | None, model: Model, trained: TrainedModel) -> PolicyForward:
    """The model at ``path``, ready for passes without gradients beside ``trained``. path: None means
    ``model`` as it started.

    Rank 0 reads it and sends one tensor at a time. Its products run in the precision of the trained model's,
    so that equal weights give equal numbers (``stored_dtypes``). FSDP2 and ZeRO divide it among the ranks.
    A collective.
    """
    return _place(_read(path, model, trained), trained)


@contextmanager
def frozen_model(path: str | None, model: Model, trained: TrainedModel) -> Iterator[tuple[FrozenModel, str]]:
    """``frozen_or_adapter_off`` as a block, after which a second model can be freed, and the digest of its
    weights as they are in the folder. A collective.
    """
    if path is None and trained.adapter is not None:
        off = AdapterOff(trained)
        yield off, weights_digest(off.weights())
        return
    frozen = _read(path, model, trained)
    digest = None
    if trained.rank == 0:
        weights = ((name, weight.to(trained.device)) for name, weight in weights_of(frozen))
        digest = weights_digest(weights)
    digest = trained.broadcast(digest)
    yield _place(frozen, trained), digest


def _read(path: str | None, model: Model, trained: TrainedModel) -> PolicyForward:
    """The model in float32: in host memory on rank 0, on the meta device on the others."""
    with loading_on_rank_0(trained.rank):
        frozen = load_causal_lm(path or model.path, None if path else model.revision, model.attention)
    return PolicyForward(frozen.requires_grad_(False)).eval()


@torch.no_grad()
def _place(frozen: PolicyForward, trained: TrainedModel) -> PolicyForward:
    """``frozen`` on the device of ``trained``, in its precision, and divided where it is."""
    is_whole = computes_throughout(trained.accelerator)
    dtypes = stored_dtypes(frozen, COMPUTE_DTYPES[trained.precision], throughout=is_whole)
    if trained.world_size == 1:
        for name, parameter in frozen.named_parameters():
            parameter.data = parameter.data.to(trained.device, dtypes[name])
        return frozen.to(trained.device)

    source = {name: tensor.detach() for name, tensor in _named_tensors(frozen)}
    frozen.to("meta").tie_weights()
    for name, parameter in frozen.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    if is_whole:
        _shard(frozen)
    frozen.to_empty(device=trained.device).tie_weights()
    for name, tensor in _named_tensors(frozen):
        read = source.pop(name)
        if trained.rank == 0:
            full = read.to(trained.device, tensor.dtype)
        else:
            full = torch.empty(read.shape, dtype=tensor.dtype, device=trained.device)
        del read
        with trained.deadline("rank 0", f"to send {name} of a frozen model"):
            put_full(tensor, broadcast(full))
    return frozen


def _shard(frozen: PolicyForward) -> None:
    """Divide the parameters among all ranks: each layer, the embedding and the head are gathered for their
    part of a pass only.
    """
    layers = set(frozen._no_split_modules or ())
    for module in list(frozen.modules()):
        if type(module).__name__ in layers:
            fully_shard(module)
    embedding = frozen.get_input_embeddings()
    head = frozen.get_output_embeddings()
    assert isinstance(head, nn.Module)
    if embedding.weight is head.weight:
        fully_shard([embedding, head], reshard_after_forward=True)
    else:
        fully_shard(embedding)
        fully_shard(head)
    fully_shard(frozen, reshard_after_forward=True)


def _named_tensors(frozen: PolicyForward) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; tied weights once."""
    yield from frozen.named_parameters()
    yield from frozen.named_buffers()


def weights_of(frozen: PolicyForward) -> Iterator[tuple[str, Tensor]]:
    """The weights of ``frozen`` under the names that ``weights`` of a learner gives them. A collective where
    they are divided among ranks.
    """
    for name, weight in frozen.state_dict().items():
        yield name.removeprefix("model."), gather_rows(weight)


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of one projection per weight, to nine digits. A collective where ``weights`` is one."""
    digest = hashlib.sha256()
    for name, weight in weights:
        number = weight_fingerprint(name, weight).number
        digest.update(f"{name} {tuple(weight.shape)} {number:.9e}\n".encode())
    return digest.hexdigest()


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
