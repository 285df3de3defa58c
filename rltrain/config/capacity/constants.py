"""Constants of the plan that neither a recipe nor a model's config states, each with its origin.

No number here was measured on a GPU by this project. "Estimate" marks those that a run of
``scripts/bench_gpu.py`` is to replace; the others are defaults of libraries, data sheets, or counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GB = 10**9

# memory that no tensor of a model explains, bytes per GPU ---------------------------------------------------

CUDA_CONTEXT = 600_000_000  # estimate: driver context, kernels of torch, cuBLAS workspaces
NCCL = 700_000_000  # estimate: channels and buffers of the process groups; none with one GPU
FRAGMENTATION = 700_000_000  # estimate: torch's allocator, with expandable segments
SLEEPING_VLLM = 1_000_000_000  # estimate: CUDA graphs and runtime state that sleep level 2 keeps mapped

MARGIN = 0.03  # share of a GPU that nothing gets where the plan chooses vLLM's share; estimate

# vLLM -------------------------------------------------------------------------------------------------------

ENGINE_BATCH_TOKENS = 16_384  # vLLM's max_num_batched_tokens for LLM on a GPU of 70 GiB or more (0.32)
DECODE_OVERHEAD = 0.001  # seconds per decoding step; estimate: scheduler, sampler, graph launch
SLEEP_AND_WAKE = 2.0  # seconds per step; estimate

# learner ----------------------------------------------------------------------------------------------------

MASTER_BYTES = 4  # per parameter: float32
GRADIENT_BYTES = 4  # float32
MOMENT_BYTES = 8  # AdamW's two, float32
MOMENT_BYTES_8BIT = 2 + 2 * 4 / 256  # two numbers of 8 bits, and two float32 scales per block of 256
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # four bits, a scale of 8 bits per 64, one float32 per 256 scales
INT8_BYTES = 1.0  # beside a float32 scale per row
REWARD_MODEL_BYTES = 2  # per parameter of a model that scores: bfloat16 on a GPU
STEP_NUMBERS = 12  # float32 per completion token of a step while controls run; estimate
TENSORS_IN_FLIGHT = 2  # that a push or a save holds beyond the shards
TILE_ELEMENTS = 1 << 26  # of the output head on a GPU (learner/head.py)
ZERO_BUCKET = 500_000_000  # numbers; DeepSpeed's reduce_bucket_size
ZERO_LIVE = 1_000_000_000  # parameters; DeepSpeed's stage3_max_live_parameters
ZERO_PREFETCH = 50_000_000  # parameters; DeepSpeed's stage3_prefetch_bucket_size

# output head: bytes outside of matrix products -------------------------------------------------------------

# as PyTorch's compiler plans the two functions of a tile (scripts/head_traffic.py --compiled), the logits
# being read twice for the softmax; a statistic beyond log-prob and entropy keeps the head uncompiled

HEAD_UPDATE_PASSES = 8  # bytes per logit, forward and backward pass
HEAD_FORWARD_PASSES = 4  # bytes per logit, forward pass
HEAD_GRADIENT_PASSES = 2  # times that a chunk's product reads or writes the weight's float32 gradient
COMPILED_ELEMENTWISE = 0.5  # of the time of a layer's elementwise kernels, if they are fused; estimate
EXPOSED_COMMUNICATION = 0.06  # seconds per micro-batch of a sharded update; estimate


class Card(StrEnum):
    h100 = "h100"
    h200 = "h200"
    a100 = "a100"
    l4 = "l4"
    rtx4090 = "4090"


@dataclass(frozen=True)
class Rates:
    """What kernels reach on a GPU: FLOP or bytes per second."""

    name: str
    peak: float  # dense bfloat16, data sheet
    products: float
    head_products: float
    attention: float
    float32: float  # products of a float32 model without TF32
    memory: float
    link: float  # one GPU to the others of its node


def rates_of(name: Card, peak: float, bandwidth: float, float32: float, link: float) -> Rates:
    """Rates from a data sheet: peak and float32 in FLOP/s, bandwidth and link in bytes/s.

    A large product reaches 0.66 of the peak, the head's 0.61, flash attention 0.45, elementwise kernels 0.84
    of the bandwidth, a float32 product 0.67, a gather 0.67 (estimates).
    """
    return Rates(
        name=name,
        peak=peak,
        products=0.66 * peak,
        head_products=0.61 * peak,
        attention=0.45 * peak,
        float32=0.67 * float32,
        memory=0.84 * bandwidth,
        link=0.67 * link,
    )


# NVIDIA's data sheets: dense bfloat16, memory, float32, NVLink in one direction (PCIe 4 for L4 and 4090)
CARDS = {
    Card.h100: rates_of(Card.h100, 989e12, 3.35e12, 67e12, 450e9),
    Card.h200: rates_of(Card.h200, 989e12, 4.8e12, 67e12, 450e9),
    Card.a100: rates_of(Card.a100, 312e12, 2.04e12, 19.5e12, 300e9),
    Card.l4: rates_of(Card.l4, 121e12, 0.3e12, 30e12, 32e9),
    Card.rtx4090: rates_of(Card.rtx4090, 165e12, 1.01e12, 82e12, 32e9),
}
