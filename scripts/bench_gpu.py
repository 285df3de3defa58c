"""What the learner and its engines cost on a GPU, in sections of less than four minutes each.

    python scripts/bench_gpu.py [--json FILE] [--tiny] [SECTION ...]

head: the output head by chunk size, against Liger, CCE and the naive form where they are installed.
body: transformer layers in the two forms in which backends run them, their share of the peak, top kernels.
share: preference pairs with their prompt once or twice.
learner: loading, passes, an update, a frozen model.
engine: the push of weights, and sampling.
prints: fingerprints of all weights.
sleep: memory of an engine that starts, sleeps, wakes and is loaded (vLLM where it is installed).
mismatch: |learner - engine log-prob| per token, with the head in bfloat16 and in float32.

One JSON object per measurement on stdout; ``--json`` writes them to a file with versions and machine. A
section that fails is reported and costs itself only. A section stops before its next measurement when its
time is over. ``--tiny`` runs the same calls at toy sizes, on a CPU as well: that shows that the script
runs, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.learner.forward import PolicyForward
from rltrain.learner.head import token_statistics
from rltrain.learner.packing import MicroBatch, build
from rltrain.learner.policy_learner import PolicyLearner
from rltrain.learner.shared_prompt import build_shared
from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.protocols import RolloutEngine
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.rollout.groups import sample_groups
from rltrain.tensor_ops import weight_fingerprint
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.samples import Prompt, Sampling

SECTION_SECONDS = 230.0
PACKAGES = ("torch", "transformers", "accelerate", "vllm", "liger-kernel", "cut-cross-entropy", "triton")
GB = 1e9


class OutOfTimeError(Exception):
    """The section's time is over."""


@dataclass(frozen=True)
class Sizes:
    """Shapes of a 7B model for head and layers, and of a 1.5B model for learner and engines."""

    hidden: int = 3584
    inner: int = 18944
    heads: int = 28
    kv_heads: int = 4
    vocabulary: int = 152064
    layer_vocabulary: int = 8192  # of the stacks of layers, so that the head costs little
    tokens: int = 16384
    chunks: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    rows: tuple[tuple[int, int], ...] = ((3, 9216), (15, 2184))  # (rows, tokens of each)
    pairs: tuple[tuple[int, int], ...] = ((1024, 8192), (1024, 2048), (512, 512))  # (prompt, completion)
    prompt: int = 150
    small: tuple[int, int, int, int, int, int] = (1536, 8960, 12, 2, 151936, 28)
    completions: int = 64
    longest: int = 1024
    sampled_prompts: int = 32
    sampled_tokens: int = 256
    repeats: int = 3


TINY = Sizes(
    hidden=64,
    inner=128,
    heads=4,
    kv_heads=2,
    vocabulary=512,
    layer_vocabulary=512,
    tokens=64,
    chunks=(16, 64),
    rows=((3, 48),),
    pairs=((16, 32),),
    prompt=8,
    small=(64, 128, 4, 2, 512, 2),
    completions=8,
    longest=16,
    sampled_prompts=2,
    sampled_tokens=8,
    repeats=1,
)


