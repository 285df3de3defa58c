"""Servers that load the extension with faults to order, and pushes to them.

Run as a module, it is ``rltrain`` whose workers do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.cli import worker as worker_module
from rltrain.cli.app import main
from rltrain.rollout.worker.answers import GenerateRequest
from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.flags import Address, WorkerSettings, worker_settings
from rltrain.sync.server import PushReport, ServerSync, WorkerLink
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.weight_names import CheckpointNames

TESTS = Path(__file__).parents[1]


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
class PlantedWorker:
    """A server to which faults can be ordered, and the model that is pushed to it."""

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

    def plant(self, fault: str, name: str = "", process: int = 0) -> None:
        """See ``PlantedExtension``."""
        arguments = {"fault": fault, "name": name, "process": str(process)}
        self.client.call_workers("rltrain_plant", arguments)


def make_planted_settings(*arguments: Any, **options: Any) -> WorkerSettings:
    return PlantedSettings(**vars(worker_settings(*arguments, **options)))


if __name__ == "__main__":
    worker_module.worker_settings = make_planted_settings
    main()
