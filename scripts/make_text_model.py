"""Makes a language model of a few million parameters from dialogues: Qwen2 architecture, a byte-level BPE
trained on the same text.

    python scripts/make_text_model.py --out .cache/text-model
        --data hh_helpful_train.jsonl --held-out hh_helpful_test.jsonl

Both files hold preference pairs of Human/Assistant transcripts (HH-RLHF, arXiv:2204.05862). The model is
trained on whole dialogues in its chat template, with preferred and rejected answers alike, so that it starts
without a preference of its own. It reads no dialogue of the held-out file, and none with the same first turn
as one of those. Training uses one thread; equal arguments give equal weights, and a folder made with equal
arguments is kept. Prints the training loss, and the held-out perplexity at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

import rltrain.build.tiny_model
from rltrain.build.tiny_model import (
    IGNORED,
    MAX_POSITIONS,
    arguments_of,
    character_tokenizer,
    put_model,
    read_record,
    reproducible,
    tiny_model,
)
from rltrain.config.schema import JudgedData
from rltrain.data.judged import judged_rows, require_one_form
from rltrain.data.preferences import parse_transcript

Dialogue = tuple[tuple[str, str], ...]  # (role, content) of each turn; the last turn is an answer

VOCABULARY = 4096
LAYERS = 4
WIDTH = 192
STEPS = 400
BLOCK = 256  # tokens
BLOCKS = 8  # per update
LEARNING_RATE = 3e-3
WARMUP_STEPS = 40
DECAY = 0.2  # from this share of the steps on, the learning rate falls to 0
WEIGHT_DECAY = 0.1
SHOWN = 50  # steps between two lines of loss


class Fit(NamedTuple):
    """How well a model predicts dialogues that it has not read, over all their tokens except the first."""

    perplexity: float  # per token
    bits_per_byte: float  # of the dialogues' contents; independent of the tokenizer
    tokens: int


def make_text_model(
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str],
    held_out: str | os.PathLike[str],
    seed: int = 0,
    steps: int = STEPS,
    vocabulary: int = VOCABULARY,
) -> Path:
    """Writes a model to ``out``, unless ``out`` was already made with the same arguments.

    data, held_out: files of transcript pairs. Raises ValueError if they are not, or if ``out`` has other
    contents.
    """
    out = Path(out)
    files = (Path(data), Path(held_out))
    made_with = arguments_of(
        files, __file__, rltrain.build.tiny_model.__file__, seed=seed, steps=steps, vocabulary=vocabulary
    )
    if read_record(out) == made_with:
        print(f"{out}: already made with these arguments")
        return out

    reserved = dialogues(files[1])
    training_dialogues = without_beginnings(dialogues(files[0]), reserved)
    tokenizer = train_tokenizer(
        [content for dialogue in training_dialogues for _, content in dialogue], vocabulary
    )
    model = tiny_model(tokenizer, tied=True, seed=seed, layers=LAYERS, width=WIDTH)
    stream = [
        token
        for dialogue in without_repeated_turns(training_dialogues)
        for token in encode(dialogue, tokenizer)
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sizes = f"{parameters:.1f}M parameters, {len(tokenizer)} tokens in the vocabulary"
    passes = steps * BLOCK * BLOCKS / len(stream)
    print(f"{len(training_dialogues)} dialogues, {len(stream)} tokens; {sizes}; {passes:.1f} passes")

    seconds = pretrain(model, stream, steps=steps, seed=seed)
    fit = held_out_fit(model, list(without_repeated_turns(reserved)), tokenizer)
    fits = f"perplexity {fit.perplexity:.1f} per token, {fit.bits_per_byte:.3f} bits per byte"
    print(f"{out}: {steps} steps in {seconds:.0f} s; held-out {fits} ({fit.tokens} tokens)")
    return put_model(out, model, tokenizer, made_with)


# text -------------------------------------------------------------------------------------------------------


def dialogues(path: Path) -> list[Dialogue]:
    """Both dialogues of each pair of transcripts, without repetition, in the file's order; dialogues that
    do not end with an answer are left out.
    """
    source, rows = judged_rows(JudgedData(train=str(path)), "train")
    form = require_one_form(rows)
    if form != "pairs of Human/Assistant transcripts":
        raise ValueError(f"{source} holds {form}; pairs of Human/Assistant transcripts are expected")
    unique: dict[Dialogue, None] = {}
    for row in rows:
        for side in ("chosen", "rejected"):
            turns = tuple((turn["role"], turn["content"]) for turn in parse_transcript(row.columns[side]))
            if len(turns) > 1 and turns[-1][0] == "assistant" and turns[-1][1]:
                unique[turns] = None
    return list(unique)


def without_beginnings(transcripts: Sequence[Dialogue], reserved: Sequence[Dialogue]) -> list[Dialogue]:
    """``transcripts`` without the dialogues that have the same first turn as one of ``reserved``.

    Raises ValueError if none is left.
    """
    beginnings = {dialogue[0] for dialogue in reserved}
    kept = [dialogue for dialogue in transcripts if dialogue[0] not in beginnings]
    if not kept:
        raise ValueError("every dialogue begins as a held-out one, so none is left to read; give other files")
    return kept


def without_repeated_turns(transcripts: Sequence[Dialogue]) -> Iterator[Dialogue]:
    """The dialogues; one that differs from the previous one only in its last answer is reduced to its last
    question and answer.
    """
    before: Dialogue = ()
    for dialogue in transcripts:
        yield dialogue[-2:] if dialogue[:-1] == before[:-1] else dialogue
        before = dialogue


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with ``vocabulary`` tokens learnt from ``texts``, with the tiny model's special
    tokens and chat template.
    """
    base_tokenizer = character_tokenizer()
    tokenizer: Any = base_tokenizer.train_new_from_iterator(texts, vocab_size=vocabulary, show_progress=False)
    tokenizer.chat_template = base_tokenizer.chat_template
    return tokenizer