@dataclass
class Bench:
    """Sizes, the device, and what was measured so far."""

    sizes: Sizes
    device: str
    results: list[dict[str, Any]] = field(default_factory=list)
    section: str = ""
    section_start: float = 0.0
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _learner: PolicyLearner | None = None

    @property
    def has_gpu(self) -> bool:
        return self.device == "cuda"

    def record(self, what: str, **numbers: Any) -> None:
        """Print and keep a measurement. Raises OutOfTimeError once the section's time is over."""
        seconds = time.perf_counter() - self.section_start
        result = {"section": self.section, "what": what, **numbers, "at_seconds": round(seconds, 1)}
        self.results.append(result)
        print(json.dumps(result), flush=True)
        if seconds > SECTION_SECONDS:
            raise OutOfTimeError

    def synchronize(self) -> None:
        if self.has_gpu:
            torch.cuda.synchronize()

    def time_call(self, call: Callable[[], Any], warm_up: int = 1) -> float:
        """Median milliseconds of a call."""
        for _ in range(warm_up):
            call()
        times = []
        for _ in range(self.sizes.repeats):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        return round(statistics.median(times), 3)

    def peak_gb(self, call: Callable[[], Any]) -> float | None:
        """GB that a call allocates at its peak beyond what was there; None on a CPU."""
        if not self.has_gpu:
            call()
            return None
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return round((torch.cuda.max_memory_allocated() - base) / GB, 3)

    def used_gb(self) -> float | None:
        """GB of the GPU in use by all processes, non-torch memory included; None on a CPU."""
        if not self.has_gpu:
            return None
        free, total = torch.cuda.mem_get_info()
        return round((total - free) / GB, 3)

    def peak_used_gb(self, call: Callable[[], Any]) -> float | None:
        """The largest ``used_gb`` during a call, looked up every two milliseconds; None on a CPU."""
        if not self.has_gpu:
            call()
            return None
        readings = [self.used_gb() or 0.0]
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.002):
                readings.append(self.used_gb() or 0.0)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            call()
            self.synchronize()
        finally:
            is_over.set()
            watcher.join()
        return max(readings)

    def model_folder(self) -> str:
        """A model with random weights, made at the first call."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            hidden, inner, heads, kv_heads, vocabulary, layers = self.sizes.small
            config = qwen_config(hidden, inner, heads, kv_heads, vocabulary, layers, tied=True)
            make_model(config, self.device, torch.bfloat16).save_pretrained(self._folder.name)
            free_memory()
        return self._folder.name

    def learner(self) -> PolicyLearner:
        """A learner of ``model_folder``, loaded at the first call."""
        if self._learner is None:
            settings = Learner(
                optimizer=Optimizer(lr=1e-6),
                tokens_per_micro_batch=8 * (self.sizes.longest + self.sizes.prompt),
                gradient_checkpointing=True,
            )
            self._learner = PolicyLearner(
                Model(path=self.model_folder()),
                settings,
                temperature=1.0,
                max_tokens=self.sizes.longest,
                total_updates=100,
                seed=0,
            )
        return self._learner

    def close(self) -> None:
        self._learner = None
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = None


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# models and rows --------------------------------------------------------------------------------------------


def qwen_config(
    hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, layers: int, *, tied: bool = False
) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        use_sliding_window=False,
        sliding_window=None,
    )


def make_model(config: Any, device: str, dtype: torch.dtype) -> Any:
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM(config)
    return model.to(dtype)


def make_policy(bench: Bench, layers: int, dtype: torch.dtype) -> PolicyForward:
    """A stack of 7B layers with gradient checkpointing."""
    sizes = bench.sizes
    config = qwen_config(
        sizes.hidden, sizes.inner, sizes.heads, sizes.kv_heads, sizes.layer_vocabulary, layers
    )
    model = make_model(config, bench.device, dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyForward(model).train()


def make_rows(lengths: Sequence[int], prompt: int) -> TokenRows:
    """Rows of ``lengths`` tokens, of which ``prompt`` are the prompt's."""
    prompts = tuple((place % 100 + 1,) * prompt for place in range(len(lengths)))
    return TokenRows(prompts, tuple((5,) * (length - prompt) for length in lengths))


def update_call(
    policy: PolicyForward, micro_batch: MicroBatch, device: str, *, autocast: bool
) -> Callable[[], None]:
    """A forward and backward pass of one micro-batch."""

    def run() -> None:
        policy.zero_grad(set_to_none=True)
        context = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            statistics_of_tokens = policy(micro_batch, temperature=1.0, wants=frozenset({"logp"}), chunk=2048)
        statistics_of_tokens["logp"].sum().backward()

    return run


# sections ---------------------------------------------------------------------------------------------------


def run_head(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, wants: frozenset[str]) -> None:
    """The sum of log-probs by the learner's head, and its gradient."""
    hidden.grad = weight.grad = None
    values = token_statistics(hidden, weight, targets, temperature=1.0, wants=wants, chunk=chunk)
    values["logp"].sum().backward()


def measure_head(bench: Bench) -> None:
    sizes = bench.sizes
    for hidden_size in (sizes.hidden, sizes.small[0]):
        torch.manual_seed(0)
        shape = (sizes.tokens, hidden_size)
        hidden = (torch.randn(shape, device=bench.device) * 0.5).bfloat16().requires_grad_()
        weight = torch.randn(sizes.vocabulary, hidden_size, device=bench.device).mul_(0.02)
        weight = weight.bfloat16().requires_grad_()
        targets = torch.randint(0, sizes.vocabulary, shape[:1], device=bench.device)
        flop = 8 * sizes.tokens * hidden_size * sizes.vocabulary
        for chunk in sizes.chunks:
            call = partial(run_head, hidden, weight, targets, chunk, frozenset({"logp", "entropy"}))
            milliseconds = bench.time_call(call)
            bench.record(
                "head",
                hidden=hidden_size,
                chunk=chunk,
                ms=milliseconds,
                tflops=round(flop / milliseconds / 1e9, 1),
                peak_gb=bench.peak_gb(call),
            )
        run_head(hidden, weight, targets, sizes.chunks[0], frozenset({"logp"}))
        assert hidden.grad is not None
        for name, other in other_heads(hidden, weight, targets).items():
            measure_other_head(bench, name, other, hidden, hidden.grad.clone())


