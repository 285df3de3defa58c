"""Real preference data: what is read, what is left out, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rltrain.config.schema import JudgedData
from rltrain.data.judged import Reader, judged_rows
from rltrain.data.labels import are_pairs, load_labels
from rltrain.data.preferences import load_pairs

DATA = Path(__file__).parents[3] / "shared" / "data" / "preference"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")


@pytest.fixture(scope="module")
def tokenizer(tiny_models: Any) -> Any:
    return tiny_models.character_tokenizer()  # a token per character: limits below are in characters


def reader_of(tokenizer: Any, name: str, **keys: Any) -> tuple[JudgedData, Reader]:
    data = JudgedData(
        train=str(DATA / f"{name}.jsonl"), max_prompt_tokens=8192, max_completion_tokens=8192, **keys
    )
    return data, Reader(tokenizer, (tokenizer.eos_token_id,), data)


@pytest.mark.parametrize(
    ("name", "rows", "dropped", "template"),
    [
        ("hh_helpful_train", 3000, 6, "auto"),
        ("hh_helpful_test", 500, 4, "auto"),
        ("hh_helpful_test", 500, 4, "none"),
    ],
)
def test_hh_transcripts_split_at_the_last_answer(
    tokenizer: Any, name: str, rows: int, dropped: int, template: str
) -> None:
    data, reader = reader_of(tokenizer, name, chat_template=template)
    result = load_pairs(data, "train", reader, seed=0, needs=frozenset())
    # A few transcripts part before their last turn: DPO's own code would cut the rejected side at the chosen
    # one's length.
    assert result.dropped == {"different prompts": dropped} and len(result) == rows - dropped
    assert not result.changed.get("prompts cut") and not result.changed.get("completions cut")
    for pair in result.pairs[:200]:
        prompt, chosen, rejected = (
            tokenizer.decode(list(ids)) for ids in (pair.prompt, pair.chosen, pair.rejected)
        )
        assert chosen != rejected and chosen.endswith("<eos>") and rejected.endswith("<eos>")
        assert prompt.endswith("<assistant>" if template == "auto" else "\n\nAssistant:")
        assert "Human:" not in chosen or "\n\nHuman:" not in chosen


@pytest.mark.parametrize(
    ("name", "split", "pairs", "smallest", "largest"),
    [("graded_gpt4_scores", "test", 272, 0.5, 9), ("graded_human_votes", "test", 137, 1, 3)],
)
def test_graded_pairs_have_margins_in_the_units_of_their_scores(
    tokenizer: Any, name: str, split: str, pairs: int, smallest: float, largest: float
) -> None:
    data, reader = reader_of(tokenizer, name, where={"split": split})
    result = load_pairs(data, "train", reader, seed=0, needs=frozenset({"margin"}))
    assert (len(result), result.dropped) == (pairs, {})
    margins = [pair.margin for pair in result.pairs if pair.margin is not None]
    assert len(margins) == pairs and 0 < min(margins) <= smallest and max(margins) <= largest


def test_the_splits_of_the_graded_sets_share_no_prompt() -> None:
    for name in ("graded_gpt4_scores", "graded_human_votes"):
        prompts = []
        for split in ("train", "test"):
            _, rows = judged_rows(
                JudgedData(train=str(DATA / f"{name}.jsonl"), where={"split": split}), "train"
            )
            prompts.append({row.columns["prompt"] for row in rows})
        assert all(prompts) and not prompts[0] & prompts[1]


def test_truncation_never_cuts_one_side_only(tokenizer: Any) -> None:
    data, reader = reader_of(tokenizer, "hh_helpful_test")
    untruncated = {
        pair.id: pair for pair in load_pairs(data, "train", reader, seed=0, needs=frozenset()).pairs
    }
    short = data.model_copy(update={"max_prompt_tokens": 300, "max_completion_tokens": 300})
    result = load_pairs(short, "train", Reader(tokenizer, reader.stop, short), seed=0, needs=frozenset())
    assert len(result) + sum(result.dropped.values()) == 500  # conservation
    assert result.dropped["too long on one side"] > 50
    for pair in result.pairs:
        before = untruncated[pair.id]
        cut = [
            len(now) < len(then)
            for now, then in ((pair.chosen, before.chosen), (pair.rejected, before.rejected))
        ]
        assert cut in ([True, True], [False, False])
        assert pair.prompt == before.prompt[-300:]


@pytest.mark.parametrize(
    ("name", "classes", "dropped"),
    [("binary_gsm8k", (1000, 1000), {}), ("binary_kto_general", (150, 149), {"empty": 1})],
)
def test_labelled_completions_are_counted_by_class(
    tokenizer: Any, name: str, classes: tuple[int, int], dropped: dict[str, int]
) -> None:
    data, reader = reader_of(tokenizer, name)
    result = load_labels(data, "train", reader, seed=0, needs=frozenset({"label"}))
    assert (result.classes, result.dropped) == (classes, dropped)


def test_pairs_give_both_classes_evenly(tokenizer: Any) -> None:
    data, reader = reader_of(tokenizer, "hh_helpful_test")
    result = load_labels(data, "train", reader, seed=0, needs=frozenset({"label"}))
    assert are_pairs(result) and result.classes == (496, 496) and result.dropped == {"different prompts": 4}
