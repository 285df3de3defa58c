"""``rltrain soup``: the mean of several models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rltrain.build.local_inputs import require_soup
from rltrain.checkpoint.export import export_model
from rltrain.checkpoint.soup import soup
from rltrain.config.schema import Model
from rltrain.data.tokenization import tokenization_of
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.frozen_models import require_same_tokens
from rltrain.learner.loading import load_causal_lm
from rltrain.model_files import adapter_storage
from rltrain.weight_names import CheckpointNames


def soup_command(models: Sequence[str], weights: Sequence[float], out: Path) -> int:
    """``rltrain soup``: writes the weighted mean of ``models`` as a model folder, with the tokenizer of
    the first model. Without ``weights`` all models count equally.

    An adapter's folder counts as the model that base and adapter are together; a soup of one adapter merges
    it.
    """
    require_soup(models, weights)
    shares = list(weights) or [1 / len(models)] * len(models)
    with user_mistakes():
        tokenization = tokenization_of(Model(path=models[0]), {})
        for number, other in enumerate(models[1:], start=2):
            require_same_tokens(tokenization.tokenizer, models[0], f"model {number}", other)
        loaded = [load_causal_lm(model, None, "auto") for model in models]
        for number, other in enumerate(loaded[1:], start=2):
            if other.all_tied_weights_keys != loaded[0].all_tied_weights_keys:
                raise UserError(
                    f"model {number} and model 1 differ in which weights are tied; a soup is of models "
                    "fine-tuned from one"
                )

        mixed = soup([dict(model.state_dict()) for model in loaded], shares)
        formula = " + ".join(f"{share:g} x `{model}`" for model, share in zip(models, shares, strict=True))
        header = (
            f"---\nlibrary_name: transformers\ntags: [rltrain, soup]\n---\n\n# A soup of {len(models)} "
            "models\n\n"
        )
        card = f"{header}Every weight is {formula}, parameter by parameter (arXiv:2411.01798).\n"
        card += "".join(describe_merge(model) for model in models)
        names = CheckpointNames(loaded[0])
        mixed_weights = names.to_checkpoint(mixed.items())
        export_model(out, loaded[0], tokenization.tokenizer, card, mixed_weights, ties=names.ties)
    Console(highlight=False).print(str(out), markup=False, soft_wrap=True)
    return 0


def describe_merge(model: str) -> str:
    """What was added up where ``model`` is an adapter of a quantised base; empty: it is none."""
    storage = adapter_storage(model)
    if storage == "none":
        return ""
    return (
        f"\nThe base of the adapter `{model}` was stored as {storage} when it was trained. The adapter is "
        "added to the values that this storage has, dequantised to float32: that is the model that was "
        "trained, which the base's own weights are not. Quantised again, it would be another model.\n"
    )
