import functools
import json
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from rltrain.cli.app import app
from rltrain.config.schema import Data
from rltrain.data.chat import Dialogue
from rltrain.data.prompts import PromptSet, load_prompts
from rltrain.rollout.environments.calculator import evaluate
from rltrain.types.samples import Prompt

ONE_DIGIT = ({"digits": 1, "operations": "+*"},)


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(first: Path | str, second: Path | str) -> bool:
    return all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def test_auto_classes_read_the_folder_and_every_character_is_one_token(random_model):
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    text = string.digits + string.punctuation + string.ascii_letters + " \n  x"
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text
    assert len(set(token_ids)) == 10 + 32 + 52 + 2
    generation = GenerationConfig.from_pretrained(random_model)
    assert (
        (generation.eos_token_id, generation.pad_token_id)
        == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        == (1, 0)
    )


def test_the_chat_template_survives_saving(random_model):
    chat = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2="},
    ]
    rendered = AutoTokenizer.from_pretrained(random_model).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<user>1+1=<assistant>2<eos><user>2+2=<assistant>"


@pytest.mark.parametrize("tied", [False, True])
def test_heads_are_tied_as_asked_and_float32_with_heads_of_32(tiny_models, tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.make_random_model(tmp_path / "model", tied=tied))
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    assert model.dtype == torch.float32
    assert model.config.hidden_size // model.config.num_attention_heads == 32


def test_the_full_size_is_about_a_million_parameters(tiny_models):
    model = tiny_models.tiny_model(tiny_models.character_tokenizer(), tied=False, seed=0)
    assert 0.7e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e6


def test_equal_seeds_give_equal_weights_and_the_callers_generator_is_left_alone(
    tiny_models, tmp_path, random_model
):
    before = torch.get_rng_state()
    again, other = (tiny_models.make_random_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert same(again, random_model)
    assert not same(other, random_model)
    assert torch.equal(before, torch.get_rng_state())


def test_a_random_model_is_far_from_uniform(tiny_models, random_model):
    # Uniform log-probs would let a wrong head pass for a right one: their spread here is of order 1 nat, not
    # 0.
    model = AutoModelForCausalLM.from_pretrained(random_model)
    with torch.no_grad():
        logp = model(input_ids=torch.arange(1, 20)[None]).logits.log_softmax(-1)
    assert logp.std(dim=-1).min() > 0.5


def test_the_measure_is_the_product_of_the_tokens_probabilities(tiny_models, random_model):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(random_model),
        AutoModelForCausalLM.from_pretrained(random_model),
    )
    prompts = []
    rights = []
    for question, answer in (
        ("1+2=", "3"),
        ("10+20=", "30"),
    ):  # of different length: one row of the batch is padded
        asked = tokenizer(f"<user>{question}<assistant>")["input_ids"]
        prompts.append(Prompt(question, tuple(asked), question, {"answer": answer}))
        right = 1.0
        for token in tokenizer(f"{answer}<eos>")["input_ids"]:
            right *= model(input_ids=torch.tensor([asked])).logits[0, -1].softmax(-1)[token].item()
            asked.append(token)
        rights.append(right)
    measured = tiny_models.measure(model, PromptSet(tuple(prompts)), tokenizer)
    assert measured["pass@1"] == pytest.approx(sum(rights) / 2, rel=1e-4)
    assert measured["pass@8"] == pytest.approx(sum(1 - (1 - right) ** 8 for right in rights) / 2, rel=1e-4)


