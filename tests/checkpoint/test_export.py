"""The exported folder loads with the learner's logits, or does not exist."""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from rltrain.checkpoint import tensor_files
from rltrain.checkpoint.export import ExportError, export_model, verify
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.errors import UserError
from rltrain.train.saving import disk_errors

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def tiny(tied: bool):
    torch.manual_seed(0)
    config = Qwen2Config(  # head size 32: vLLM has no CPU attention below it
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def tokenizer():
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *map(str, range(10)), "+", "="])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{{ messages[0].content }}="
    return tokenizer


def keys(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("gathered", [False, True], ids=["own weights", "gathered copies"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_exported_model_has_the_learners_logits_bit_for_bit(tmp_path, tokenizer, tied, gathered):
    model = tiny(tied)
    weights = None
    if gathered:  # as sharded learners give them
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    out = export_model(tmp_path / "run" / "model", model, tokenizer, "# card\n", weights and weights.items())
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(logits(again), logits(model))
    assert ("lm_head.weight" in keys(out)) is not tied
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert AutoTokenizer.from_pretrained(out)("1+2=").input_ids == tokenizer("1+2=").input_ids
    assert (out / "README.md").read_text() == "# card\n" and (out / "generation_config.json").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_a_disk_that_is_full_at_the_tokenizer_is_one_line_and_leaves_nothing(
    tmp_path, tokenizer, monkeypatch
):
    # tokenizers, written in Rust, raises a bare Exception for a full disk. The test limits file sizes
    # instead, which gives "File too large (os error 27)".
    write = tokenizer.save_pretrained
    write(tmp_path / "whole")
    sizes = [path.stat().st_size for path in (tmp_path / "whole").iterdir()]
    largest, second, *_ = sorted(sizes, reverse=True)
    assert largest == (tmp_path / "whole/tokenizer.json").stat().st_size  # the file that Rust writes

    def save_with_limit(folder):
        _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (second, hard))
        try:
            write(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(tokenizer, "save_pretrained", save_with_limit)
    with pytest.raises(OSError) as refused:
        export_model(tmp_path / "checkpoints/step-1", tiny(tied=True), tokenizer, "card")
    assert refused.value.errno == errno.EFBIG
    with (
        pytest.raises(UserError, match=r"cannot be written: .*File too large.*no checkpoint yet"),
        disk_errors(RunFolder(tmp_path)),
    ):
        export_model(tmp_path / "checkpoints/step-1", tiny(tied=True), tokenizer, "card")
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("message", "number"), [("No space left on device (os error 28)", errno.ENOSPC), ("a bug of ours", None)]
)
def test_only_what_names_an_error_of_the_system_becomes_one(
    message, number, tmp_path, tokenizer, monkeypatch
):
    def refuses(folder):
        raise Exception(message)

    monkeypatch.setattr(tokenizer, "save_pretrained", refuses)
    with pytest.raises(Exception, match=r"No space left|a bug of ours") as refused:
        export_model(tmp_path / "model", tiny(tied=True), tokenizer, "card")
    assert getattr(refused.value, "errno", None) == number


def test_the_weights_given_are_the_weights_written(tmp_path, tokenizer):
    model = tiny(tied=True)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    out = export_model(tmp_path / "model", model, tokenizer, "card", other.items())
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight + 1)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight + 1)


