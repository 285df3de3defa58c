"""Shapes of the models that recipes name, so that docs/plan.md can be made without the Hub.

Each entry has the keys of the model's published config.json that decide its sizes, and the published
number of parameters, which a test compares with the closed form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rltrain.config.capacity.shape import ModelShape, shape_of


class PublishedModel(NamedTuple):
    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tied: bool
    parameters: int
    head_width: int | None = None  # None: hidden / heads

    @property
    def config(self) -> dict[str, Any]:
        """The keys of config.json."""
        return {
            "model_type": self.kind,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "head_dim": self.head_width,
        }


_QWEN_7B = PublishedModel("qwen2", 3584, 28, 28, 4, 18944, 152064, False, 7_615_616_512)
_QWEN_1_5B = PublishedModel("qwen2", 1536, 28, 12, 2, 8960, 151936, True, 1_543_714_304)
_QWEN_DISTILLED = PublishedModel("qwen2", 1536, 28, 12, 2, 8960, 151936, False, 1_777_088_000)
_LLAMA_8B = PublishedModel("llama", 4096, 32, 32, 8, 14336, 128256, False, 8_030_261_248)
_LLAMA_70B = PublishedModel("llama", 8192, 80, 64, 8, 28672, 128256, False, 70_553_706_496)

PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": PublishedModel("qwen2", 896, 24, 14, 2, 4864, 151936, True, 494_032_768),
    "Qwen/Qwen2.5-1.5B": _QWEN_1_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_1_5B,
    "Qwen/Qwen2.5-3B-Instruct": PublishedModel("qwen2", 2048, 36, 16, 2, 11008, 151936, True, 3_085_938_688),
    "Qwen/Qwen2.5-7B": _QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen2.5-Coder-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen2.5-Math-7B": _QWEN_7B,
    "PRIME-RL/Eurus-2-7B-SFT": _QWEN_7B,
    "Skywork/Skywork-OR1-Math-7B": _QWEN_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN_DISTILLED,
    "meta-llama/Llama-3.1-70B": PublishedModel(
        "llama", 8192, 80, 64, 8, 28672, 128256, False, 70_553_706_496
    ),
    "Qwen/Qwen2.5-32B": PublishedModel("qwen2", 5120, 64, 40, 8, 27648, 152064, False, 32_763_876_352),
    "Qwen/Qwen3-8B-Base": PublishedModel("qwen3", 4096, 36, 32, 8, 12288, 151936, False, 8_190_735_360, 128),
    "Qwen/Qwen3-14B-Base": PublishedModel(
        "qwen3", 5120, 40, 40, 8, 17408, 151936, False, 14_768_307_200, 128
    ),
    "deepseek-ai/deepseek-math-7b-instruct": PublishedModel(
        "llama", 4096, 30, 32, 32, 11008, 102400, False, 6_910_365_696
    ),
    "huggyllama/llama-7b": PublishedModel("llama", 4096, 32, 32, 32, 11008, 32000, False, 6_738_415_616),
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "RLHFlow/LLaMA3-SFT": _LLAMA_8B,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": _LLAMA_8B._replace(vocabulary=128264, parameters=8_030_326_784),
    "HuggingFaceH4/mistral-7b-sft-beta": PublishedModel(
        "mistral", 4096, 32, 32, 8, 14336, 32000, False, 7_241_732_096
    ),
    "google/gemma-7b": PublishedModel("gemma", 3072, 28, 16, 16, 24576, 256000, True, 8_537_680_896, 256),
    "EleutherAI/pythia-2.8b": PublishedModel(
        "gpt_neox", 2560, 32, 32, 32, 10240, 50304, False, 2_775_208_960
    ),
}


def shape_of_published(path: str, revision: str | None) -> ModelShape | None:
    """A ``ShapeReader`` of the models above. revision: not read, since shapes do not change."""
    del revision
    model = PUBLISHED.get(path)
    return None if model is None else shape_of(model.config)
