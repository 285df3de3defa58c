"""The shared part of the benchmarks against another trainer: a random model, one process per trainer,
alternating steps, medians, ratios.

Each trainer has a separate process, so that its peak memory (VmHWM) is its own, and the trainers alternate
step by step, so that other load slows both. A benchmark's workers are functions ``(case, folder, turns)``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

PAD = 0
EOS = 1
UNKNOWN = 2

# TRL's settings, as rltrain's are: no checkpoints, and steps until the bench is over
TRL = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "max_steps": 1_000_000,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
# of its GRPOTrainer: the clip loss, and the policy's own distribution
TRL_GRPO = TRL | {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "beta": 0.0,
    "epsilon": 0.2,
    "loss_type": "dapo",
}


class Turns:
    """A worker's side: reports each step to the parent and waits for a line from it before the next step.

    When its standard input is closed, the process ends.
    """

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # the libraries' output goes to stderr
        self.started = perf_counter()

    def step(self, amount: int) -> None:
        """Reports the end of a step. amount: units (completion tokens, pairs) that the step trained on."""
        self.say({"amount": amount, "seconds": perf_counter() - self.started, "peak": peak_bytes()})
        if not sys.stdin.readline():
            os._exit(0)
        self.started = perf_counter()

    def say(self, record: Mapping[str, float]) -> None:
        print(json.dumps(record), file=self.out, flush=True)


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; these benches need Linux")


@dataclass(frozen=True)
class Size:
    """The size of a random model. eos_log_odds: of EOS at each token; None: the model never writes EOS."""

    hidden: int
    layers: int
    vocabulary: int
    eos_log_odds: float | None = None


def make_model(size: Size, folder: Path) -> None:
    """Writes a random model with a nearly constant probability of EOS, and a tokenizer with one token per
    word (w3, w4, ...).

    Hidden dimension 0 is large and nearly constant, and only EOS reads it.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=size.vocabulary > 1000,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        hidden = model.model(torch.randint(3, size.vocabulary, (8, 64))).last_hidden_state.flatten(0, 1)
        others = torch.logsumexp(model.lm_head(hidden), dim=-1).mean()
        log_odds = -50.0 if size.eos_log_odds is None else size.eos_log_odds
        model.lm_head.weight[EOS] = 0
        model.lm_head.weight[EOS, 0] = (others + log_odds) / hidden[:, 0].mean()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder)
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNKNOWN} | {
        f"w{index}": index for index in range(3, size.vocabulary)
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def text_of(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


@dataclass(frozen=True)
class Real:
    """A model's folder and a JSONL file of texts."""

    model: Path | None
    texts: Path | None

    def link_model(self, folder: Path) -> None:
        """The model as ``folder``. Raises SystemExit where none was named."""
        if self.model is None or not self.model.is_dir():
            raise SystemExit(f"--model is {self.model}; this case needs a model's folder (rltrain get-model)")
        folder.symlink_to(self.model.resolve(), target_is_directory=True)

    def rows(self) -> list[dict[str, Any]]:
        if self.texts is None or not self.texts.is_file():
            raise SystemExit(f"--texts is {self.texts}; this case needs a JSONL file")
        return [json.loads(line) for line in self.texts.read_text(encoding="utf-8").splitlines()]


# the parent -------------------------------------------------------------------------------------------------


def gradients_at_step(learner: Any) -> dict[str, Any]:
    """Is filled with the gradient of each parameter when the optimizer takes its next step."""
    gradients: dict[str, Any] = {}

    def keep_gradients(*_: Any, **__: Any) -> None:
        gradients.update(
            {name: parameter.grad.clone() for name, parameter in learner.model.named_parameters()}
        )

    learner.trained.optimizer.register_step_pre_hook(keep_gradients)
    return gradients


@dataclass(frozen=True)
class Bench:
    """unit: what is counted. cases: by name. make: writes a case's model and data into a folder. workers:
    "rltrain", "trl" and "same_loss", which reports {"loss", "gradient", "theirs"} for one batch: the two
    differences, and the other trainer's loss. real: names of the cases that need what ``Real`` has, which
    run where they are asked for.
    """

    script: Path
    unit: str
    cases: Mapping[str, Any]
    make: Callable[[Any, Path, Real], None]
    workers: Mapping[str, Callable[[Any, Path, Turns], None]]
    real: Collection[str] = ()

    def main(self, doc: str) -> None:
        arguments = self._arguments(doc)
        if arguments.worker:
            self.workers[arguments.worker](self.cases[arguments.cases], arguments.folder, Turns())
            return
        results: dict[str, dict[str, Any]] = {}
        for name in arguments.cases.split(","):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                self.make(self.cases[name], folder, Real(arguments.model, arguments.texts))
                self._same_loss(name, folder, arguments)
                results[name] = {
                    trainer: asdict(result)
                    for trainer, result in self._measure(name, folder, arguments).items()
                }
                self._show(name, results[name])
        if arguments.json:
            write(arguments.json, results, arguments, self.unit)

    def _arguments(self, doc: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--json", type=Path)
        parser.add_argument(
            "--trl", type=Path, help="folder in which TRL is installed, if it is not in this environment"
        )
        parser.add_argument(
            "--repeats",
            type=integer_from(5),
            default=5,
            help="counted steps of each trainer, at least 5; the medians are over them",
        )
        parser.add_argument(
            "--warmup",
            type=integer_from(1),
            default=2,
            help="earlier steps of each trainer, not counted; the first steps run at the same time",
        )
        parser.add_argument("--cases", default=",".join(name for name in self.cases if name not in self.real))
        parser.add_argument("--model", type=Path, help="folder of the model that real cases train")
        parser.add_argument("--texts", type=Path, help="JSONL file of what they train on")
        parser.add_argument("--threads", type=int, default=os.cpu_count())
        parser.add_argument("--verbose", action="store_true", help="show what the trainers print")
        parser.add_argument("--worker", choices=tuple(self.workers), help=argparse.SUPPRESS)
        parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
        return parser.parse_args()

    def _same_loss(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        differences = answer(self._start("same_loss", name, folder, arguments), "same_loss")
        if not (differences["loss"] < 1e-5 and differences["gradient"] < 1e-4):
            raise SystemExit(
                f"{self.script.stem}: {name}: the two losses or gradients differ on one batch: {differences}"
            )
        print(
            f"{name}: same batch, loss {differences['theirs']:+.6f}, difference {differences['loss']:.1e}, "
            f"of the gradient {differences['gradient']:.1e}"
        )

    def _measure(self, name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Measured]:
        """Alternating steps of both trainers, after ``--warmup`` steps each; the first one alternates too."""
        running = {trainer: self._start(trainer, name, folder, arguments) for trainer in ("rltrain", "trl")}
        steps: dict[str, list[dict[str, float]]] = {trainer: [] for trainer in running}
        for number in range(arguments.warmup + arguments.repeats):
            for trainer in sorted(running, reverse=bool(number % 2)):
                if number > 0:
                    running[trainer].stdin.write("go\n")
                    running[trainer].stdin.flush()
                steps[trainer].append(answer(running[trainer], trainer))
        for worker in running.values():
            worker.stdin.close()
            worker.wait()
        return {
            trainer: Measured.from_steps(records[arguments.warmup :]) for trainer, records in steps.items()
        }

    def _start(self, worker: str, case: str, folder: Path, arguments: argparse.Namespace) -> Any:
        environment = worker_environment(self.script, arguments)
        command = [
            sys.executable,
            str(self.script),
            "--worker",
            worker,
            "--cases",
            case,
            "--folder",
            str(folder),
        ]
        errors = None if arguments.verbose else subprocess.DEVNULL
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )

    def _show(self, name: str, results: dict[str, Any]) -> None:
        for trainer, result in results.items():
            print(
                f"{name:>8} {trainer:>8} {result['per_second']:10,.1f} {self.unit}/s   "
                f"step {result['seconds']:7.3f} s   "
                f"{result['amount']:6,.0f} {self.unit}   peak {result['peak_gib']:.2f} GiB"
            )
        speed = ratio(results, "per_second")
        memory = ratio(results, "peak_gib")
        print(
            f"{name:>8}    ratio {speed:10.2f} of TRL's {self.unit}/s, {memory:.2f} of its peak", flush=True
        )


@dataclass(frozen=True)
class Measured:
    per_second: float  # median over steps
    seconds: float  # median step
    amount: float  # mean of a step
    peak_gib: float

    @classmethod
    def from_steps(cls, steps: list[dict[str, float]]) -> Measured:
        return cls(
            statistics.median(step["amount"] / step["seconds"] for step in steps),
            statistics.median(step["seconds"] for step in steps),
            statistics.fmean(step["amount"] for step in steps),
            max(step["peak"] for step in steps) / 2**30,
        )


def integer_from(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least ``least``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, it must be a whole number of at least {least}")
        return int(text)

    return number


def worker_environment(script: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """With rltrain, TRL and the number of threads."""
    paths = [
        str(script.parents[1]),
        *([str(arguments.trl)] if arguments.trl else []),
        os.environ.get("PYTHONPATH", ""),
    ]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(arguments.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def answer(worker: Any, name: str) -> dict[str, float]:
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(
            f"the {name} process ended with {worker.wait()}; run again with --verbose to see why"
        )
    return json.loads(line)


def ratio(results: dict[str, Any], key: str) -> float:
    return results["rltrain"][key] / results["trl"][key]


def write(path: Path, results: dict[str, dict[str, Any]], arguments: argparse.Namespace, unit: str) -> None:
    where = {} if arguments.trl is None else {"path": [str(arguments.trl)]}
    trl = next(iter(importlib.metadata.distributions(name="trl", **where))).version
    record = {
        f"{unit}_per_second_ratio": {name: ratio(result, "per_second") for name, result in results.items()},
        "peak_memory_ratio": {name: ratio(result, "peak_gib") for name, result in results.items()},
        "measured": results,
        "versions": {"trl": trl}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": arguments.threads,
            "python": platform.python_version(),
        },
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