def other_heads(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], None]]:
    """The sum of minus log-probs and its gradients by other means, as far as they are installed."""

    def run_naive() -> None:
        logits = (hidden @ weight.t()).float()
        torch.log_softmax(logits, -1).gather(1, targets[:, None]).sum().backward()

    heads = {"naive": run_naive}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        heads["liger"] = lambda: (-liger(weight, hidden, targets)).backward()
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        heads["cce"] = lambda: (-linear_cross_entropy(hidden, weight, targets, reduction="sum")).backward()
    return heads


def measure_other_head(
    bench: Bench, name: str, other: Callable[[], None], hidden: Tensor, expected: Tensor
) -> None:
    """Time and peak of another head, and how far its gradient is from ours, relative."""

    def run() -> None:
        hidden.grad = None
        other()

    try:
        milliseconds = bench.time_call(run)
        peak = bench.peak_gb(run)
    except RuntimeError as error:  # out of memory, or a kernel that this GPU does not have
        bench.record("head", form=name, error=str(error)[:200])
        return
    assert hidden.grad is not None
    distance = (hidden.grad.float() - expected.float()).norm() / expected.float().norm()
    bench.record(
        "head", form=name, ms=milliseconds, peak_gb=peak, gradient_difference=round(float(distance), 5)
    )


def measure_body(bench: Bench) -> None:
    """Time of a layer as the difference of two stacks, with bfloat16 weights and under autocast."""
    sizes = bench.sizes
    for form, dtype, autocast in (
        ("bfloat16 weights, as FSDP2 gathers them", torch.bfloat16, False),
        ("float32 weights under autocast, as in DDP", torch.float32, True),
    ):
        times: dict[tuple[int, int], float] = {}
        for layers in (2, 6):
            policy = make_policy(bench, layers, dtype)
            for count, length in sizes.rows:
                rows = make_rows([length] * count, sizes.prompt)
                micro_batch = build(rows, range(count), layout="padded", device=bench.device)
                call = update_call(policy, micro_batch, bench.device, autocast=autocast)
                times[layers, length] = bench.time_call(call)
                bench.record(
                    "stack",
                    form=form,
                    layers=layers,
                    rows=count,
                    row_tokens=length,
                    ms=times[layers, length],
                    peak_gb=bench.peak_gb(call),
                )
                if bench.has_gpu and layers == 6 and not autocast:
                    bench.record("kernels", row_tokens=length, top=top_kernels(call))
            del policy
            free_memory()
        for count, length in sizes.rows:
            milliseconds = (times[6, length] - times[2, length]) / 4
            rate = layer_flop(sizes, count, length) / (milliseconds * 1e9) if milliseconds > 0 else None
            bench.record("layer", form=form, row_tokens=length, ms=round(milliseconds, 3), model_tflops=rate)


def layer_flop(sizes: Sizes, rows: int, length: int) -> float:
    """Of one layer's forward and backward pass, recomputation not counted."""
    kv_width = sizes.kv_heads * sizes.hidden // sizes.heads
    matrices = 2 * sizes.hidden * (sizes.hidden + kv_width) + 3 * sizes.hidden * sizes.inner
    return 6.0 * rows * length * (matrices + length * sizes.hidden)


