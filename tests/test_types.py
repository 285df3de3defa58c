from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rltrain.reward.score import Score
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import REFERENCE_VERSION, Completion, Prompt, Request, Sampling, ScoredGroup, Span


def batch(**changes: Any) -> TrainBatch:
    rows = torch.arange(3)
    values = torch.arange(12, dtype=torch.float64).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    fields = {"mask": mask, "advantages": values, "weights": torch.ones(3, 4), "rewards": rows.double()}
    fields |= dict.fromkeys(("group", "source", "version"), rows)
    return TrainBatch(**{**fields, **changes})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_any_dtype_is_kept_as_bool(dtype: torch.dtype):
    got = batch(mask=batch().mask.to(dtype))
    assert got.mask.dtype == torch.bool and torch.equal(got.mask, batch().mask)


def test_totals_count_tokens_and_rows_that_have_one():
    assert batch().totals_of_mask == (4, 2)


def test_rows_keep_every_field_together():
    # rows 2 and 0, first two columns
    part = batch(ref_logp=-batch().advantages).rows([2, 0], width=2)
    assert part.advantages.tolist() == [[8.0, 9.0], [0.0, 1.0]]
    assert torch.equal(part.ref_logp, -part.advantages)
    assert part.mask.tolist() == [[False, False], [True, True]]
    assert part.group.tolist() == part.rewards.tolist() == [2, 0]
    assert part.old_logp is None


def test_a_field_of_another_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"TrainBatch.ref_logp has shape \(3, 5\), the mask \(3, 4\)"):
        batch(ref_logp=torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"TrainBatch.rewards has shape \(4,\), expected \(3,\)"):
        batch(rewards=torch.zeros(4))


def test_a_batch_cannot_be_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch().weights = torch.zeros(3, 4)  # type: ignore[misc]


def test_replace_leaves_the_original_alone():
    first = batch()
    second = first.replace(weights=torch.zeros(3, 4))
    assert first.weights.all() and not second.weights.any()


def test_moving_a_batch_moves_what_is_there():
    moved = batch(old_logp=torch.zeros(3, 4)).to("meta")
    assert (
        moved.mask.is_meta
        and moved.old_logp is not None
        and moved.old_logp.is_meta
        and moved.ref_logp is None
    )


def completion() -> Completion:
    return Completion(
        token_ids=(5, 6), logprobs=(-0.1, -0.2), finish="stop", text="ab", versions=(Span(0, 2, 0),)
    )


def test_a_completion_has_one_logprob_per_token():
    with pytest.raises(ValueError, match="2 tokens but 1 log-probs"):
        dataclasses.replace(completion(), logprobs=(-0.1,))


@pytest.mark.parametrize(
    "versions",
    [
        (),
        (Span(0, 1, 3),),
        (Span(1, 2, 3),),
        (Span(0, 1, 3), Span(0, 2, 4)),
        (Span(0, 3, 3),),
        (Span(0, 2, 3), Span(2, 3, 4)),
    ],
)
def test_the_versions_of_a_completion_cover_its_tokens(versions: tuple[Span, ...]):
    with pytest.raises(ValueError, match="2 tokens whose versions cover"):
        dataclasses.replace(completion(), versions=versions)


def test_a_completion_is_as_old_as_its_oldest_token():
    assert dataclasses.replace(completion(), versions=(Span(0, 1, 4), Span(1, 2, 3))).oldest_version == 3
    assert (
        dataclasses.replace(completion(), versions=(Span(0, 2, REFERENCE_VERSION),)).oldest_version
        == REFERENCE_VERSION
    )


@pytest.mark.parametrize(("first", "count"), [(0, 0), (-1, 2), (3, 2), (0, 5), (4, 1)])
def test_a_request_is_for_samples_of_its_group(first: int, count: int):
    with pytest.raises(ValueError, match=rf"'p': {count} samples from number {first} on .* n = 4"):
        Request(Prompt("p", (1,), "x"), Sampling(4, 1.0, 8, seed=0), first, count)


def test_a_scored_group_has_one_score_per_completion():
    with pytest.raises(ValueError, match="group 9: 2 completions but 1 scores"):
        ScoredGroup(9, Prompt("p", (1,), "x"), (completion(), completion()), (Score(1.0),))
