"""Loads a model's tokenizer, stop and pad tokens, and checks the model's context length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from rltrain.chat_template import is_template_file, read_template
from rltrain.config.schema import Data, Model, Rollout
from rltrain.data.chat import StopTokens, stop_token_ids, stop_tokens_of
from rltrain.errors import UserError
from rltrain.model_files import config_source, local_file
from rltrain.model_limits import require_context, require_room_for_tokens
from rltrain.remote_code import refusing_untrusted, trusts


@dataclass(frozen=True)
class Tokenization:
    """A model's tokenizer with its stop and pad tokens."""

    tokenizer: PreTrainedTokenizerBase
    stop_tokens: StopTokens
    vocabulary: int  # rows of the model's embedding

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """The token ids of a completion that consists of ``text`` only, end token included."""
        eos: Any = self.tokenizer.eos_token_id
        return (
            *self.tokenizer(text, add_special_tokens=False)["input_ids"],
            self.stop_tokens.stop[0] if eos is None else eos,
        )

    def require_embedded(self, texts: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Raises UserError if a text (name, token ids) contains a token without an embedding in the model."""
        for name, token_ids in texts:
            if max(token_ids, default=0) >= self.vocabulary:
                token = max(token_ids)
                raise UserError(
                    f"{name} holds token {token} ({self.tokenizer.convert_ids_to_tokens(token)!r}), but the "
                    f"embedding of the model has {self.vocabulary} rows: resize the embedding, or remove "
                    "this token from texts and template"
                )

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def load_tokenization(model: Model, data: Data, rollout: Rollout) -> Tokenization:
    """The tokenizer and stop tokens of ``model.path``.

    Raises UserError if the model does not exist or its context is too short.
    """
    return tokenization_of(model, sizes_of(data, rollout), data.chat_template)


def sizes_of(data: Data, rollout: Rollout) -> dict[str, int]:
    """The largest token counts of a row's parts, by recipe key."""
    return {"data.max_prompt_tokens": data.max_prompt_tokens, "rollout.max_tokens": rollout.max_tokens}


def tokenization_of(model: Model, sizes: Mapping[str, int], chat_template: str = "auto") -> Tokenization:
    """Like ``load_tokenization``, for rows whose parts have at most these sizes, by recipe key.

    chat_template: auto, none, or the path of a template that replaces the tokenizer's.
    """
    try:
        trusted = trusts(model.path, model.revision)
        with refusing_untrusted(model.path, model.revision):
            config = load_model_config(model)
            tokenizer = AutoTokenizer.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=trusted
            )
            # a setting of another type shows when a text is tokenised
            tokenizer.decode(tokenizer("0")["input_ids"], skip_special_tokens=True)
            if is_template_file(chat_template):
                tokenizer.chat_template = read_template(chat_template)
            vocabulary = int(config.get_text_config().vocab_size)
            generation = _generation_config(model)
            stop = stop_token_ids(tokenizer, generation)
            require_context(config, model.path, sizes)
            require_room_for_tokens(tokenizer, vocabulary, model.path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "; make it with: rltrain tiny-model" if model.path.startswith(".cache/tiny") else ""
        raise UserError(
            f"model.path {model.path!r} is no model folder and cannot be loaded from the Hub ({reason}){hint}"
        ) from error

    if beyond := [token for token in stop if not 0 <= token < vocabulary]:
        raise UserError(
            f"{model.path}: the token {beyond[0]} that ends an answer (eos_token_id) has no row in the "
            f"embedding of {vocabulary}; correct generation_config.json or the tokenizer"
        )
    return Tokenization(tokenizer, stop_tokens_of(tokenizer, generation), vocabulary)


def load_model_config(model: Model) -> PreTrainedConfig:
    source, revision = config_source(model.path, model.revision)
    return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trusts(source, revision))


def _generation_config(model: Model) -> GenerationConfig | None:
    """The model's generation config; None if it has none, so that only the tokenizer defines stop tokens."""
    source, revision = config_source(model.path, model.revision)
    if local_file(source, revision, "generation_config.json") is None:
        return None
    return GenerationConfig.from_pretrained(source, revision=revision or "main")