def top_kernels(call: Callable[[], None]) -> list[list[Any]]:
    """(name, calls, milliseconds) of the kernels that take most."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:14]
    return [[event.key[:70], event.count, round(event.self_device_time_total / 1e3, 2)] for event in events]


def measure_share(bench: Bench) -> None:
    sizes = bench.sizes
    policy = make_policy(bench, 2, torch.bfloat16)
    for prompt, completion in sizes.pairs:
        pairs = max(1, sizes.tokens // (prompt + 2 * completion))
        prompts = tuple((place + 1,) * prompt for place in range(pairs))
        rows = TokenRows(prompts * 2, tuple((5,) * completion for _ in range(2 * pairs)))
        lines = [(place, pairs + place) for place in range(pairs)]
        for form, micro_batch in (
            ("apart", build(rows, range(2 * pairs), layout="padded", device=bench.device)),
            ("shared", build_shared(rows, lines, device=bench.device)),
        ):
            call = update_call(policy, micro_batch, bench.device, autocast=False)
            bench.record(
                "pairs",
                form=form,
                prompt=prompt,
                completion=completion,
                pairs=pairs,
                ms=bench.time_call(call),
                peak_gb=bench.peak_gb(call),
            )


def make_batch(bench: Bench) -> tuple[TokenRows, TrainBatch, Objective]:
    """A step of GRPO with completions of eight lengths."""
    count = bench.sizes.completions
    longest = bench.sizes.longest
    lengths = [max(2, longest * (place % 8 + 1) // 8) for place in range(count)]
    rows = TokenRows(
        tuple((place // 8 + 1,) * bench.sizes.prompt for place in range(count)),
        tuple((5 + place,) * length for place, length in enumerate(lengths)),
    )
    shape = (count, max(lengths))
    batch = TrainBatch(
        mask=torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None],
        advantages=torch.randn(count, 1).expand(shape).clone(),
        weights=torch.ones(shape),
        rewards=torch.randn(count),
        group=torch.arange(count) // 8,
        source=torch.zeros(count, dtype=torch.int64),
        version=torch.zeros(count, dtype=torch.int64),
    )
    objective = Objective(
        policy_loss=POLICY_LOSSES.bind("clip", {}), terms=(), aggregate=AGGREGATES.bind("token_mean", {})
    )
    return rows, batch, objective


def measure_learner(bench: Bench) -> None:
    start = time.perf_counter()
    learner = bench.learner()
    bench.record("load", seconds=round(time.perf_counter() - start, 2), used_gb=bench.used_gb())
    rows, batch, objective = make_batch(bench)
    tokens = sum(map(len, rows.prompts)) + sum(map(len, rows.completions))
    calls: dict[str, Callable[[], Any]] = {
        "annotate": lambda: learner.annotate(rows, frozenset({"logp", "entropy"})),
        "update": lambda: learner.update(rows, batch, objective),
    }
    for name, call in calls.items():
        milliseconds = bench.time_call(call)
        peak = bench.peak_gb(call)
        bench.record(
            name, ms=milliseconds, tokens_per_second=round(tokens / milliseconds * 1e3), peak_gb=peak
        )
    learner.use_frozen("ref_logp", None, Model(path=bench.model_folder()))
    milliseconds = bench.time_call(lambda: learner.annotate(rows, frozenset({"ref_logp"})))
    bench.record("annotate, frozen model", ms=milliseconds, used_gb=bench.used_gb())
    learner.frozen.clear()


def make_embedded_engine(bench: Bench) -> TransformersEngine:
    dtype = torch.bfloat16 if bench.has_gpu else torch.float32
    return TransformersEngine(
        bench.model_folder(),
        stop_token_ids=[1],
        pad_token_id=0,
        decode=lambda ids: "",
        max_rows=256,
        device=bench.device,
        dtype=dtype,
    )


def make_engine(bench: Bench) -> RolloutEngine:
    """vLLM on a GPU where it is installed, otherwise the embedded engine."""
    if not bench.has_gpu or importlib.util.find_spec("vllm") is None:
        return make_embedded_engine(bench)
    from rltrain.rollout.engines.vllm.colocated import VllmColocated

    return VllmColocated(
        bench.model_folder(),
        stop_token_ids=[1],
        decode=lambda ids: "",
        max_model_len=2048,
        max_num_seqs=256,
        kv_cache_gib=1.0,
        gpu_memory_utilization=0.3,
        dtype=torch.bfloat16,
    )


def make_prompts(bench: Bench) -> list[Prompt]:
    token_ids = tuple(range(5, 5 + bench.sizes.prompt))
    return [Prompt(str(place), (*token_ids, 5 + place), "") for place in range(bench.sizes.sampled_prompts)]


def measure_engine(bench: Bench) -> None:
    learner = bench.learner()
    sizes = bench.sizes
    engine = make_embedded_engine(bench)

    def push() -> None:
        engine.load(learner.weights(), learner.version)

    bench.record("push to the embedded engine", ms=bench.time_call(push), peak_gb=bench.peak_gb(push))
    sampling = Sampling(n=8, temperature=1.0, max_tokens=sizes.sampled_tokens, seed=1)
    start = time.perf_counter()
    groups = sample_groups(engine, make_prompts(bench), sampling, learner.version)
    seconds = time.perf_counter() - start
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    bench.record("sampling, embedded engine", tokens=tokens, tokens_per_second=round(tokens / seconds))
    engine.close()


def measure_prints(bench: Bench) -> None:
    learner = bench.learner()
    for dtype in (torch.float32, torch.bfloat16):

        def fingerprint_all(dtype: torch.dtype = dtype) -> None:
            for name, weight in learner.weights():
                weight_fingerprint(name, weight.detach().to(dtype))

        bench.record("fingerprints of all weights", dtype=str(dtype), ms=bench.time_call(fingerprint_all))


def measure_sleep(bench: Bench) -> None:
    """Memory of the whole GPU in each state of an engine beside a learner, and its peak on the way there."""
    learner = bench.learner()
    bench.record("learner alone", used_gb=bench.used_gb())
    start = time.perf_counter()
    with contextlib.closing(make_engine(bench)) as engine:
        seconds = round(time.perf_counter() - start, 2)
        bench.record("engine started", engine=engine.name, seconds=seconds, used_gb=bench.used_gb())
        for cycle in range(2):
            for state, call in (
                ("asleep", engine.sleep),
                ("awake", engine.wake),
                ("loaded", lambda: engine.load(learner.weights(), learner.version)),
            ):
                start = time.perf_counter()
                peak = bench.peak_used_gb(call)
                bench.record(
                    state,
                    engine=engine.name,
                    cycle=cycle,
                    seconds=round(time.perf_counter() - start, 3),
                    used_gb=bench.used_gb(),
                    peak_used_gb=peak,
                    reserved_gb=round(torch.cuda.memory_reserved() / GB, 3) if bench.has_gpu else None,
                )


def measure_mismatch(bench: Bench) -> None:
    """The engine samples in its dtype; the learner's model scores the rows under bfloat16 autocast."""
    learner = bench.learner()
    sizes = bench.sizes
    sampling = Sampling(n=2, temperature=1.0, max_tokens=sizes.sampled_tokens, seed=2)
    with contextlib.closing(make_engine(bench)) as engine:
        engine.load(learner.weights(), learner.version)
        groups = sample_groups(engine, make_prompts(bench), sampling, learner.version)
    samples = [(group.prompt, completion) for group in groups for completion in group.completions]
    rows = TokenRows(
        tuple(prompt.token_ids for prompt, _ in samples), tuple(item.token_ids for _, item in samples)
    )
    for fp32_head in (False, True):
        policy = PolicyForward(learner.model, fp32_head=fp32_head).eval()
        differences = []
        for place, (_, completion) in enumerate(samples):
            micro_batch = build(rows, [place], layout="padded", device=bench.device)
            with torch.no_grad(), torch.autocast(bench.device, torch.bfloat16):
                logp = policy(micro_batch, temperature=1.0, wants=frozenset({"logp"}), chunk=256)["logp"]
            engine_logp = torch.tensor(completion.logprobs)
            differences.append((logp[0, : len(engine_logp)].float().cpu() - engine_logp).abs())
        distances = torch.cat(differences)
        bench.record(
            "mismatch",
            engine=engine.name,
            fp32_head=fp32_head,
            tokens=len(distances),
            mean=float(distances.mean()),
            largest=float(distances.max()),
        )


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "head": measure_head,
    "body": measure_body,
    "share": measure_share,
    "learner": measure_learner,
    "engine": measure_engine,
    "prints": measure_prints,
    "sleep": measure_sleep,
    "mismatch": measure_mismatch,
}


