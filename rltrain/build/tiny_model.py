"""Makes a model of about one million parameters that can learn on a CPU: Qwen2 architecture, character
tokenizer (``rltrain tiny-model``).

The warm start is supervised and short: it stops when a sampled answer is right two times in five, so that
reinforcement learning can still improve the model (a model trained further explores too little). Equal
arguments give equal weights; a folder made with equal arguments is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from rltrain.build.local_inputs import require_task_files
from rltrain.config.schema import Data
from rltrain.data.prompts import PromptSet, load_prompts, without_prompts

PAD = "<pad>"
EOS = "<eos>"
SYSTEM = "<system>"
USER = "<user>"
ASSISTANT = "<assistant>"
# Qwen2's byte-level tokenizer writes " " and "\n" as these characters
BYTE_LEVEL_SPACE = "\u0120"
BYTE_LEVEL_NEWLINE = "\u010a"
CHARACTERS = (
    *string.digits,
    *string.punctuation,
    *string.ascii_letters,
    BYTE_LEVEL_SPACE,
    BYTE_LEVEL_NEWLINE,
)
MAX_POSITIONS = 512
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<' + message['role'] + '>' + message['content'] + (eos_token if message['role'] == 'assistant' else "
    "'') }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)


def character_tokenizer() -> Qwen2Tokenizer:
    """One token per printable ASCII character; a chat is ``<user>37+58=<assistant>95<eos>``.

    It is a Qwen2Tokenizer without merges, because AutoTokenizer loads that class for every Qwen2 folder.
    Characters outside ASCII are not in the vocabulary and produce no token.
    """
    tokens = (PAD, EOS, SYSTEM, USER, ASSISTANT, *CHARACTERS)
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token=None,  # type: ignore[arg-type] (None: without)
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    tokenizer: Qwen2Tokenizer, *, tied: bool, seed: int, layers: int = 4, width: int = 128, std: float = 0.02
) -> Qwen2ForCausalLM:
    """Untrained float32 weights, equal for equal arguments. Heads have size 32, as vLLM's CPU attention
    requires.

    width: of the hidden states, a multiple of 64.
    """
    tokens = tokenizer.get_vocab()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=std,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def save_model(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, out: str | os.PathLike[str]) -> Path:
    """Writes an ordinary Hugging Face folder: safetensors, config, generation config, tokenizer with its
    chat template.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return Path(out)


def make_random_model(
    out: str | os.PathLike[str], *, tied: bool = False, seed: int = 0, layers: int = 2, std: float = 0.1
) -> Path:
    """Writes an untrained model to ``out`` within a second.

    The weights have a large standard deviation, so that the log-probs are far from uniform.
    """
    tokenizer = character_tokenizer()
    return save_model(tiny_model(tokenizer, tied=tied, seed=seed, layers=layers, std=std), tokenizer, out)


Task = Literal["arithmetic", "gsm8k_calculator", "calculator"]
TASKS: tuple[Task, ...] = ("arithmetic", "gsm8k_calculator", "calculator")
RECORD = "made_with.json"
MAX_STEPS: dict[Task, int] = {"arithmetic": 1000, "gsm8k_calculator": 1500, "calculator": 450}
# probability of a right answer at which the warm start stops; for calculator of a whole turn, of which one in
# five is a call
RIGHT: dict[Task, float] = {"arithmetic": 0.4, "gsm8k_calculator": 0.4, "calculator": 1.0}
# answers without a call for each answer with a call: the model calls one time in five, and otherwise guesses
# the product
DIRECT = 4
BATCH = 128
POOL = 4
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
DECAY = 0.6  # from this share of the steps on, the learning rate falls to 0
DRILLS = (  # generated problems that teach arithmetic for GSM8K's short and varied expressions
    {"digits": 1, "operations": "+-*"},
    {"digits": 2, "operations": "+-"},
    {"digits": 3, "operations": "+-", "count": 8000},
)
IGNORED = -100  # cross_entropy's label of positions that do not count


class WarmStart(NamedTuple):
    steps: int
    right: float  # mean probability of the right answer over the last POOL batches, each before its update
    seconds: float