def test_equal_arguments_give_equal_weights_and_a_made_folder_is_kept(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_models, "DRILLS", ONE_DIGIT)
    steps = tmp_path / "steps.jsonl"
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"answer": "<<10+11=21>>"}))
    steps.write_text(json.dumps({"answer": "<<48/2=24>> <<48+24=72>> <<0.2*50=10>>"}))
    make = functools.partial(
        tiny_models.make_tiny_model, task="gsm8k_calculator", data=steps, held_out=test, steps=2
    )
    first, second = (make(tmp_path / name) for name in ("a", "b"))
    assert same(first, second)
    untouched = (first / "model.safetensors").stat().st_mtime_ns
    make(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == untouched
    make(first, seed=1)  # other arguments: made anew
    assert not same(first, second)
    assert json.loads((first / "made_with.json").read_text())["seed"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "a",
        "b",
        "steps.jsonl",
        "test.jsonl",
    }  # nothing half-made is left behind


def test_a_foreign_folder_is_refused_and_kept(tiny_models, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"exists and was not made by rltrain tiny-model"):
        tiny_models.make_tiny_model(tmp_path, steps=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_task_and_files_that_do_not_fit_are_refused(tiny_models, tmp_path):
    with pytest.raises(ValueError, match="needs GSM8K's train file"):
        tiny_models.make_tiny_model(tmp_path / "model", task="gsm8k_calculator", data="train.jsonl")
    options = ["--out", str(tmp_path / "model"), "--data", "a", "--held-out", "b"]
    result = CliRunner().invoke(app, ["tiny-model", *options])
    assert "arithmetic makes its own problems" in str(result.exception)
    with pytest.raises(ValueError, match="no such file: absent"):
        tiny_models.make_tiny_model(
            tmp_path / "model", task="gsm8k_calculator", data="absent", held_out="absent"
        )


def test_the_gsm8k_warm_start_trains_on_nothing_that_is_held_out(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_models, "DRILLS", ONE_DIGIT)
    # 4+5 and 6*7 are drills, 48/2 is in both files: the first two are held out, the third stays in training
    # and is not.
    (tmp_path / "train.jsonl").write_text(json.dumps({"answer": "<<48/2=24>> <<0.2*50=10>>"}))
    (tmp_path / "test.jsonl").write_text(json.dumps({"answer": "<<48/2=24>> <<4+5=9>> <<6*7=42>>"}))
    files = (tmp_path / "train.jsonl", tmp_path / "test.jsonl")
    sets = tiny_models.warm_up_sets("gsm8k_calculator", *files, tiny_models.character_tokenizer())
    trained = {prompt.text for prompts in sets for prompt in prompts.prompts}
    assert {
        "<user>48/2=<assistant>",
        "<user>0.2*50=<assistant>",
        "<user>5+4=<assistant>",
        "<user>7*6=<assistant>",
    } <= trained
    assert not {"<user>4+5=<assistant>", "<user>6*7=<assistant>"} & trained


def test_the_warm_start_stops_where_answers_are_right_often_enough(tiny_models, random_model):
    """Every prompt has the same answer, which the model has learned within a few steps."""
    examples = [([20, 30, letter], [41, 1]) for letter in range(10, 42)]
    model = AutoModelForCausalLM.from_pretrained(random_model)
    result = tiny_models.warm_start(model, examples, steps=60, right=0.4, seed=0)
    assert tiny_models.POOL <= result.steps < 60
    assert result.right >= 0.4


@pytest.mark.nightly
@pytest.mark.slow
def test_the_warm_start_leaves_something_to_learn(tiny_models, tmp_path):
    out = tiny_models.make_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    held_out = load_prompts(Data(train="arithmetic", eval="arithmetic"), "eval", tokenizer, seed=0)
    measured = tiny_models.measure(model, held_out, tokenizer)
    assert 0.35 <= measured["pass@1"] <= 0.5
    assert measured["pass@8"] > 0.8


def test_the_calculator_s_turns_are_those_of_its_episodes(tiny_models):
    # One call in five first turns; after it the row reads as the environment's dialogue will write it.
    tokenizer = tiny_models.character_tokenizer()
    prompt = Prompt(
        "a", tuple(tokenizer("<user>12*7=<assistant>").input_ids), "<user>12*7=<assistant>", {"answer": "84"}
    )
    examples = tiny_models._turn_examples(PromptSet((prompt,)), tokenizer)
    spelt = [(tokenizer.decode(asked), tokenizer.decode(written)) for asked, written in examples]
    direct = ("<user>12*7=<assistant>", "84<eos>")
    call = ("<user>12*7=<assistant>", "<<12*7=<eos>")
    assert spelt[:5] == [direct] * 4 + [call]
    between = Dialogue(
        tokenizer, [tokenizer.eos_token_id], Data(train="arithmetic"), role="user", observation_tokens=12
    )
    told = (
        *prompt.token_ids,
        *examples[4][1],
        *between.observation(evaluate("12*7"), tokenizer.eos_token_id),
    )
    assert (tuple(examples[5][0]), spelt[5][1]) == (told, "84<eos>")
