"""Loads models from folders: with exactly the architecture's tensors, and without randomness in train mode.

transformers fills missing tensors with random weights and drops unexpected ones, with a warning. Here either
is an error.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from rltrain.errors import UserError
from rltrain.learner.adapter import dequantized_weights, merge_adapter_folder, quantization_config
from rltrain.learner.backend import reshard, set_mode
from rltrain.model_files import adapter_base, adapter_storage
from rltrain.remote_code import refusing_untrusted, trusts

__all__ = [
    "Head",
    "load_causal_lm",
    "open_folder",
    "require_complete",
    "require_repeatable",
    "require_weights",
    "without_dropout",
    "without_weights",
]

# "logits": a language model. "scalar": a trained reward model. "new scalar": a reward model to be trained
# from either.
Head = Literal["logits", "scalar", "new scalar"]
_SCALAR_HEAD = ("score.", "classifier.")
_LANGUAGE_HEADS = ("lm_head.", "embed_out.", "output_projection.")
_KINDS = {
    AutoModelForCausalLM: "a causal language model",
    AutoModelForSequenceClassification: "a model with a scalar head",
}
_READS_WEIGHTS = ContextVar("_READS_WEIGHTS", default=True)
_NAMED = 3  # tensors that an error names
_RANDOM_PASSES = 8  # further passes of a model whose forward draws random numbers

# Names of attributes with the probabilities and noise that a forward in train mode applies.
_RANDOM = re.compile(r"drop|^(input_)?jitter_noise$|^moe_jitter_eps$")


def load_causal_lm(
    path: str, revision: str | None, attention: str, quantization: Any | None = None
) -> PreTrainedModel:
    """A causal LM in float32 (the optimizer's precision; autocast computes in a lower one), without dropout.

    A folder with an adapter is loaded as the model that base and adapter are together, with the base as it
    was when the adapter was trained. quantization: transformers' config for storing the linear layers in
    fewer bits. Raises UserError where the folder's tensors are not exactly the architecture's.
    """
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    if quantization is not None:
        options["quantization_config"] = quantization
    base, base_revision = adapter_base(path) or (path, revision)
    model, report = open_folder(AutoModelForCausalLM, base, base_revision, dtype=torch.float32, **options)
    require_complete(base, model, report, "logits")
    if base != path:
        _take_stored_weights(model, base, base_revision, adapter_storage(path))
        merge_adapter_folder(model, Path(path))
    return without_dropout(model)


def _take_stored_weights(model: PreTrainedModel, path: str, revision: str | None, storage: str) -> None:
    """Give ``model``, loaded from ``path``, the values that its weights have after they were quantised: an
    adapter of the quantised model belongs to these.

    Raises UserError under ZeRO-3, which has divided the weights already.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.device.type != "meta"]
    if storage == "none" or not parameters:
        return
    if any(hasattr(weight, "ds_id") for weight in parameters):
        raise UserError(
            f"the adapter was trained on {path} quantised to {storage}, which ZeRO-3 cannot load; merge it "
            "first (rltrain soup ADAPTER --out FOLDER) and train on the folder, or launch another backend"
        )
    config = quantization_config(storage, torch.float32)
    stored, _ = open_folder(
        AutoModelForCausalLM, path, revision, dtype=torch.float32, quantization_config=config
    )
    with torch.no_grad():
        for name, weight in dequantized_weights(stored):
            model.get_parameter(name).copy_(weight)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Inside, a folder's tensors are not read: a model's parameters and buffers are on the meta device."""
    token = _READS_WEIGHTS.set(False)
    try:
        yield
    finally:
        _READS_WEIGHTS.reset(token)


def open_folder(
    kind: Any, path: str, revision: str | None, **options: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """``kind.from_pretrained`` and its loading info, for ``require_complete``.

    Raises UserError where the folder does not load as such a model.
    """
    options |= {"revision": revision, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if not _READS_WEIGHTS.get():
        options["device_map"] = "meta"
    try:
        with refusing_untrusted(path, revision):
            return kind.from_pretrained(path, trust_remote_code=trusts(path, revision), **options)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} does not load as {_KINDS[kind]}: {reason:.200}; choose another model, or download "
            "it again"
        ) from error


# what a folder holds ----------------------------------------------------------------------------------------


def require_weights(path: str, revision: str | None, head: Head, attention: str = "auto") -> None:
    """Compare names and shapes of the folder's tensors with the architecture's, reading only the files'
    headers.

    attention: the kernel that the model must have. Raises UserError as ``require_complete`` does.
    """
    kind = AutoModelForCausalLM if head == "logits" else AutoModelForSequenceClassification
    options: dict[str, Any] = {"num_labels": 1} if head == "new scalar" else {}
    if attention != "auto":
        options["attn_implementation"] = attention
    if head == "logits":
        path, revision = adapter_base(path) or (path, revision)
    with _quiet(), without_weights():
        model, report = open_folder(kind, path, revision, **options)
    require_complete(path, model, report, head)


def require_complete(path: str, model: PreTrainedModel, report: Mapping[str, Any], head: Head) -> None:
    """Raises UserError unless the folder held every tensor of ``model`` in its shape, and no other.

    report: transformers' loading info. A reward model's folder may hold a language head, which is not used; a
    reward model to be trained gets a new head.
    """
    missing = set(report["missing_keys"])
    unexpected = set(report["unexpected_keys"])
    if head != "logits":
        unexpected = {name for name in unexpected if not name.startswith(_LANGUAGE_HEADS)}
    heads = {name for name in missing if name.startswith(_SCALAR_HEAD)}
    if head == "new scalar":
        missing -= heads
    elif head == "scalar" and heads:
        raise UserError(
            f"{path} has no {min(heads)}: it is a language model, not a reward model that was trained"
        )
    misshapen = [
        f"{name} {tuple(stored)} instead of {tuple(expected)}"
        for name, stored, expected in report["mismatched_keys"]
    ]
    tensors = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(misshapen),
    }
    problems = [_describe(kind, names) for kind, names in tensors.items() if names]
    if problems:
        raise UserError(
            f"{path}: its tensors are not those of {type(model).__name__}, which its config names: "
            f"{'; '.join(problems)}. Missing tensors would start at random, unexpected ones be dropped: "
            "download the folder again, or correct its config or its names"
        )


def _describe(kind: str, names: list[str]) -> str:
    """How many tensors are of a kind, and the names of the first."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{more})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers draws no bar and prints no table, since the caller reports problems in one
    line.
    """
    bars = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# what is random in train mode -------------------------------------------------------------------------------


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off every dropout, layer drop and router noise of ``model``, in place; returns it.

    They may be modules, numbers that a forward reads from its module, or numbers that it reads from the
    config. ``model.config``, which is saved with the weights, keeps its values.
    """
    saved_config = copy.deepcopy(model.config)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _set_probabilities_to_zero(vars(module))
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            _set_probabilities_to_zero(vars(config))
    model.config = saved_config
    return model