def encode(dialogue: Dialogue, tokenizer: Qwen2Tokenizer) -> list[int]:
    """Token ids in the chat template; every answer ends with EOS."""
    messages = [{"role": role, "content": content} for role, content in dialogue]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# training ---------------------------------------------------------------------------------------------------


def pretrain(model: Qwen2ForCausalLM, stream: Sequence[int], *, steps: int, seed: int) -> float:
    """Trains next-token prediction on blocks of the stream, in a new order and from a new offset in each
    pass.

    Returns the seconds that it took.
    """
    decayed, undecayed = (
        [parameter for parameter in model.parameters() if (parameter.dim() > 1) is matrix]
        for matrix in (True, False)
    )
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS, (1 - step / steps) / (1 - DECAY))
    )
    batches = blocks(stream, seed)
    losses: list[float] = []
    started = time.perf_counter()
    with reproducible(threads=1):
        model.train()
        for step in range(1, steps + 1):
            ids = next(batches)
            loss = token_nll(model, ids, ids).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if step % SHOWN == 0 or step == steps:
                seconds = time.perf_counter() - started
                print(f"step {step}: loss {sum(losses) / len(losses):.3f}, {seconds:.0f} s", flush=True)
                losses.clear()
        model.eval()
    return time.perf_counter() - started


def blocks(stream: Sequence[int], seed: int) -> Iterator[Tensor]:
    """Batches of (BLOCKS, BLOCK) int64, endlessly. Raises ValueError if the stream is too short for one."""
    tokens = torch.tensor(stream)
    generator = random.Random(seed)
    if len(tokens) < BLOCK * (BLOCKS + 1):
        raise ValueError(
            f"{len(tokens)} tokens of text are fewer than the {BLOCK * (BLOCKS + 1)} of one update; give "
            "more dialogues"
        )
    while True:
        shifted = tokens[generator.randrange(BLOCK) :]
        rows = shifted[: len(shifted) // BLOCK * BLOCK].view(-1, BLOCK)
        order = torch.tensor(generator.sample(range(len(rows)), len(rows) // BLOCKS * BLOCKS))
        yield from rows[order].split(BLOCKS)


def token_nll(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """(rows, length - 1) nats: negative log-probs of ``labels`` given the previous tokens, 0 where the label
    is IGNORED.
    """
    logits = model(input_ids=ids).logits[:, :-1]  # right-padded and causal: no attention mask is needed
    nll = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(len(ids), -1)


@torch.no_grad()
def held_out_fit(
    model: Qwen2ForCausalLM, held_out: Sequence[Dialogue], tokenizer: Qwen2Tokenizer, rows: int = 16
) -> Fit:
    """The fit to each dialogue by itself, cut at the model's number of positions."""
    texts = sorted((encode(dialogue, tokenizer)[:MAX_POSITIONS] for dialogue in held_out), key=len)
    total = 0.0
    tokens = 0
    size = 0
    for start in range(0, len(texts), rows):
        batch = texts[start : start + rows]
        ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for row, token_ids in enumerate(batch):
            ids[row, : len(token_ids)] = labels[row, : len(token_ids)] = torch.tensor(token_ids)
            size += len(str(tokenizer.decode(token_ids, skip_special_tokens=True)).encode())
        total += token_nll(model, ids, labels).sum(dtype=torch.float64).item()
        tokens += int((labels[:, 1:] != IGNORED).sum())
    return Fit(math.exp(total / tokens), total / math.log(2) / size, tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="transcript pairs to read")
    parser.add_argument("--held-out", required=True, help="transcript pairs for evaluation, not training")
    parser.add_argument("--measure", action="store_true", help="also print the held-out fit as JSON")
    for name in ("seed", "steps", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    prints_fit = options.pop("measure")
    try:
        out = make_text_model(**options)
    except ValueError as error:
        parser.error(str(error))
    if prints_fit:
        tokenizer = Qwen2Tokenizer.from_pretrained(out)
        model = Qwen2ForCausalLM.from_pretrained(out)
        held_out = list(without_repeated_turns(dialogues(Path(options["held_out"]))))
        print(json.dumps(held_out_fit(model, held_out, tokenizer)._asdict()))


if __name__ == "__main__":
    main()
