"""Steps of a trajectory and answers of a group, as the batch of a step carries them."""

from __future__ import annotations

import torch

from rltrain.reward.score import Score
from rltrain.rollout.collate import answer_ids, collate
from rltrain.rollout.steps import StepSplitter, step_ids
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span

# token id -> text; 9 is a special token, 7 a piece of a character
TEXT = {
    0: "x",
    1: "\n",
    2: "}\n\n",
    3: "  ",
    4: "y = 1",
    5: ".\n",
    6: " \n",
    7: "\N{REPLACEMENT CHARACTER}",
    9: "",
}


class Decoder:
    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, ids) -> str:
        self.calls += ids
        return "".join(TEXT[token] for token in ids)


def completion(*tokens: int, turns: tuple[tuple[int, int], ...] = ()) -> Completion:
    return Completion(tokens, (0.0,) * len(tokens), "stop", "", (Span(0, len(tokens), 0),), turns=turns)


def steps_of(*completions: Completion, width: int = 0) -> list[list[int]]:
    mask = torch.zeros(
        len(completions),
        max(width, *(len(row_completion.token_ids) for row_completion in completions)),
        dtype=torch.bool,
    )
    for row, row_completion in enumerate(completions):
        for start, stop in row_completion.turns or ((0, len(row_completion.token_ids)),):
            mask[row, start:stop] = True
    ids = step_ids(completions, mask, StepSplitter(Decoder()))
    assert ids is not None
    return ids.tolist()


def test_a_step_is_a_line_and_ends_with_its_break():
    assert steps_of(completion(0, 4, 1, 0, 5, 4)) == [[0, 0, 0, 1, 1, 2]]


def test_empty_lines_indentation_and_eos_belong_to_the_line_before():
    assert steps_of(completion(0, 1, 1, 6, 3, 4, 2, 9)) == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert steps_of(completion(0, 1, 9)) == [[0, 0, 0]]


def test_leading_blank_lines_open_the_first_step():
    assert steps_of(completion(1, 3, 0, 1, 0)) == [[0, 0, 0, 0, 1]]


def test_a_token_that_is_a_piece_of_a_character_breaks_nothing():
    assert steps_of(completion(7, 7, 0)) == [[0, 0, 0]]


def test_padding_is_minus_1_and_rows_do_not_see_one_another():
    assert steps_of(completion(0, 1, 0), completion(4), width=4) == [[0, 0, 1, -1], [0, -1, -1, -1]]


def test_turns_are_steps_whatever_lines_they_have():
    assert steps_of(completion(0, 1, 0, 4, 4, 1, 0, turns=((0, 3), (5, 7)))) == [[0, 0, 0, -1, -1, 1, 1]]


def test_steps_agree_with_splitting_the_text():
    generator = torch.Generator().manual_seed(0)
    words = [0, 1, 2, 3, 4, 5, 6]
    for _ in range(50):
        tokens = [words[i] for i in torch.randint(0, 7, (12,), generator=generator).tolist()]
        [steps] = steps_of(completion(*tokens))
        lines = [line for line in "".join(TEXT[token] for token in tokens).split("\n") if line.strip()]
        assert max(steps) + 1 == max(len(lines), 1)
        assert steps == sorted(steps)
        for number, line in enumerate(lines):
            assert line.strip() in "".join(
                TEXT[token] for token, step in zip(tokens, steps, strict=True) if step == number
            )


def test_every_token_is_decoded_once_in_a_run():
    decoder = Decoder()
    lines = StepSplitter(decoder)
    for _ in range(3):
        step_ids([completion(0, 1, 0, 0)], torch.ones(1, 4, dtype=torch.bool), lines)
    assert sorted(decoder.calls) == [0, 1]


def test_without_turns_and_lines_there_are_no_steps():
    plain = completion(0, 1)
    assert step_ids([plain], torch.ones(1, 2, dtype=torch.bool), None) is None
    mixed = step_ids(
        [plain, completion(0, 0, turns=((0, 1), (1, 2)))], torch.ones(2, 2, dtype=torch.bool), None
    )
    assert mixed is not None and mixed.tolist() == [[0, 0], [0, 1]]
    assert steps_of(completion(), completion(0)) == [[-1], [0]]


def group_of(*answers: str | None, number: int = 0) -> ScoredGroup:
    scores = tuple(Score(1.0, answer=answer) for answer in answers)
    return ScoredGroup(number, Prompt("p", (1,), "p"), (completion(0, 1, 0),) * len(answers), scores)


def test_equal_answers_of_a_group_share_an_id():
    assert answer_ids(group_of("5", "7", None, "5")) == [0, 1, -1, 0]
    _, batch = collate([group_of("5", "7", None, "5"), group_of("7", "7", number=4)])
    assert batch.answer is not None and batch.answer.tolist() == [0, 1, -1, 0, 0, 0]
    silent = collate([group_of(None, None)])[
        1
    ].answer  # a step in which nobody found an answer: a weak model, not a wrong recipe
    assert silent is not None and silent.tolist() == [-1, -1]


def test_a_step_is_cut_where_a_function_asks_for_it():
    assert collate([group_of("5")])[1].step_id is None
    _, batch = collate([group_of("5")], StepSplitter(Decoder()))
    assert batch.step_id is not None and batch.step_id.tolist() == [[0, 0, 1]]


def test_ungraded_rows_belong_to_no_step():
    group = ScoredGroup(
        0, Prompt("p", (1,), "p"), (completion(0, 1),) * 2, (Score(1.0), Score(0.0, ungraded="timeout"))
    )
    _, batch = collate([group], StepSplitter(Decoder()))
    assert batch.step_id is not None and batch.step_id.tolist() == [[0, 0], [-1, -1]]