def make_tiny_model(
    out: str | os.PathLike[str],
    *,
    task: Task = "arithmetic",
    data: str | os.PathLike[str] | None = None,
    held_out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    steps: int | None = None,
    right: float | None = None,
    tied: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Writes a warm-started model to ``out``, unless ``out`` was already made with the same arguments.

    data, held_out: GSM8K's train and test file, for the task gsm8k_calculator; no expression of the test file
    is trained on. steps: the maximal number of steps; None: the task's. right: stop at this probability of a
    right sampled answer; None: the task's. say: receives a line about what was done. Raises ValueError if
    ``out`` has contents that this function did not make, or if the files do not fit the task.
    """
    out = Path(out)
    steps = MAX_STEPS[task] if steps is None else steps
    right = RIGHT[task] if right is None else right
    made_with = _arguments(task, data, held_out, seed=seed, steps=steps, right=right, tied=tied)
    if read_record(out) == made_with:
        if say is not None:
            say(f"{out}: already made with these arguments")
        return out
    tokenizer = character_tokenizer()
    model = tiny_model(tokenizer, tied=tied, seed=seed)
    encode_prompts = _turn_examples if task == "calculator" else _examples
    examples = [
        example
        for prompts in warm_up_sets(task, data, held_out, tokenizer)
        for example in encode_prompts(prompts, tokenizer)
    ]
    result = warm_start(model, examples, steps=steps, right=right, seed=seed)
    if say is not None:
        say(
            f"{out}: {result.steps} steps in {result.seconds:.0f} s; a sampled answer is right with "
            f"probability {result.right:.2f}"
        )
    return put_model(out, model, tokenizer, made_with)


def put_model(
    out: Path, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, made_with: Mapping[str, Any]
) -> Path:
    """Writes the model to ``out`` atomically, with a record of its arguments, which ``read_record`` reads."""
    scratch = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    save_model(model, tokenizer, scratch)
    (scratch / RECORD).write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    scratch.replace(out)
    return out


def warm_start(
    model: Qwen2ForCausalLM,
    examples: Sequence[tuple[list[int], list[int]]],
    *,
    steps: int,
    right: float,
    seed: int,
) -> WarmStart:
    """Trains on (prompt ids, answer ids) until the mean probability of the answer reaches ``right``.

    The loss is on answer tokens only.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS, (1 - step / steps) / (1 - DECAY))
    )
    batches = _batches(examples, seed)
    history: list[float] = []
    started = time.perf_counter()
    with reproducible(threads=2):
        model.train()
        while len(history) < steps:
            nll, keep = _answer_nll(model, next(batches))
            history.append(_answer_probability(nll, keep).mean().item())
            if len(history) >= POOL and sum(history[-POOL:]) / POOL >= right:
                break
            optimizer.zero_grad()
            (nll.sum() / keep.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
    recent = history[-POOL:]
    return WarmStart(len(history), sum(recent) / len(recent), time.perf_counter() - started)


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, prompts: PromptSet, tokenizer: Qwen2Tokenizer) -> dict[str, float]:
    """Exact expected pass@1 and pass@8 at temperature 1: p and 1 - (1 - p)^8, with p the probability of the
    answer, which has only one spelling.
    """
    examples = _examples(prompts, tokenizer)
    rights = [
        _answer_probability(*_answer_nll(model, examples[start : start + 256]))
        for start in range(0, len(examples), 256)
    ]
    right = torch.cat(rights).double()
    return {
        "pass@1": right.mean().item(),
        "pass@8": (1 - (1 - right) ** 8).mean().item(),
        "prompts": float(len(right)),
    }


def _answer_nll(
    model: Qwen2ForCausalLM, examples: Sequence[tuple[list[int], list[int]]]
) -> tuple[Tensor, Tensor]:
    """Negative log-probs (nats) of the answer tokens, 0 elsewhere, and the mask of answer tokens; both
    (rows, length - 1).
    """
    length = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(examples):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : stop] = torch.tensor(answer)
    logits = model(input_ids=ids).logits[:, :-1]  # right-padded and causal: no attention mask is needed
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return nll, labels[:, 1:] != IGNORED


def _answer_probability(nll: Tensor, keep: Tensor) -> Tensor:
    """(rows,) probability of the whole answer, including its EOS."""
    return (nll.detach() * keep).sum(dim=1).neg().exp()


