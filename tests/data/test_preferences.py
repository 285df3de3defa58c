"""Preference pairs: every supported format, every reason to leave a row out, and every error about a row."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rltrain.config.schema import JudgedData
from rltrain.data.judged import Reader
from rltrain.data.preferences import Pair, PairSet, load_pairs, parse_transcript, scale_margins


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    needs: tuple[str, ...] = (),
    limit: int | None = None,
    **keys: Any,
) -> PairSet:
    data = JudgedData(train=source, **keys)
    reader = Reader(tokenizer, (tokenizer.eos_token_id,), data)
    return load_pairs(data, "train", reader, seed=0, limit=limit, needs=frozenset(needs))


def decode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(list(ids)) for ids in (pair.prompt, pair.chosen, pair.rejected))  # type: ignore[return-value]


USER = {"role": "user", "content": "q"}
SAY = {name: [{"role": "assistant", "content": name}] for name in ("yes", "no")}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": SAY["yes"], "rejected": SAY["no"]},
        {"chosen": [USER, *SAY["yes"]], "rejected": [USER, *SAY["no"]]},
        # like UltraFeedback, which repeats its prompt
        {"prompt": "q", "chosen": [USER, *SAY["yes"]], "rejected": [USER, *SAY["no"]]},
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
    ],
    ids=["text", "messages", "messages without prompt", "messages beside their prompt", "transcript"],
)
def test_every_format_becomes_the_same_pair(tmp_path: Path, tokenizer: Any, row: dict[str, Any]) -> None:
    pairs = load(tokenizer, jsonl(tmp_path / "p.jsonl", row)).pairs
    assert [decode_pair(tokenizer, pair) for pair in pairs] == [("<user>q<assistant>", "yes<eos>", "no<eos>")]
    assert pairs[0].id == "p.jsonl:0"


def test_without_a_template_text_stays_text_and_gains_its_end(tmp_path: Path, tokenizer: Any) -> None:
    hh = {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"}
    (pair,) = load(tokenizer, jsonl(tmp_path / "hh.jsonl", hh), chat_template="none").pairs
    assert decode_pair(tokenizer, pair) == ("\n\nHuman: q\n\nAssistant:", " yes<eos>", " no<eos>")
    # The longest common beginning is "q a"; the space before what differs goes with the completions, as in
    # TRL.
    (pair,) = load(
        tokenizer,
        jsonl(tmp_path / "i.jsonl", {"chosen": "q a yes", "rejected": "q a no"}),
        chat_template="none",
    ).pairs
    assert decode_pair(tokenizer, pair) == ("q a", " yes<eos>", " no<eos>")
    (pair,) = load(
        tokenizer,
        jsonl(tmp_path / "t.jsonl", {"prompt": "q", "chosen": "yes", "rejected": "no"}),
        chat_template="none",
        prompt_template="{prompt}?",
    ).pairs
    assert decode_pair(tokenizer, pair) == ("q?", "yes<eos>", "no<eos>")


def test_a_line_break_that_the_template_puts_behind_its_end_is_not_scored(
    tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token if", "eos_token + '\n' if")
    (pair,) = load(
        tokenizer, jsonl(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "yes", "rejected": "no"})
    ).pairs
    assert decode_pair(tokenizer, pair) == ("<user>q<assistant>", "yes<eos>", "no<eos>")


def test_a_transcript_is_read_turn_by_turn() -> None:
    text = "\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: e "
    roles = [(turn["role"], turn["content"]) for turn in parse_transcript(text)]
    assert roles == [("user", "a\nb"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]


def test_transcripts_with_other_prompts_or_no_answer_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    source = jsonl(
        tmp_path / "hh.jsonl",
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: r\n\nAssistant: no"},
        {
            "chosen": "\n\nHuman: q\n\nAssistant: yes\n\nHuman: well",
            "rejected": "\n\nHuman: q\n\nAssistant: no",
        },
        {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: no"},
    )
    pair_set = load(tokenizer, source)
    assert (len(pair_set), pair_set.dropped) == (
        1,
        {"different prompts": 1, "without an answer": 1, "empty": 1},
    )


def test_a_long_prompt_keeps_its_end_for_both_sides(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "p.jsonl", {"prompt": "abcdef", "chosen": "yes", "rejected": "no"})
    pair_set = load(tokenizer, source, max_prompt_tokens=4)
    assert decode_pair(tokenizer, pair_set.pairs[0]) == ("def<assistant>", "yes<eos>", "no<eos>")
    assert pair_set.changed["prompts cut"] == 1
    tokenizer.bos_token = "<system>"  # any token will do: it stays in front
    pair_set = load(
        tokenizer,
        jsonl(tmp_path / "b.jsonl", {"prompt": "<system>abc", "chosen": "y", "rejected": "n"}),
        max_prompt_tokens=3,
        chat_template="none",
    )
    assert decode_pair(tokenizer, pair_set.pairs[0])[0] == "<system>bc"


def test_completions_are_cut_together_or_not_at_all(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "q", "chosen": "abcd", "rejected": "efgh"},  # 5 tokens each with EOS
        {"prompt": "q", "chosen": "abcd", "rejected": "ef"},
        {"prompt": "q", "chosen": "abcX", "rejected": "abcY"},  # alike once cut
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    pair_set = load(tokenizer, source, max_completion_tokens=3)
    assert [decode_pair(tokenizer, pair)[1:] for pair in pair_set.pairs] == [
        ("abc", "efg"),
        ("a<eos>", "b<eos>"),
    ]
    assert pair_set.dropped == {"too long on one side": 1, "identical": 1}
    assert pair_set.changed["completions cut"] == 2
    uncut = load(tokenizer, source, max_completion_tokens=3, too_long="drop")
    assert (len(uncut), uncut.dropped) == (1, {"too long": 3})


def test_empty_and_identical_completions_are_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": " "},
        # the vocabulary has no token for this character, so only the end token remains
        {"prompt": "q", "chosen": "a", "rejected": "\u4e2d"},
    )
    pair_set = load(tokenizer, source)
    assert (len(pair_set), pair_set.dropped) == (1, {"identical": 1, "empty": 2})
    with pytest.raises(ValueError, match=r"no example is left of 1 \(1 identical\)"):
        load(tokenizer, jsonl(tmp_path / "i.jsonl", {"prompt": "q", "chosen": "a", "rejected": "a"}))


SCORED = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({"score_chosen": 9, "score_rejected": 5.5}, 3.5),
        ({"chosen_rating": 2, "rejected_rating": 2}, 0.0),
        ({"margin": 0.25, "score_chosen": 9, "score_rejected": 5}, 0.25),
    ],
)
def test_margins_come_from_scores_ratings_or_their_own_column(
    tmp_path: Path, tokenizer: Any, columns: Any, margin: float
) -> None:
    (pair,) = load(tokenizer, jsonl(tmp_path / "p.jsonl", SCORED | columns), needs=("margin",)).pairs
    assert pair.margin == margin


def test_scores_in_the_wrong_order_turn_a_soft_target_round_and_contradict_a_hard_one(
    tmp_path: Path, tokenizer: Any
) -> None:
    right = {"score_chosen": 3, "score_rejected": 1}
    wrong = {"score_chosen": 1, "score_rejected": 3}
    source = jsonl(tmp_path / "p.jsonl", *(SCORED | right for _ in range(2)), SCORED | wrong)
    soft = load(tokenizer, source, needs=("margin",))
    # Swapping the pair and negating its margin leaves -p ln s(z) - (1 - p) ln s(-z) as it is.
    assert [(decode_pair(tokenizer, pair)[1], pair.margin) for pair in soft.pairs] == [
        ("a<eos>", 2),
        ("a<eos>", 2),
        ("b<eos>", 2),
    ]
    assert soft.changed["swapped, as their strength says"] == 1
    hard = load(tokenizer, source)
    assert (len(hard), hard.dropped) == (2, {"contradicted by their scores": 1})
    with pytest.raises(
        ValueError, match=r"in 2 of 3 pairs the score of chosen is below.*are the columns swapped"
    ):
        load(
            tokenizer,
            jsonl(tmp_path / "s.jsonl", SCORED | right, SCORED | wrong, SCORED | wrong),
            needs=("margin",),
        )


@pytest.mark.parametrize("p_chosen", [0.0, 0.2])
def test_a_probability_below_one_half_turns_the_pair_round(
    tmp_path: Path, tokenizer: Any, p_chosen: float
) -> None:
    (pair,) = load(
        tokenizer, jsonl(tmp_path / "p.jsonl", SCORED | {"p_chosen": p_chosen}), needs=("p_chosen",)
    ).pairs
    assert (decode_pair(tokenizer, pair)[1], pair.p_chosen) == ("b<eos>", 1 - p_chosen)


AGAINST = (
    ({"margin": -0.8}, "margin -0.8"),
    ({"p_chosen": 0}, "p_chosen 0.0"),
    ({"p_chosen": 0.49}, "p_chosen 0.49"),
    ({"score_chosen": 1, "score_rejected": 3}, "score_chosen 1.0 and score_rejected 3.0"),
    ({"chosen_rating": 1, "rejected_rating": 1.5}, "chosen_rating 1.0 and rejected_rating 1.5"),
)
IN_FAVOUR = (
    {"margin": 0.8},
    {"p_chosen": 1.0},
    {"score_chosen": 3, "score_rejected": 1},
    {"chosen_rating": 2, "rejected_rating": 1},
)
CONTRADICTIONS = [
    (against | favour, said)
    for against, said in AGAINST
    for favour in IN_FAVOUR
    if not against.keys() & favour.keys()
]


@pytest.mark.parametrize("needs", [(), ("margin",), ("p_chosen",)])
@pytest.mark.parametrize(("columns", "said"), CONTRADICTIONS)
def test_strengths_that_contradict_one_another_are_refused_with_file_and_line(
    tmp_path: Path, tokenizer: Any, columns: dict[str, float], said: str, needs: tuple[str, ...]
) -> None:
    source = jsonl(
        tmp_path / "p.jsonl", *(SCORED | IN_FAVOUR[0] | IN_FAVOUR[1] for _ in range(2)), SCORED | columns
    )
    with pytest.raises(
        ValueError,
        match=rf"p\.jsonl, line 3: .* prefer chosen, {re.escape(said)} prefer rejected; correct the row",
    ):
        load(tokenizer, source, needs=needs)


@pytest.mark.parametrize(
    ("columns", "chosen", "margin", "p_chosen"),
    [
        ({"margin": 0.8, "p_chosen": 0.5}, "a<eos>", 0.8, 0.5),
        ({"margin": 0.0, "p_chosen": 0.25}, "b<eos>", 0.0, 0.75),
        ({"margin": -0.8, "p_chosen": 0.25}, "b<eos>", 0.8, 0.75),
        ({"margin": 0.8, "p_chosen": 0.75, "score_chosen": 9, "score_rejected": 1}, "a<eos>", 0.8, 0.75),
        ({"margin": 0.8, "p_chosen": math.nan}, "a<eos>", 0.8, None),
    ],
)
def test_strengths_that_agree_or_say_nothing_are_taken(
    tmp_path: Path,
    tokenizer: Any,
    columns: dict[str, float],
    chosen: str,
    margin: float,
    p_chosen: float | None,
) -> None:
    source = jsonl(tmp_path / "p.jsonl", SCORED | columns, SCORED | {"margin": 1})
    pair, _ = load(tokenizer, source, needs=("margin",)).pairs
    assert (decode_pair(tokenizer, pair)[1], pair.margin, pair.p_chosen) == (chosen, margin, p_chosen)


def test_a_missing_margin_is_an_error_and_one_that_is_no_number_a_counted_drop(
    tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(
        ValueError, match=r"p.jsonl, line 1: the loss needs a margin.*score_chosen and score_rejected"
    ):
        load(tokenizer, jsonl(tmp_path / "p.jsonl", SCORED), needs=("margin",))
    with pytest.raises(ValueError, match="needs p_chosen"):
        load(tokenizer, jsonl(tmp_path / "p.jsonl", SCORED), needs=("p_chosen",))
    source = jsonl(
        tmp_path / "n.jsonl", SCORED | {"margin": math.nan}, SCORED | {"margin": None}, SCORED | {"margin": 1}
    )
    pair_set = load(tokenizer, source, needs=("margin",))
    assert (len(pair_set), pair_set.dropped) == (1, {"without a finite margin": 2})
    assert len(load(tokenizer, source)) == 3  # a loss that reads no margins takes them all


@pytest.mark.parametrize(
    ("rows", "needs", "message"),
    [
        ([SCORED | {"margin": "2"}], ("margin",), r"line 1: margin is str \('2'\); a number is expected"),
        ([SCORED | {"p_chosen": 1.5}], ("p_chosen",), r"line 1: p_chosen is 1.5; a probability"),
        ([SCORED | {"score_chosen": 1}], (), "a score needs both score_chosen and score_rejected"),
        ([SCORED], ("column:flag",), r"line 1: the loss needs a number in column 'flag'"),
        (
            [SCORED, {"chosen": [USER, *SAY["yes"]], "rejected": [USER, *SAY["no"]]}],
            (),
            r"mixed formats: .*line 1 holds pairs of text.*line 2 pairs of messages",
        ),
        ([{"chosen": "abc", "rejected": "xyz"}], (), r"line 1: no prompt: .*no common beginning"),
        ([{"prompt": " ", "chosen": "a", "rejected": "b"}], (), "line 1: the prompt is empty"),
        ([{"prompt": "q", "chosen": "a", "rejected": SAY["no"]}], (), "one of chosen and rejected is text"),
        ([{"prompt": "q", "completion": "a", "label": True}], (), "the loss compares two completions"),
        (
            [{"question": "q", "better": "a", "worse": "b"}],
            (),
            r"neither chosen and rejected nor completion nor messages; there are \['better'",
        ),
        ([{"prompt": 3, "chosen": "a", "rejected": "b"}], (), "prompt is int"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_row_and_a_remedy(
    tmp_path: Path, tokenizer: Any, rows: Any, needs: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tokenizer, jsonl(tmp_path / "p.jsonl", *rows), needs=needs)


def test_rows_are_chosen_by_a_column_and_columns_renamed(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"question": str(n), "good": "a", "bad": "b", "split": "train" if n else "test"} for n in range(3)
    ]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    pair_set = load(tokenizer, jsonl(tmp_path / "p.jsonl", *rows), columns=columns, where={"split": "train"})
    assert [pair.id for pair in pair_set.pairs] == ["p.jsonl:1", "p.jsonl:2"]
    with pytest.raises(ValueError, match=r"no row has split = 'dev' \(data.where\); there are test, train"):
        load(tokenizer, jsonl(tmp_path / "p.jsonl", *rows), columns=columns, where={"split": "dev"})


def test_a_limit_takes_the_first_so_many_of_a_seeded_shuffle(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(
        tmp_path / "p.jsonl", *({"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(30))
    )
    few, more = (load(tokenizer, source, limit=limit).pairs for limit in (5, 10))
    assert more[:5] == few and [pair.id for pair in few] != [f"p.jsonl:{n}" for n in range(5)]


def test_margins_are_divided_by_the_training_sets_scale() -> None:
    def pairs_with(*margins: float) -> PairSet:
        return PairSet(tuple(Pair("i", (1,), (2,), (3,), margin=margin) for margin in margins), {}, {})

    train, held_out = scale_margins([pairs_with(1.0, 4.0), pairs_with(2.0)], "max_abs")
    assert [pair.margin for pair in (*train.pairs, *held_out.pairs)] == [0.25, 1.0, 0.5]
    # The standard deviation of 1 and 4 with ddof 1 is 3 / sqrt 2.
    (train,) = scale_margins([pairs_with(1.0, 4.0)], "std")
    assert train.pairs[0].margin == pytest.approx(math.sqrt(2) / 3)


def test_the_built_in_pairs_differ_in_digits_and_score_them() -> None:
    from rltrain.data.tasks import arithmetic_pairs

    rows = arithmetic_pairs("train", {"count": 300})
    assert rows == arithmetic_pairs("train", {"count": 300})
    for row in rows:
        is_equal = [left == right for left, right in zip(row["chosen"], row["rejected"], strict=True)]
        assert row["chosen"] == row["answer"] and not all(is_equal) and row["rejected"][0] != "0"
        assert (
            row["score_rejected"] == pytest.approx(sum(is_equal) / len(is_equal)) and row["score_chosen"] == 1
        )
    held_out = {row["prompt"] for row in arithmetic_pairs("test", {"count": 300})}
    assert not held_out & {row["prompt"] for row in rows}
