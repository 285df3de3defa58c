"""Makes a language model of a few million parameters from dialogues: Qwen2 architecture, a byte-level BPE
trained on the same text.

    python scripts/make_text_model.py --out .cache/text-model --data hh_helpful_train.jsonl --held-out
    hh_helpful_test.jsonl

Both files hold preference pairs of Human/Assistant transcripts (HH-RLHF, arXiv:2204.05862). The model reads
whole dialogues in its chat template, the preferred and the other answers alike, so that it starts without a
preference of its own; no dialogue of the held-out file is read, nor one that begins as one of those. One
thread; equal arguments give equal weights, and a folder that was made with them is kept. Prints the loss as
it falls and the held-out perplexity at the end.
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

import make_tiny_model
import torch
from make_tiny_model import (
    IGNORED,
    MAX_POSITIONS,
    arguments_of,
    character_tokenizer,
    put,
    record,
    reproducible,
    tiny_model,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from rltrain.config.schema import JudgedData
from rltrain.data.judged import judged_rows, require_one_form
from rltrain.data.preferences import parse_transcript

Dialogue = tuple[tuple[str, str], ...]  # (role, content) of each turn; the last one answers

VOCABULARY, LAYERS, WIDTH = 4096, 4, 192
STEPS, BLOCK, BLOCKS = 400, 256, 8  # of each update: so many blocks of so many tokens
LEARNING_RATE, WARMUP_STEPS, DECAY = (
    3e-3,
    40,
    0.2,
)  # from that share of the steps on, the learning rate falls to 0
WEIGHT_DECAY = 0.1
SHOWN = 50  # steps between two lines of loss


class Fit(NamedTuple):
    """How well a model predicts dialogues that it has not read: all tokens of them but the first."""

    perplexity: float  # per token
    bits_per_byte: float  # of the dialogues' contents; not bound to a tokenizer
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
    """A model in ``out``; nothing is done where ``out`` was already made with the same arguments.

    data, held_out: files of transcript pairs. Raises ValueError when they are not, or ``out`` holds something
    else.
    """
    out, files = Path(out), (Path(data), Path(held_out))
    made_with = arguments_of(
        files, __file__, make_tiny_model.__file__, seed=seed, steps=steps, vocabulary=vocabulary
    )
    if record(out) == made_with:
        print(f"{out}: already made with these arguments")
        return out
    reserved = dialogues(files[1])
    read = without_beginnings(dialogues(files[0]), reserved)
    tokenizer = trained_tokenizer([content for dialogue in read for _, content in dialogue], vocabulary)
    model = tiny_model(tokenizer, tied=True, seed=seed, layers=LAYERS, width=WIDTH)
    stream = [token for dialogue in once(read) for token in encoded(dialogue, tokenizer)]
    sizes = (
        f"{sum(one.numel() for one in model.parameters()) / 1e6:.1f}M parameters, {len(tokenizer)} tokens in "
        "the vocabulary"
    )
    print(
        f"{len(read)} dialogues, {len(stream)} tokens; {sizes}; {steps * BLOCK * BLOCKS / len(stream):.1f} "
        "passes"
    )
    seconds = pretrain(model, stream, steps=steps, seed=seed)
    fit = held_out_fit(model, list(once(reserved)), tokenizer)
    fits = f"perplexity {fit.perplexity:.1f} per token, {fit.bits_per_byte:.3f} bits per byte"
    print(f"{out}: {steps} steps in {seconds:.0f} s; held-out {fits} ({fit.tokens} tokens)")
    return put(out, model, tokenizer, made_with)


# text -------------------------------------------------------------------------------------------------------


def dialogues(path: Path) -> list[Dialogue]:
    """Both dialogues of each pair of transcripts, each once, in the file's order; those without an
    answer at their end are left out.
    """
    source, rows = judged_rows(JudgedData(train=str(path)), "train")
    form = require_one_form(rows)
    if form != "pairs of Human/Assistant transcripts":
        raise ValueError(f"{source} holds {form}; pairs of Human/Assistant transcripts are expected")
    found: dict[Dialogue, None] = {}
    for row in rows:
        for side in ("chosen", "rejected"):
            turns = tuple((turn["role"], turn["content"]) for turn in parse_transcript(row.columns[side]))
            if len(turns) > 1 and turns[-1][0] == "assistant" and turns[-1][1]:
                found[turns] = None
    return list(found)


def without_beginnings(read: Sequence[Dialogue], reserved: Sequence[Dialogue]) -> list[Dialogue]:
    """``read`` less the dialogues whose first turn begins one of ``reserved``.

    Raises ValueError where none is left.
    """
    beginnings = {dialogue[0] for dialogue in reserved}
    kept = [dialogue for dialogue in read if dialogue[0] not in beginnings]
    if not kept:
        raise ValueError("every dialogue begins as a held-out one, so none is left to read; give other files")
    return kept


def once(read: Sequence[Dialogue]) -> Iterator[Dialogue]:
    """The dialogues, of which one that differs from the one before in its last answer only is cut to
    its last question and that answer.
    """
    before: Dialogue = ()
    for dialogue in read:
        yield dialogue[-2:] if dialogue[:-1] == before[:-1] else dialogue
        before = dialogue


def trained_tokenizer(texts: Sequence[str], vocabulary: int) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with ``vocabulary`` tokens learnt from ``texts``, and the tiny model's
    special tokens and chat template.
    """
    plain = character_tokenizer()
    found: Any = plain.train_new_from_iterator(texts, vocab_size=vocabulary, show_progress=False)
    found.chat_template = plain.chat_template
    return found