def _batches(
    examples: Sequence[tuple[list[int], list[int]]], seed: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Batches with every example once per pass; POOL batches at a time are sorted by prompt length, so that
    batches have little padding.

    They are not sorted by answer length: with separate batches of sums below and above 100 the model would
    need twice the steps.
    """
    generator = random.Random(seed)
    queue: list[tuple[list[int], list[int]]] = []
    while True:
        while len(queue) < POOL * BATCH:
            queue += generator.sample(examples, len(examples))
        pool = sorted(queue[: POOL * BATCH], key=lambda example: len(example[0]))
        queue = queue[POOL * BATCH :]
        yield from generator.sample(
            [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)], POOL
        )


def warm_up_sets(
    task: Task,
    data: str | os.PathLike[str] | None,
    held_out: str | os.PathLike[str] | None,
    tokenizer: Qwen2Tokenizer,
) -> list[PromptSet]:
    """The prompts of the warm start: the task's training prompts and, for GSM8K, drills; no held-out
    prompt.
    """
    train = load_prompts(_data(task, data, held_out), "train", tokenizer, seed=0)
    if task != "gsm8k_calculator":
        return [train]
    reserved = load_prompts(_data(task, data, held_out), "eval", tokenizer, seed=0)
    drills = [
        load_prompts(Data(train="arithmetic", options=options), "train", tokenizer, seed=0)
        for options in DRILLS
    ]
    return [train, *(without_prompts(drill, without_prompts(reserved, train)) for drill in drills)]


def _examples(prompts: PromptSet, tokenizer: Qwen2Tokenizer) -> list[tuple[list[int], list[int]]]:
    def answer_ids(answer: str) -> list[int]:
        return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.get_vocab()[EOS]]

    return [(list(prompt.token_ids), answer_ids(prompt.columns["answer"])) for prompt in prompts.prompts]


def _turn_examples(prompts: PromptSet, tokenizer: Qwen2Tokenizer) -> list[tuple[list[int], list[int]]]:
    """For each problem DIRECT times its direct answer, one calculator call, and one answer after the
    calculator's reply.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    examples: list[tuple[list[int], list[int]]] = []
    for prompt in prompts.prompts:
        prompt_ids = list(prompt.token_ids)
        answer = prompt.columns["answer"]
        call = [*ids(f"<<{prompt.text.removeprefix(USER).removesuffix(ASSISTANT)}"), tokenizer.eos_token_id]
        observed_ids = prompt_ids + call + ids(f"{USER}{answer}{ASSISTANT}")
        direct = [*ids(answer), tokenizer.eos_token_id]
        examples += [(prompt_ids, direct)] * DIRECT + [(prompt_ids, call), (observed_ids, direct)]
    return examples


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """A context with this number of threads, which decides how sums are split, and deterministic kernels."""
    previous_threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(previous_threads)


def _data(task: Task, train: str | os.PathLike[str] | None, held_out: str | os.PathLike[str] | None) -> Data:
    if task != "gsm8k_calculator":
        return Data(
            train="arithmetic", eval="arithmetic", options={"operations": "*"} if task == "calculator" else {}
        )
    return Data(train=str(train), eval=str(held_out), adapter="gsm8k_calculator", max_prompt_tokens=24)


def _arguments(
    task: Task, data: str | os.PathLike[str] | None, held_out: str | os.PathLike[str] | None, **others: Any
) -> dict[str, Any]:
    """Everything that decides the weights."""
    paths = [None if path is None else os.fspath(path) for path in (data, held_out)]
    require_task_files(task, *paths)
    files = [Path(path) for path in paths if path is not None]
    return {"task": task, **arguments_of(files, __file__, **others)}


def arguments_of(files: Sequence[Path], *scripts: str, **others: Any) -> dict[str, Any]:
    """Everything that decides the weights: data files, scripts and versions, besides the arguments.

    Raises ValueError on a missing file.
    """
    for path in files:
        if not path.is_file():
            raise ValueError(f"no such file: {path}")
    return {
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        **others,
        "script": [hashlib.sha256(Path(script).read_bytes()).hexdigest() for script in scripts],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read_record(out: Path) -> dict[str, Any] | None:
    """The arguments with which ``out`` was made; None if ``out`` is absent or empty.

    Raises ValueError if ``out`` has other contents.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / RECORD).is_file():
        raise ValueError(
            f"{out} exists and was not made by rltrain tiny-model (no {RECORD} in it); choose another "
            "--out or remove it"
        )
    return json.loads((out / RECORD).read_text(encoding="utf-8"))


def measure_folder(out: Path, task: Task, data: str | None, held_out: str | None) -> dict[str, float]:
    """``measure`` of the model in ``out`` on the task's held-out problems."""
    tokenizer = Qwen2Tokenizer.from_pretrained(out)
    model = Qwen2ForCausalLM.from_pretrained(out)
    source = _data(task, data, held_out)
    train, evaluation = (load_prompts(source, side, tokenizer, seed=0) for side in ("train", "eval"))
    return measure(model, without_prompts(evaluation, train), tokenizer)