def test_a_stale_tied_head_is_refused(tmp_path, tokenizer):
    model = tiny(tied=True)
    stale = {name: value.clone() for name, value in model.state_dict().items()}
    stale["lm_head.weight"] += 1
    with pytest.raises(
        ExportError, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied but differ"
    ):
        export_model(tmp_path / "model", model, tokenizer, "card", stale.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: {f"module.{name}": value for name, value in weights.items()}, "unexpected.*module"),
        (lambda weights: {name: weights[name] for name in weights if "norm" not in name}, "missing.*norm"),
        (lambda weights: weights | {"model.norm.weight": torch.zeros(3)}, r"mismatched.*model\.norm\.weight"),
        (lambda weights: weights | {"lora_A": torch.zeros(3)}, "1 unexpected .lora_A"),
        (lambda weights: weights | {"model.norm.weight": torch.full((64,), float("nan"))}, "hold NaN.*norm"),
    ],
    ids=["wrapper prefix", "missing", "misshapen", "extra", "NaN"],
)  # fmt: skip
def test_weights_that_are_not_the_architectures_leave_nothing_behind(tmp_path, tokenizer, spoil, message):
    model = tiny(tied=False)
    with pytest.raises(ExportError, match=message):
        export_model(tmp_path / "model", model, tokenizer, "card", spoil(model.state_dict()).items())
    assert list(tmp_path.iterdir()) == []


def test_verify_accepts_what_export_wrote_and_nothing_truncated(tmp_path, tokenizer):
    out = export_model(tmp_path / "model", tiny(tied=False), tokenizer, "card")
    verify(out)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|deserializ"):
        verify(out)


def test_an_existing_folder_is_never_overwritten(tmp_path, tokenizer):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_model(tmp_path / "model", tiny(tied=False), tokenizer, "card")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes"]


def test_every_file_is_listed_with_its_hash(tmp_path, tokenizer):
    out = export_model(tmp_path / "model", tiny(tied=False), tokenizer, "card")
    listed = json.loads((out / "files.sha256.json").read_text())
    assert set(listed) == {path.name for path in out.iterdir()} - {"files.sha256.json"}
    assert all(
        hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in listed.items()
    )


def test_sampling_settings_of_the_base_model_do_not_cost_the_finished_one(tmp_path, tokenizer):
    # transformers refuses to store temperature without do_sample, which it was willing to load
    model = tiny(tied=False)
    model.generation_config.temperature = 0.6
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "refused")
    out = export_model(tmp_path / "model", model, tokenizer, "card")
    stored = json.loads((out / "generation_config.json").read_text())
    assert stored["temperature"] == 0.6 and stored["do_sample"] is True
    assert not model.generation_config.do_sample  # the learner's model is as it was


def test_sharded_files_are_checked_too(tmp_path, tokenizer, monkeypatch):
    model = tiny(tied=True)
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 20_000)
    out = export_model(tmp_path / "model", model, tokenizer, "card")
    assert len(list(out.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(model))


# As a user would load them, in a process that nothing of ours is in. Prints for each folder token id ->
# log-prob of the next token.
ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
ask = SamplingParams(max_tokens=1, temperature=0, logprobs=32)
sizes = {"max_model_len": 16, "max_num_seqs": 2, "max_logprobs": 32}
for folder in sys.argv[2:]:
    llm = LLM(folder, dtype="float32", enforce_eager=True, **sizes)
    first = llm.generate({"prompt_token_ids": json.loads(sys.argv[1])}, ask)[0].outputs[0].logprobs[0]
    print("LOGPS", json.dumps({str(token): entry.logprob for token, entry in first.items()}))
    del llm
    cleanup_dist_env_and_memory()
"""


@pytest.mark.vllm
def test_vllm_serves_the_exported_folders_with_the_learners_log_probs(tmp_path, tokenizer):
    """With a head of their own, and with one that is tied."""
    models = [tiny(tied=False), tiny(tied=True)]
    folders = [
        export_model(tmp_path / str(number), model, tokenizer, "card") for number, model in enumerate(models)
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    result = subprocess.run(
        [sys.executable, "-c", ASK_VLLM, str(IDS[0].tolist()), *map(str, folders)],
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("LOGPS")]
    assert len(lines) == 2, result.stderr[-3000:]
    for model, line in zip(models, lines, strict=True):
        expected = torch.log_softmax(logits(model)[0, -1], dim=-1)
        log_probs = json.loads(line.removeprefix("LOGPS"))
        assert len(log_probs) == 32
        assert max(abs(expected[int(token)].item() - value) for token, value in log_probs.items()) < 1e-4
