"""CLO's rows from a model's translations."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from rltrain.build.offline import load_offline_inputs
from rltrain.config.load import load_recipe
from rltrain.config.schema import OfflineRecipe
from support.scripts import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    return script("make_translated_pairs")


def test_each_question_prefers_the_answer_in_its_own_language(made: ModuleType) -> None:
    rows = made.pair_rows([("Two and two?", "Four.")], [(" Mbili na mbili? ", "Nne.\n")])
    assert rows == [
        {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Nne.", "is_target_language": False},
        {"prompt": "Mbili na mbili?", "chosen": "Nne.", "rejected": "Four.", "is_target_language": True},
    ]


@pytest.mark.parametrize(
    "translated", [("", "Nne."), ("Mbili?", " \n"), ("Two?", "Nne."), ("Mbili?", "Four.")]
)
def test_what_was_not_translated_has_no_rows(made: ModuleType, translated: tuple[str, str]) -> None:
    assert made.pair_rows([("Two?", "Four.")], [translated]) == []


def test_what_it_writes_is_what_the_recipe_reads(
    made: ModuleType, random_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "seeds.jsonl", tmp_path / "pairs.jsonl"
    seeds = [{"instruction": f"{number}+1=", "output": str(number + 1), "input": ""} for number in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in seeds))
    words = ["--data", str(data), "--prompt", "instruction", "--answer", "output", "--language", "Swahili"]
    words += ["--profile", "tiny_cpu", "--set", "data.max_prompt_tokens=128", "--set", "rollout.max_tokens=4"]
    made.main([random_model, *words, "--rows", "5", "--out", str(out)])
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert f"{len(written)} rows" in capsys.readouterr().out
    assert 0 < len(written) <= 10
    assert [row["is_target_language"] for row in written] == [False, True] * (len(written) // 2)

    settings = [f"data.train={out}", f"model.path={random_model}", "data.max_prompt_tokens=128"]
    settings += [f"train.examples={len(written)}", "data.max_completion_tokens=128"]
    recipe = load_recipe(ROOT / "recipes/preference/clo.yaml", overrides=settings)
    assert isinstance(recipe, OfflineRecipe)
    loaded = load_offline_inputs(recipe).train
    assert len(loaded) == len(written)
