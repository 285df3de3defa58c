"""Compares the tokens per second of rltrain's engines and of transformers' two ways to generate, on the same
random models.

    python scripts/bench_generate.py [--json FILE] [--repeats 3] [--cases short,skewed_32,skewed_128]
    [--engines ours,generate,...]

Every engine samples at temperature 1 from the whole vocabulary with the same distribution of lengths. Runs of
all engines alternate, so that other load slows all of them, and the median is reported. Ratios are against
the better of transformers' two.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rltrain.protocols import RolloutEngine
from rltrain.rollout.groups import sample_groups
from rltrain.types.samples import Prompt, Sampling

EOS = 1
PAD = 0
# (seed, maximal tokens per completion) -> completion tokens written
Generator = Callable[[int, int], int]


@dataclass(frozen=True)
class Case:
    name: str
    hidden: int
    layers: int
    vocabulary: int
    prompt_tokens: int
    prompts: int
    n: int
    max_tokens: int
    eos_log_odds: float | None  # of EOS at each token; None: every completion has max_tokens tokens


CASES = {
    case.name: case
    for case in (
        Case("short", 128, 4, 64, 10, 8, 8, 8, None),  # 0.8M parameters, 64 completions of 8 tokens
        # 12M parameters; lengths geometric with mean about 60, cut at 256
        Case("skewed_32", 256, 6, 32768, 100, 4, 8, 256, -4.1),
        Case("skewed_128", 256, 6, 32768, 100, 16, 8, 256, -4.1),
    )
}


def random_model(case: Case, folder: Path) -> Qwen2ForCausalLM:
    """A random Qwen2 with a nearly constant probability of EOS: hidden dimension 0 is large and nearly
    constant, and only EOS reads it.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 32,
        num_key_value_heads=case.hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=case.vocabulary > 1000,
        eos_token_id=EOS if stops(case) else None,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        if case.eos_log_odds is not None:
            hidden = model.model(torch.randint(2, case.vocabulary, (8, 64))).last_hidden_state.flatten(0, 1)
            others = torch.logsumexp(model.lm_head(hidden), dim=-1).mean()
            model.lm_head.weight[EOS] = 0
            model.lm_head.weight[EOS, 0] = (others + case.eos_log_odds) / hidden[:, 0].mean()
    model.save_pretrained(folder)
    return model


def prompts_of(case: Case) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, case.vocabulary, (case.prompts, case.prompt_tokens), generator=generator)
    return [Prompt(f"p{index}", tuple(row), "") for index, row in enumerate(ids.tolist())]


def ours(case: Case, model: Qwen2ForCausalLM, folder: Path) -> Generator:
    from rltrain.rollout.engines.transformers.engine import TransformersEngine

    engine = TransformersEngine(
        str(folder), stop_token_ids=stops(case), pad_token_id=PAD, decode=lambda ids: "", max_rows=256
    )
    return engine_generator(engine, case, model)


def vllm(case: Case, model: Qwen2ForCausalLM, folder: Path) -> Generator:
    from rltrain.rollout.engines.vllm.colocated import VllmColocated

    engine = VllmColocated(
        str(folder), stop_token_ids=stops(case), decode=lambda ids: "", max_num_seqs=256, max_model_len=512,
        kv_cache_gib=1.0, enforce_eager=True,
    )  # fmt: skip
    return engine_generator(engine, case, model)


def engine_generator(engine: RolloutEngine, case: Case, model: Qwen2ForCausalLM) -> Generator:
    engine.load(model.named_parameters(), 0)

    def generate(seed: int, max_tokens: int) -> int:
        groups = sample_groups(engine, prompts_of(case), Sampling(case.n, 1.0, max_tokens, seed), 0)
        return sum(len(completion.token_ids) for group in groups for completion in group.completions)

    return generate


def stops(case: Case) -> set[int]:
    return set() if case.eos_log_odds is None else {EOS}


def sampling_config(case: Case, max_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_tokens,
        eos_token_id=EOS if stops(case) else None, pad_token_id=PAD,
    )  # fmt: skip


def plain_generate(case: Case, model: Qwen2ForCausalLM, folder: Path) -> Generator:
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    rows = torch.tensor([prompt.token_ids for prompt in prompts_of(case)]).repeat_interleave(case.n, dim=0)

    def generate(seed: int, max_tokens: int) -> int:
        torch.manual_seed(seed)
        out = peer.generate(
            rows, attention_mask=torch.ones_like(rows), generation_config=sampling_config(case, max_tokens)
        )
        out = out[:, rows.shape[1] :]
        eos_count = (out == EOS).long().cumsum(1)
        is_written = (eos_count - (out == EOS).long()) == 0  # tokens up to and including the first EOS
        return int(is_written.sum()) if stops(case) else out.numel()

    return generate


def batch_generate(case: Case, model: Qwen2ForCausalLM, folder: Path) -> Generator:
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    rows = [list(prompt.token_ids) for prompt in prompts_of(case) for _ in range(case.n)]
    # Enough cache for all rows at once; the default takes 0.9 of the machine's memory.
    pages = -(-(case.prompt_tokens + case.max_tokens) // 32)
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=len(rows) * pages, max_batch_tokens=max(256, 2 * len(rows))
    )

    def generate(seed: int, max_tokens: int) -> int:
        torch.manual_seed(seed)
        out = peer.generate_batch(
            rows, generation_config=sampling_config(case, max_tokens), continuous_batching_config=batching
        )
        return sum(len(output.generated_tokens) for output in out.values())

    return generate


ENGINES = {"ours": ours, "generate": plain_generate, "generate_batch": batch_generate, "vllm": vllm}


def measure(case: Case, names: list[str], repeats: int) -> dict[str, float]:
    """Median tokens per second by engine; each engine first warms up with 4 tokens, and runs alternate."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(case, Path(folder))
        generators = {name: ENGINES[name](case, model, Path(folder)) for name in names}
        for generator in generators.values():
            generator(0, 4)
        rates: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            for name, generator in generators.items():
                start = time.perf_counter()
                tokens = generator(repeat + 1, case.max_tokens)
                rates[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--engines", default="ours,generate,generate_batch")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.engines.split(",")
    print(f"{'tokens/s':>12} " + " ".join(f"{name:>15}" for name in names) + f" {'ratio':>8}")
    results: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    for case in arguments.cases.split(","):
        rates = results[case] = measure(CASES[case], names, arguments.repeats)
        peers = [rates[name] for name in ("generate", "generate_batch") if name in rates]
        if peers and "ours" in rates:
            ratios[case] = rates["ours"] / max(peers)
        print(
            f"{case:>12} "
            + " ".join(f"{rates[name]:15,.0f}" for name in names)
            + f" {ratios.get(case, float('nan')):8.2f}",
            flush=True,
        )
    if arguments.json:
        packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        machine = {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": arguments.threads,
            "python": platform.python_version(),
        }
        record = {
            "ratio_to_better_of_transformers": ratios,
            "tokens_per_second": results,
            "versions": packages,
            "machine": machine,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
