"""Run by test_vllm_colocated.py with torchrun on two ranks: vLLM beside an initialised process group, an
engine on each, or with the argument "together" one engine on both.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rltrain.rollout.engines.vllm.colocated import VllmColocated
from rltrain.rollout.engines.vllm.tensor_parallel import EngineRanks
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.packed import PackedRequests
from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.tensor_ops import weight_fingerprint
from rltrain.types.samples import Prompt, Sampling


def world_sum() -> float:
    """1 + 2 when both ranks of the learner's own group take part."""
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total.item()


def start_engine(folder: str, tensor_parallel: int) -> VllmColocated:
    return VllmColocated(
        folder,
        stop_token_ids=[1],
        decode=lambda ids: "",
        max_model_len=64,
        max_num_seqs=4,
        kv_cache_gib=0.1,
        enforce_eager=True,
        tensor_parallel=tensor_parallel,
    )


def assert_launchers_executor(engine: VllmColocated, rank: int) -> None:
    executor = engine._llm.llm_engine.engine_core.engine_core.model_executor
    assert type(executor).__name__ == "ExecutorWithExternalLauncher"
    method, _, local_rank = executor._distributed_args()
    assert (method, local_rank) == ("env://", rank)  # of the GPU that it would take


def assert_proved(engine: VllmColocated, model: Any) -> None:
    sent = {name: weight_fingerprint(name, weight) for name, weight in model.named_parameters()}
    held = engine.fingerprint()
    compare(sent, {name: held[name] for name in sent}, engine.fingerprint_rtol)


class CountedStream:
    """A model's weights as copies of which the bytes that are alive are counted, at most one layer's at once.

    ``reload_weights`` of vLLM 0.32 keeps what it has received of a layer until the layer is complete.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._sent: list[tuple[Any, int]] = []
        self.peak = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._model.named_parameters():
            copy = weight.detach().clone()
            self._sent.append((copy.untyped_storage()._weak_ref(), copy.nbytes))
            self.peak = max(self.peak, self.alive())
            yield name, copy
            del copy

    def alive(self) -> int:
        held = (nbytes for storage, nbytes in self._sent if not torch.UntypedStorage._expired(storage))
        return sum(held)


def assert_streamed(engine: VllmColocated, model: Any) -> None:
    """No second model exists while weights are loaded, and no copy once the cache's memory is mapped."""
    stream, at_cache = CountedStream(model), []
    engine._cache_asleep = True  # as after a sleep on a GPU
    engine._llm.wake_up = lambda tags: at_cache.append((tags, stream.alive()))
    engine.load(iter(stream), 1)
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    largest = max(weight.nbytes for weight in model.parameters())
    assert 0 < stream.peak <= layer + largest < sum(weight.nbytes for weight in model.parameters()) / 2
    assert at_cache == [(["kv_cache"], 0)]


def run_apart(folder: str, model: Any) -> None:
    rank, prompt = dist.get_rank(), Prompt("p", (10, 11, 12), "")
    engine = start_engine(folder, 1)
    assert_launchers_executor(engine, rank)
    assert_streamed(engine, model)
    assert_proved(engine, model)
    if rank == 0:  # a rank generates without the other: no collective is hidden in it
        sample_groups(engine, [prompt], Sampling(1, 1.0, 8, seed=0), 1)
    assert world_sum() == 3 and dist.get_world_size() == 2
    [group] = sample_groups(engine, [prompt], Sampling(2, 1.0, 8, seed=1), 1)
    engine.close()
    assert world_sum() == 3  # vLLM's shutdown would have destroyed the group
    everyone = [None, None]
    dist.all_gather_object(everyone, [completion.token_ids for completion in group.completions])
    assert everyone[0] == everyone[1]  # equal weights, prompt and seed: equal tokens on every rank


def run_together(folder: str, model: Any) -> None:
    rank = dist.get_rank()
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    names: list[str] = []
    open_memory = _CPUSHMDistributed._init_cpu_shm
    _CPUSHMDistributed._init_cpu_shm = lambda memory: names.append(memory.group_name) or open_memory(memory)
    engine = start_engine(folder, 2)
    assert_launchers_executor(engine, rank)
    launch = f"rltrain-{os.environ['MASTER_PORT']}-{os.getppid()}-"  # no other launch opens its memory
    assert names and all(name.startswith(launch) for name in names)
    engine.load(model.named_parameters(), 1)
    embedding = engine._llm.apply_model(lambda held: held.model.embed_tokens.weight)[0]
    assert embedding.shape[0] < model.config.vocab_size  # a shard, not a copy
    assert_proved(engine, model)

    # uneven shares: two prompts on rank 0, then none on rank 1, whose call takes part all the same
    gathered: list[type] = []
    gather = EngineRanks.gather
    EngineRanks.gather = lambda ranks, value: gathered.append(type(value)) or gather(ranks, value)
    prompts = [Prompt(f"p{rank}{place}", (10 + rank, 11, 12 + place), "") for place in range(2 - rank)]
    groups = sample_groups(engine, prompts, Sampling(2, 1.0, 8, seed=1), 1)
    groups += sample_groups(engine, prompts[: 1 - rank], Sampling(1, 0.7, 8, seed=2), 1)
    assert gathered == [PackedRequests] * 2  # no prompt crosses token by token
    assert [group.prompt.id for group in groups] == (["p00", "p01", "p00"] if rank == 0 else ["p10"])
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            length = len(completion.token_ids)
            temperature = 0.7 if len(group.completions) == 1 else 1.0
            logits = model(ids).logits[0, -length - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, ids[0, -length:, None])[:, 0]
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-5

    # one number of one rank's shard is another: both ranks see it, in that weight alone
    def spoil(held: Any) -> None:
        held.model.embed_tokens.weight.data[3, 5] += 1e-3

    if rank == 1:
        engine._llm.apply_model(spoil)
    try:
        assert_proved(engine, model)
    except WeightMismatchError as error:
        assert "model.embed_tokens.weight" in str(error)
    else:
        raise AssertionError("a spoiled shard was not found")
    engine.close()
    assert world_sum() == 3


def main(folder: str, form: str) -> None:
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    {"apart": run_apart, "together": run_together}[form](folder, model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