def _set_probabilities_to_zero(values: dict[str, Any]) -> None:
    """Set each probability among the attributes ``values`` to 0."""
    for name, value in values.items():
        if isinstance(value, float) and 0 < value <= 1 and _RANDOM.search(name):
            values[name] = 0.0


@torch.no_grad()
def require_repeatable(policy: Any, micro_batch: Any, *, path: str, tolerance: float) -> None:
    """Raises UserError unless ``policy`` gives equal numbers for ``micro_batch`` in train mode, in train mode
    again, and in eval mode.

    Otherwise the log-probs of an update would differ at random from those that the ratio or the reference
    compares them with. A model whose forward draws random numbers is run more often, since their effect may
    be rare. tolerance: nats, for kernels that round differently from run to run. A collective where
    ``policy`` is sharded.
    """

    def numbers(*, training: bool) -> Tensor:
        set_mode(policy, training=training)
        values = policy(micro_batch, temperature=1.0, wants=frozenset({"logp"}), chunk=micro_batch.width)
        return torch.cat([value.flatten() for value in values.values()]).float()

    evaluated = numbers(training=False)
    with torch.random.fork_rng(_devices()):
        before = _random_state()
        first = numbers(training=True)
        further_passes = 1 if torch.equal(before, _random_state()) else _RANDOM_PASSES
        repeated = [numbers(training=True) for _ in range(further_passes)]
    reshard(policy)

    between_calls = max(float((values - first).abs().max()) for values in repeated)
    between_modes = max(float((values - evaluated).abs().max()) for values in (first, *repeated))
    if not max(between_calls, between_modes) <= tolerance:
        raise UserError(
            f"{path}: in train mode {_class_of(policy)} gives one row log-probs that differ by "
            f"{between_calls:.2g} nats from call to call and by {between_modes:.2g} from eval mode (at most "
            f"{tolerance:g} is rounding). It draws random numbers that cannot be switched off from outside; "
            "set its dropout, noise or sampling to 0 in config.json, or choose another model"
        )


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def _random_state() -> Tensor:
    """The state of the generators from which a forward on this machine draws."""
    return torch.cat([torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices())])


def _class_of(policy: nn.Module) -> str:
    """The name of the transformers class inside every wrapper."""
    unwrapped: Any = getattr(policy, "module", policy)
    return type(unwrapped.inner).__name__
