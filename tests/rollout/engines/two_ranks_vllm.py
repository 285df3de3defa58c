"""Run by test_vllm_colocated.py with torchrun on two ranks: vLLM beside an initialised process group."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rltrain.rollout.engines.vllm.colocated import VllmColocated
from rltrain.rollout.groups import sample_groups
from rltrain.sync.fingerprint import compare
from rltrain.tensor_ops import weight_fingerprint
from rltrain.types.samples import Prompt, Sampling


def world_sum() -> float:
    """1 + 2 when both ranks of the learner's own group take part."""
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total.item()


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, prompt = dist.get_rank(), Prompt("p", (10, 11, 12), "")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    engine = VllmColocated(
        folder,
        stop_token_ids=[1],
        decode=lambda ids: "",
        max_model_len=64,
        max_num_seqs=4,
        kv_cache_gib=0.1,
        enforce_eager=True,
    )
    executor = engine._llm.llm_engine.engine_core.engine_core.model_executor
    assert type(executor).__name__ == "ExecutorWithExternalLauncher"
    method, _, local_rank = executor._distributed_args()
    assert (method, local_rank) == ("env://", rank)  # of the GPU that it would take
    engine.load(model.named_parameters(), 1)
    sent = {name: weight_fingerprint(name, weight) for name, weight in model.named_parameters()}
    compare(sent, {name: engine.fingerprint()[name] for name in sent}, engine.fingerprint_rtol)
    if rank == 0:  # a rank generates without the other: no collective is hidden in it
        sample_groups(engine, [prompt], Sampling(1, 1.0, 8, seed=0), 1)
    assert world_sum() == 3 and dist.get_world_size() == 2
    [group] = sample_groups(engine, [prompt], Sampling(2, 1.0, 8, seed=1), 1)
    engine.close()
    assert world_sum() == 3  # vLLM's shutdown would have destroyed the group
    everyone = [None, None]
    dist.all_gather_object(everyone, [completion.token_ids for completion in group.completions])
    assert everyone[0] == everyone[1]  # equal weights, prompt and seed: equal tokens on every rank
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
