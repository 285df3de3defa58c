"""A reward model held in this process: one number per completion, nothing trained."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoTokenizer

from reward.score import RewardInputs
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.forward import scalar_head
from rltrain.learner.reward_learner import load_reward_model
from rltrain.model_limits import context_of, require_room_for_tokens
from rltrain.remote_code import trusts
from rltrain.round_trip import Losses
from rltrain.template_date import frozen_clock
from rltrain.types.policy import TokenRows

__all__ = ["RewardModel", "rewards_of"]

Precision = Literal["auto", "float32", "bfloat16"]


class RewardModel:
    """A sequence classifier with one output, as transformers' ``AutoModelForSequenceClassification`` loads
    it.

    prompt_column: None: it reads the token ids that the policy read and wrote, the end of the text included,
    which is how this project trains reward models; its tokenizer must be the policy's. A column: it reads
    that column (text, or messages) and the completion's text as a conversation in its own chat template.
    max_tokens: of a longer text, or one beyond the model's context, the beginning is left out. precision
    "auto": bfloat16 on a GPU, float32 elsewhere; the head is float32. Raises UserError where it cannot be had
    or has not one output.
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
        self.path, self.prompt_column = path, prompt_column
        self.device, self.tokens_per_micro_batch = device, tokens_per_micro_batch
        self._date = date  # that its chat template prints; None: today
        model: Any = load_reward_model(path, None, "auto", trained=True, decoder=False).requires_grad_(False)
        self._head = scalar_head(model)
        if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
            (model if self._head is None else model.base_model).to(torch.bfloat16)
        self._model = model.to(device).eval()
        self._tokenizer: Any = (
            None if prompt_column is None else _own_tokenizer(path, prompt_column, model.config)
        )
        self._losses, self._called = (
            Losses(),
            False,
        )  # of the first texts, which say whether the tokenizer is whole
        context = context_of(model.config)
        self.max_tokens = max_tokens if context is None else min(max_tokens, context.tokens)

    def __call__(self, rows: Sequence[tuple[RewardInputs, int]]) -> list[float]:
        """The reward of each row: a prompt with its completions, and which of them.

        Raises UserError where a row lacks its column.
        """
        first, texts = not self._called, [self._read(inputs, at) for inputs, at in rows]
        if first and self._tokenizer is not None and texts:
            self._called = True
            with user_mistakes():
                self._losses.check(f"reward model {self.path}", self._tokenizer)
        return self.scores(texts)

    @torch.no_grad()
    def scores(self, texts: Sequence[tuple[int, ...]]) -> list[float]:
        """The reward of each text.

        Rows of like length go together, padded behind, where no token that counts can see it.
        """
        found = [0.0] * len(texts)
        for chosen in _batches([len(text) for text in texts], self.tokens_per_micro_batch):
            numbers = self._forward([texts[at] for at in chosen])
            for at, number in zip(chosen, numbers.tolist(), strict=True):
                found[at] = number
        return found

    def _forward(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """(r,) float32. A decoder's head is applied here, at the last token: transformers looks for the last
        one that is no pad, and passes over an end of text that is also the pad."""
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        longest = int(lengths.max())
        input_ids = torch.tensor(
            [[*text, *(0,) * (longest - len(text))] for text in texts], device=self.device
        )
        inside = (torch.arange(longest, device=self.device)[None] < lengths[:, None]).long()
        if self._head is None:
            return self._model(input_ids=input_ids, attention_mask=inside).logits[:, 0].float()
        hidden = self._model.base_model(
            input_ids=input_ids, attention_mask=inside, use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(texts), device=self.device), lengths - 1]
        return linear(last.float(), self._head.weight, self._head.bias)[:, 0]

    def _read(self, inputs: RewardInputs, at: int) -> tuple[int, ...]:
        if self.prompt_column is None:
            return (*inputs.prompt_ids, *inputs.completion_ids[at])[-self.max_tokens :]
        asked = inputs.columns.get(self.prompt_column)
        if not isinstance(asked, str | list):
            there = ", ".join(sorted(inputs.columns)) or "none"
            raise UserError(
                f"reward model: column {self.prompt_column!r} must hold text or messages, got {asked!r:.80}; "
                f"there are: {there}"
            )
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        answered = [*messages, {"role": "assistant", "content": inputs.completions[at]}]
        text = self._tokenizer.apply_chat_template(answered, tokenize=False, **frozen_clock(self._date))
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        self._losses.add(text, token_ids, self._tokenizer)
        return tuple(token_ids)[-self.max_tokens :]


def _own_tokenizer(path: str, prompt_column: str, config: Any) -> Any:
    """Of a model that reads texts by itself. Raises UserError where it cannot."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trusts(path))
    if tokenizer.chat_template is None:
        raise UserError(
            f"{path} has no chat template for prompt_column {prompt_column}; leave prompt_column out, or "
            "give it one"
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
    most = max(map(len, texts), default=1)
    model = RewardModel(
        path,
        prompt_column=None,
        max_tokens=most,
        device=device,
        tokens_per_micro_batch=tokens_per_micro_batch,
        precision="float32",
    )
    return model.scores(texts)


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places of ``lengths``, shortest first, in batches of at most ``tokens`` with padding, or of one."""
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[at] > tokens:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch
