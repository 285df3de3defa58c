"""A reward model in this process that is not trained: one number per completion."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoTokenizer

from rltrain.chat_template import frozen_clock
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.forward import scalar_head
from rltrain.learner.reward_learner import load_reward_model
from rltrain.model_limits import context_of, require_room_for_tokens
from rltrain.remote_code import refusing_untrusted, trusts
from rltrain.reward.score import RewardInputs
from rltrain.round_trip import Losses
from rltrain.types.policy import TokenRows

__all__ = ["RewardModel", "rewards_of"]

Precision = Literal["auto", "float32", "bfloat16"]


class RewardModel:
    """A sequence classifier with one output, as transformers' ``AutoModelForSequenceClassification`` loads
    it.

    prompt_column: None: the model reads the token ids that the policy read and wrote, the end of the text
    included, as this project trains reward models; its tokenizer must be the policy's. A column: the model
    reads that column (text, or messages) and the completion's text as a conversation in its own chat
    template. max_tokens: a longer text, or one beyond the model's context, loses its beginning. precision
    "auto": bfloat16 on a GPU, float32 elsewhere; the head is float32. Raises UserError where the model cannot
    be loaded or does not have one output.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt_column: str | None,
        max_tokens: int,
        device: torch.device,
        tokens_per_micro_batch: int,
        precision: Precision = "auto",
        date: dt.date | None = None,
    ) -> None:
        self.path = path
        self.prompt_column = prompt_column
        self.device = device
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self._date = date  # printed by its chat template; None: today
        model: Any = load_reward_model(path, None, "auto", trained=True, decoder=False).requires_grad_(False)
        self._head = scalar_head(model)
        if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
            (model if self._head is None else model.base_model).to(torch.bfloat16)
        self._model = model.to(device).eval()
        self._tokenizer: Any = None
        if prompt_column is not None:
            self._tokenizer = _load_tokenizer(path, prompt_column, model.config)
        self._losses = Losses()  # of the first texts, which show whether the tokenizer is complete
        self._is_checked = False
        context = context_of(model.config)
        self.max_tokens = max_tokens if context is None else min(max_tokens, context.tokens)

    def __call__(self, rows: Sequence[tuple[RewardInputs, int]]) -> list[float]:
        """The reward of each row: a prompt with its completions, and the index of one of them.

        Raises UserError where a row lacks its column.
        """
        texts = [self._token_ids(inputs, index) for inputs, index in rows]
        if not self._is_checked and self._tokenizer is not None and texts:
            self._is_checked = True
            with user_mistakes():
                self._losses.check(f"reward model {self.path}", self._tokenizer)
        return self.scores(texts)

    @torch.no_grad()
    def scores(self, texts: Sequence[tuple[int, ...]]) -> list[float]:
        """The reward of each text.

        Texts of similar length form a batch, padded on the right, where the padding influences no token.
        """
        rewards = [0.0] * len(texts)
        for batch in _batches([len(text) for text in texts], self.tokens_per_micro_batch):
            numbers = self._forward([texts[index] for index in batch])
            for index, number in zip(batch, numbers.tolist(), strict=True):
                rewards[index] = number
        return rewards

    def _forward(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """(r,) float32 rewards.

        A decoder's head is applied here, at the last token: transformers would take the last token that is
        not the pad token, and skip an end of text that is also the pad token.
        """
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        longest = int(lengths.max())
        padded = [[*text, *(0,) * (longest - len(text))] for text in texts]
        input_ids = torch.tensor(padded, device=self.device)
        inside = (torch.arange(longest, device=self.device)[None] < lengths[:, None]).long()
        if self._head is None:
            return self._model(input_ids=input_ids, attention_mask=inside).logits[:, 0].float()
        hidden = self._model.base_model(
            input_ids=input_ids, attention_mask=inside, use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(texts), device=self.device), lengths - 1]
        return linear(last.float(), self._head.weight, self._head.bias)[:, 0]

    def _token_ids(self, inputs: RewardInputs, index: int) -> tuple[int, ...]:
        """The text that the model reads for a completion, as token ids."""
        if self.prompt_column is None:
            return (*inputs.prompt_ids, *inputs.completion_ids[index])[-self.max_tokens :]

        prompt = inputs.columns.get(self.prompt_column)
        if not isinstance(prompt, str | list):
            columns = ", ".join(sorted(inputs.columns)) or "none"
            raise UserError(
                f"reward model: column {self.prompt_column!r} must hold text or messages, got "
                f"{prompt!r:.80}; there are: {columns}"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        conversation = [*messages, {"role": "assistant", "content": inputs.completions[index]}]
        text = self._tokenizer.apply_chat_template(conversation, tokenize=False, **frozen_clock(self._date))
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        self._losses.add(text, token_ids, self._tokenizer)
        return tuple(token_ids)[-self.max_tokens :]


def _load_tokenizer(path: str, prompt_column: str, config: Any) -> Any:
    """The tokenizer of a model that reads texts. Raises UserError where it has no chat template."""
    with refusing_untrusted(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trusts(path))
    if tokenizer.chat_template is None:
        raise UserError(
            f"{path} has no chat template for prompt_column {prompt_column}; leave prompt_column out, or "
            "give the model one"
        )
    require_room_for_tokens(tokenizer, config.get_text_config().vocab_size, path)
    return tokenizer


def rewards_of(path: str, rows: TokenRows, *, tokens_per_micro_batch: int) -> list[float]:
    """The head's number at the last token of each prompt and completion.

    Raises UserError where the model has no such head.
    """
    texts = [
        (*prompt, *completion) for prompt, completion in zip(rows.prompts, rows.completions, strict=True)
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = RewardModel(
        path,
        prompt_column=None,
        max_tokens=max(map(len, texts), default=1),
        device=device,
        tokens_per_micro_batch=tokens_per_micro_batch,
        precision="float32",
    )
    return model.scores(texts)


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices into ``lengths``, shortest first, in batches of at most ``tokens`` with padding, or of one
    text.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
