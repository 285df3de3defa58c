from collections import Counter

import pytest

from rltrain.data.order import PromptOrder


def test_each_epoch_visits_every_prompt_once_although_steps_straddle_epochs():
    order = PromptOrder(10, per_step=4, seed=0)
    visited = [index for _ in range(10) for index in order.next()]  # 10 steps of 4 = 4 epochs of 10
    for epoch in range(4):
        assert sorted(visited[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert visited[:10] != visited[10:20]


@pytest.mark.parametrize(("count", "per_step"), [(5, 4), (5, 5), (7, 3), (64, 24)])
def test_no_step_holds_a_prompt_twice(count: int, per_step: int):
    order = PromptOrder(count, per_step, seed=3)
    for _ in range(40):
        assert len(set(order.next())) == per_step
    visits = Counter(index for _ in range(count) for index in order.next())
    assert max(visits.values()) - min(visits.values()) <= 2  # per_step whole epochs, cut at two places


def test_seeds_differ_and_repeat():
    first, again, other = (PromptOrder(100, 10, seed).next() for seed in (1, 1, 2))
    assert first == again != other
    assert first != list(range(10))


# 10 prompts in steps of 4: step 3 straddles two epochs, and step 5 ends exactly with the second epoch
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 17])
def test_a_resumed_order_goes_on_as_the_uninterrupted_one(steps: int):
    uninterrupted = PromptOrder(10, 4, seed=7)
    for _ in range(steps):
        uninterrupted.next()
    resumed = PromptOrder(10, 4, seed=7)
    resumed.load_state_dict(uninterrupted.state_dict())
    assert [resumed.next() for _ in range(9)] == [uninterrupted.next() for _ in range(9)]
    assert resumed.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize(
    ("change", "named"), [({"count": 11}, "count"), ({"per_step": 5}, "per_step"), ({"seed": 8}, "seed")]
)
def test_a_state_of_other_data_is_refused(change: dict[str, int], named: str):
    state = PromptOrder(10, 4, seed=7).state_dict()
    with pytest.raises(ValueError, match=named):
        PromptOrder(10, 4, seed=7).load_state_dict(state | change)


def test_fewer_prompts_than_a_step_needs_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"needs 8 different prompts and the training set has 7; lower rollout.prompts"
    ):
        PromptOrder(7, per_step=8, seed=0)
