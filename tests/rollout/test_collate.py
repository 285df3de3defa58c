"""Rows carry names: the group, and which completion of it."""

from __future__ import annotations

from rltrain.reward.score import Score
from rltrain.rollout.collate import collate
from rltrain.types.samples import SOURCE_TEMPERED, Completion, Prompt, ScoredGroup, Span


def test_a_row_s_sample_counts_the_completions_of_its_group_whatever_their_source():
    # what seeded choices go by: it must not depend on where a group stands in the step
    def group(number: int, sources: tuple[int, ...]) -> ScoredGroup:
        completions = tuple(
            Completion((5, 6), (-1.0, -1.0), "stop", "", (Span(0, 2, 0),), source) for source in sources
        )
        return ScoredGroup(
            number, Prompt(str(number), (1,), ""), completions, tuple(Score(1.0) for _ in sources)
        )

    first, second = group(4, (0, 0, SOURCE_TEMPERED)), group(9, (0, 0))
    _, batch = collate([first, second])
    assert batch.sample is not None
    assert list(zip(batch.group.tolist(), batch.sample.tolist(), strict=True)) == [
        (4, 0),
        (4, 1),
        (4, 2),
        (9, 0),
        (9, 1),
    ]
    _, turned = collate([second, first])
    assert turned.sample is not None and turned.sample.tolist() == [0, 1, 0, 1, 2]