def encoded(dialogue: Dialogue, tokenizer: Qwen2Tokenizer) -> list[int]:
    """Token ids in the chat template; every answer ends with EOS."""
    messages = [{"role": role, "content": content} for role, content in dialogue]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# training ---------------------------------------------------------------------------------------------------


def pretrain(model: Qwen2ForCausalLM, stream: Sequence[int], *, steps: int, seed: int) -> float:
    """Next-token prediction on blocks of the stream, in a new order and from a new offset in each pass.

    Seconds it took.
    """
    decayed, plain = (
        [one for one in model.parameters() if (one.dim() > 1) is matrix] for matrix in (True, False)
    )
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS, (1 - step / steps) / (1 - DECAY))
    )
    batches, shown, started = blocks(stream, seed), list[float](), time.perf_counter()
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
            shown.append(loss.item())
            if step % SHOWN == 0 or step == steps:
                print(
                    f"step {step}: loss {sum(shown) / len(shown):.3f}, {time.perf_counter() - started:.0f} s",
                    flush=True,
                )
                shown.clear()
        model.eval()
    return time.perf_counter() - started


def blocks(stream: Sequence[int], seed: int) -> Iterator[Tensor]:
    """(BLOCKS, BLOCK) int64, for ever. Raises ValueError where the stream is too short for a batch."""
    tokens, generator = torch.tensor(stream), random.Random(seed)
    if len(tokens) < BLOCK * (BLOCKS + 1):
        raise ValueError(
            f"{len(tokens)} tokens of text are fewer than the {BLOCK * (BLOCKS + 1)} of one update; give "
            "more dialogues"
        )
    while True:
        whole = tokens[generator.randrange(BLOCK) :]
        rows = whole[: len(whole) // BLOCK * BLOCK].view(-1, BLOCK)
        order = torch.tensor(generator.sample(range(len(rows)), len(rows) // BLOCKS * BLOCKS))
        yield from rows[order].split(BLOCKS)


def token_nll(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """(rows, length - 1) nats: negative log-probs of ``labels`` after the tokens before them, 0 where
    the label is IGNORED.
    """
    logits = model(input_ids=ids).logits[:, :-1]  # right-padded and causal: no attention mask is needed
    nll = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(len(ids), -1)


@torch.no_grad()
def held_out_fit(
    model: Qwen2ForCausalLM, held_out: Sequence[Dialogue], tokenizer: Qwen2Tokenizer, rows: int = 16
) -> Fit:
    """Each dialogue by itself, cut where the model's positions end."""
    found = sorted((encoded(dialogue, tokenizer)[:MAX_POSITIONS] for dialogue in held_out), key=len)
    total, tokens, size = 0.0, 0, 0
    for start in range(0, len(found), rows):
        batch = found[start : start + rows]
        ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = labels[row, : len(one)] = torch.tensor(one)
            size += len(str(tokenizer.decode(one, skip_special_tokens=True)).encode())
        total += token_nll(model, ids, labels).sum(dtype=torch.float64).item()
        tokens += int((labels[:, 1:] != IGNORED).sum())
    return Fit(math.exp(total / tokens), total / math.log(2) / size, tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="transcript pairs to read")
    parser.add_argument("--held-out", required=True, help="transcript pairs that measure, and are not read")
    parser.add_argument("--measure", action="store_true", help="also print the held-out fit as JSON")
    for name in ("seed", "steps", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    measured = options.pop("measure")
    try:
        out = make_text_model(**options)
    except ValueError as error:
        parser.error(str(error))
    if measured:
        tokenizer, model = Qwen2Tokenizer.from_pretrained(out), Qwen2ForCausalLM.from_pretrained(out)
        print(
            json.dumps(
                held_out_fit(model, list(once(dialogues(Path(options["held_out"])))), tokenizer)._asdict()
            )
        )


if __name__ == "__main__":
    main()