# the run ----------------------------------------------------------------------------------------------------


def describe_machine(device: str) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": device,
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        machine |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_bytes": total,
            "free_bytes_at_start": free,
            "cuda": torch.version.cuda,
        }
    return machine


def package_versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def run_section(bench: Bench, name: str) -> bool:
    """Whether the section ran to its end, or until its time was over."""
    bench.section = name
    bench.section_start = time.perf_counter()
    try:
        SECTIONS[name](bench)
    except OutOfTimeError:
        print(json.dumps({"section": name, "what": "stopped", "after_seconds": SECTION_SECONDS}), flush=True)
    except Exception:
        bench.results.append({"section": name, "what": "failed", "error": traceback.format_exc()[-2000:]})
        print(json.dumps(bench.results[-1]), flush=True)
        return False
    finally:
        free_memory()
    return True


def write_report(path: Path, bench: Bench, *, tiny: bool) -> None:
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "tiny": tiny,
        "machine": describe_machine(bench.device),
        "versions": dict(package_versions()),
        "results": bench.results,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, also without a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.sections) - SECTIONS.keys()):
        parser.error(f"no section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not arguments.tiny:
        parser.error("torch finds no CUDA GPU; --tiny runs every section at toy sizes on the CPU")
    bench = Bench(TINY if arguments.tiny else Sizes(), "cuda" if has_gpu else "cpu")
    succeeded = True
    try:
        for name in arguments.sections or SECTIONS:
            succeeded &= run_section(bench, name)
            if arguments.json is not None:
                write_report(arguments.json, bench, tiny=arguments.tiny)
    finally:
        bench.close()
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
