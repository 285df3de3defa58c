"""Step metrics against hand-worked numbers and numpy; the table of names against what is logged."""

import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from rltrain.report.metrics import (
    METRICS,
    check_names,
    completion_metrics,
    mismatch_metrics,
    staleness_metrics,
    step_metrics,
    turn_entropies,
    why_no_update,
)
from rltrain.reward.score import Episode, Score
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span

NAN = math.nan
MASK = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]], dtype=torch.bool)
ADVANTAGES = torch.tensor([[1.0, 3.0], [-1.0, NAN], [2.0, 0.0], [NAN, NAN]])
LOGP = torch.tensor([[-1.0, -2.0], [-0.5, NAN], [-3.0, -0.1], [NAN, NAN]])
RATIO = torch.tensor([[2.0, 1.0], [0.5, NAN], [1.0, 1.0], [NAN, NAN]])  # learner / engine probability
ENTROPY = torch.tensor([[0.0, 1.0], [2.0, NAN], [3.0, 4.0], [NAN, NAN]])


def batch(**changes) -> TrainBatch:
    default = TrainBatch(
        mask=MASK,
        advantages=ADVANTAGES,
        weights=torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]),
        rewards=torch.tensor([1.0, 0.0, 0.5, NAN]),
        group=torch.tensor([7, 7, 3, 3]),
        source=torch.zeros(4, dtype=torch.int64),
        version=torch.zeros(4, dtype=torch.int64),
        rollout_logp=LOGP - RATIO.log(),
    )
    return default.replace(**changes)


def close(value: float, expected: float) -> bool:
    return value == pytest.approx(expected, abs=1e-6)


def test_rewards_are_taken_over_graded_completions_only():
    metrics = step_metrics(batch(), LOGP, ENTROPY)
    assert close(metrics["reward/mean"], 0.5)
    assert close(metrics["reward/std"], math.sqrt((0.25 + 0.25 + 0) / 3))
    assert (metrics["reward/min"], metrics["reward/max"]) == (0.0, 1.0)
    assert metrics["reward/graded"] == 0.75
    # group 7 has rewards 1 and 0; in group 3 only one completion is graded, so there is nothing to compare
    assert metrics["reward/useful_groups"] == 0.5


def test_a_step_without_any_reward_says_nan_and_not_zero():
    metrics = step_metrics(batch(rewards=torch.full((4,), NAN)), LOGP, ENTROPY)
    assert all(math.isnan(metrics[f"reward/{name}"]) for name in ("mean", "std", "min", "max"))
    assert metrics["reward/graded"] == metrics["reward/useful_groups"] == 0


def test_mismatch_of_ratios_two_one_half_one_one():
    metrics = step_metrics(batch(), LOGP, ENTROPY)
    assert close(metrics["rollout/mismatch_abs"], 2 * math.log(2) / 5)
    assert close(metrics["rollout/mismatch_k3"], ((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))) / 5)  # 0.1
    assert metrics["rollout/ratio_p50"] == pytest.approx(1)
    assert close(metrics["rollout/ratio_p99"], 1 + 0.96 * (2 - 1))  # sorted .5 1 1 1 2, position .99 * 4
    assert close(metrics["rollout/ratio_max"], 2)
    assert close(metrics["rollout/ess"], 5.5**2 / (5 * (4 + 1 + 0.25 + 1 + 1)))


def test_equal_log_probs_are_a_mismatch_of_zero_and_a_full_sample():
    metrics = step_metrics(batch(rollout_logp=LOGP), LOGP, ENTROPY)
    assert metrics["rollout/mismatch_abs"] == metrics["rollout/mismatch_k3"] == 0
    assert metrics["rollout/ess"] == metrics["rollout/ratio_max"] == 1


def test_a_token_the_engine_thought_impossible_keeps_the_numbers_finite():
    metrics = step_metrics(batch(rollout_logp=torch.where(MASK, LOGP - 5000, LOGP)), LOGP, ENTROPY)
    assert all(math.isfinite(metrics[f"rollout/{name}"]) for name in ("mismatch_k3", "ratio_max", "ess"))
    assert close(metrics["rollout/mismatch_abs"], 5000)


def test_without_engine_log_probs_there_is_no_mismatch_to_report():
    assert not [
        name for name in step_metrics(batch(rollout_logp=None), LOGP, ENTROPY) if name.startswith("rollout/")
    ]


def test_a_step_without_a_token_has_no_ratio_and_does_not_fail():
    metrics = step_metrics(batch(mask=torch.zeros(4, 2)), LOGP, ENTROPY)
    assert math.isnan(metrics["rollout/ratio_max"]) and math.isnan(metrics["learner/entropy_p10"])
    assert metrics["learner/tokens"] == 0 and metrics["control/masked"] == 0


def test_entropy_and_covariance_are_numpys_over_the_masked_tokens():
    metrics = step_metrics(batch(), LOGP, ENTROPY)
    assert close(metrics["learner/entropy_mean"], 2)
    assert close(metrics["learner/entropy_p10"], 0.4)  # 0 1 2 3 4, position .1 * 4
    assert close(metrics["learner/entropy_p90"], 3.6)
    logp = LOGP[MASK].numpy()
    advantages = ADVANTAGES[MASK].numpy()
    assert close(metrics["advantage/logp_covariance"], np.cov(logp, advantages, ddof=0)[0, 1])
    assert close(metrics["advantage/mean"], 1)
    assert close(metrics["advantage/abs"], 7 / 5)


def test_entropy_is_told_apart_by_turn():
    turn = torch.tensor([[0, 1], [0, -1], [1, 1], [-1, -1]])
    assert turn_entropies(batch(step_id=turn), ENTROPY) == {
        "learner/entropy_turn_0": 1.0,  # of 0 and 2
        "learner/entropy_turn_1": pytest.approx(8 / 3),  # of 1, 3 and 4
    }
    assert turn_entropies(batch(), ENTROPY) == {}


def test_masked_share_counts_weight_zero_and_what_left_the_mask():
    assert step_metrics(batch(), LOGP, ENTROPY)["control/masked"] == pytest.approx(1 / 5)  # one weight of 0
    sampled = MASK | torch.tensor([[0], [0], [0], [1]], dtype=torch.bool)  # 7 tokens, of which 4 count
    values = torch.nan_to_num(ENTROPY, nan=9.0)
    metrics = step_metrics(batch(rollout_logp=None), LOGP, values, sampled=sampled)
    assert metrics["control/masked"] == pytest.approx(3 / 7)
    # a control cannot hide tokens
    assert metrics["learner/entropy_mean"] == pytest.approx((0 + 1 + 2 + 3 + 4 + 9 + 9) / 7)


def test_row_order_and_padding_change_nothing():
    order = torch.tensor([2, 0, 3, 1])
    pad = lambda values, fill: torch.nn.functional.pad(values[order], (0, 3), value=fill)  # noqa: E731
    original = batch()
    permuted = TrainBatch(
        mask=pad(original.mask, False),
        advantages=pad(original.advantages, NAN),
        weights=pad(original.weights, 0.0),
        rewards=original.rewards[order],
        group=original.group[order],
        source=original.source,
        version=original.version[:, 0],
        rollout_logp=pad(original.rollout_logp, NAN),
    )
    assert step_metrics(permuted, pad(LOGP, NAN), pad(ENTROPY, NAN)) == pytest.approx(
        step_metrics(original, LOGP, ENTROPY)
    )


def test_numbers_are_read_once():
    class Reads(TorchFunctionMode):
        """Every way a tensor's value reaches Python, each a wait for the device."""

        WAYS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")

        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += [func.__name__] if func.__name__ in self.WAYS else []
            return func(*args, **(kwargs or {}))

    with Reads() as reads:
        step_metrics(batch(), LOGP, ENTROPY)
    assert reads.seen == ["tolist"]
    with Reads() as reads:
        why_no_update(batch(), 1e-3)
    assert reads.seen == ["tolist"]
    with Reads() as reads:
        assert float(LOGP[0].sum()) and LOGP[0, 0].item()
    assert len(reads.seen) == 2  # it does see them


def test_why_zero_names_the_cause():
    zero = torch.zeros(4, 2)
    assert why_no_update(batch(), lr=1e-3) is None
    assert why_no_update(batch(), lr=0.0) == "lr 0"
    assert why_no_update(batch(mask=zero.bool()), 1e-3).startswith("all masked (no completion")
    assert why_no_update(batch(weights=zero), 1e-3).startswith("all masked (a control")
    equal = torch.tensor([1.0, 1.0, 0.5, NAN])  # equal within groups, not between them
    assert why_no_update(batch(rewards=equal, advantages=zero), 1e-3).startswith("all groups equal")
    assert why_no_update(batch(advantages=zero), 1e-3).startswith("all advantages 0")


def test_equal_groups_with_advantages_can_still_learn():
    # REINFORCE++ compares with the whole step: equal rewards within groups are not the reason there
    assert why_no_update(batch(rewards=torch.tensor([1.0, 1.0, 0.0, 0.0])), 1e-3) is None


def test_why_zero_looks_only_at_rows_that_count():
    # group 7 differs only through row 1, which is masked out
    mask = MASK & torch.tensor([[1], [0], [1], [1]], dtype=torch.bool)
    assert why_no_update(batch(mask=mask, advantages=torch.zeros(4, 2)), 1e-3).startswith("all groups equal")


def completion(tokens: int, finish: str = "stop") -> Completion:
    return Completion(tuple(range(tokens)), (0.0,) * tokens, finish, "text", (Span(0, tokens, 0),))


GROUPS = [
    ScoredGroup(
        0,
        Prompt("p0", (1,), "1+1="),
        (completion(2), completion(8, "length"), completion(5), completion(1, "aborted")),
        (
            Score(1.5, {"correct": 1.0, "format": 0.5}),
            Score(0.0, {"correct": 0.0}),
            Score(0.0, ungraded="timeout"),
            Score(0.0, ungraded="error: x"),
        ),
    )
]


def test_completions_are_counted_with_their_reasons():
    assert completion_metrics(GROUPS) == {
        "rollout/completions": 4.0,
        "rollout/tokens": 16.0,
        "rollout/length_mean": 4.0,
        "rollout/length_max": 8.0,
        "rollout/finished_by_length": 0.25,
        "rollout/aborted": 0.25,
        "reward/correct": 0.5,
        "reward/part/correct": 0.5,
        "reward/part/format": 0.5,  # over the one completion that reports it
        "reward/ungraded/timeout": 1.0,
        "reward/ungraded/error": 1.0,  # what follows a colon is detail, not a metric name
    }


def test_every_name_logged_here_is_in_the_table():
    check_names(step_metrics(batch(), LOGP, ENTROPY))
    check_names(completion_metrics(GROUPS))


def test_a_name_outside_the_table_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'reward/maen'.*did you mean 'reward/mean'"):
        check_names(["reward/mean", "reward/maen"])
    with pytest.raises(ValueError, match="loss/"):
        check_names(["loss/"])
    check_names(
        [
            "loss/clip_share",
            "control/kl_cov_tokens",
            "reward/part/math/correct",
            "eval/pass@8_low",
            "time/annotate",
        ]
    )


def test_the_table_has_every_name_once_under_a_stage():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    stages = {
        "rollout",
        "reward",
        "process_reward",
        "advantage",
        "control",
        "loss",
        "learner",
        "pairs",
        "pool",
        "staleness",
        "sync",
        "eval",
        "law",
        "time",
        "memory",
    }
    assert {name.split("/")[0] for name in names} == stages


def test_episodes_count_what_the_policy_wrote_and_what_it_read():
    def played(turns, tokens, failure=None, **parts):
        spans = tuple((4 * turn, 4 * turn + 3) for turn in range(turns))
        episode = Episode(0.0, parts, ("x",) * turns, failure)
        return Completion(
            (0,) * tokens, (0.0,) * tokens, "stop", "", (Span(0, tokens, 0),), turns=spans, episode=episode
        )

    completions = (
        played(2, 7, calls=3.0),
        played(1, 3, calls=0.0),
        played(1, 3, "environment_timeout: late", calls=9.0),
    )
    scores = (Score(1.0), Score(0.0), Score(0.0, ungraded="environment_timeout: late"))
    metrics = completion_metrics([ScoredGroup(0, Prompt("p", (1,), ""), completions, scores)])
    assert metrics["rollout/tokens"] == 6 + 3 + 3  # one token of seven is an observation
    assert close(metrics["rollout/observed_mean"], 1 / 3)
    assert close(metrics["rollout/turns_mean"], 4 / 3)
    assert (metrics["rollout/turns_max"], metrics["rollout/environment_failures"]) == (2.0, 1.0)
    assert metrics["rollout/environment/calls"] == 1.5  # (3 + 0) / 2: nobody knows of the third
    assert metrics["reward/ungraded/environment_timeout"] == 1.0
    check_names(metrics)


def test_ages_and_ratio_masses_are_those_of_the_policys_own_tokens() -> None:
    version = torch.tensor([[5, 7], [5, 5], [6, 7], [7, 7]])
    sampled = batch(version=version, source=torch.tensor([0, 0, 0, 1]))
    metrics = staleness_metrics(sampled, LOGP, version=7)
    tokens = MASK & (sampled.source == 0)[:, None]
    ages = (7 - version)[tokens].tolist()
    assert metrics["staleness/mean"] == pytest.approx(sum(ages) / len(ages))
    assert metrics["staleness/max"] == max(ages)
    rows = [row for row in range(4) if bool(tokens[row].any())]
    assert metrics["staleness/oldest"] == pytest.approx(
        sum(7 - version[row].min() for row in rows) / len(rows)
    )
    for age in set(ages):
        ratios = RATIO[tokens & (7 - version == age)]
        assert metrics[f"staleness/ratio_mass@{age}"] == pytest.approx(float(ratios.mean()), rel=1e-5)
    assert staleness_metrics(batch(source=torch.ones(4)), LOGP, 7) == {}


def test_the_effective_sample_size_of_whole_completions() -> None:
    """Ratios of two rows: products 4 and 1, so (4 + 1)^2 / (2 (16 + 1))."""
    ratio = torch.tensor([[2.0, 2.0], [1.0, NAN]])
    mask = torch.tensor([[True, True], [True, False]])
    metrics = mismatch_metrics(ratio.log(), torch.zeros(2, 2), mask)
    assert metrics["rollout/ess_completions"] == pytest.approx(25 / 34)
    assert metrics["rollout/ratio_mean"] == pytest.approx(5 / 3)
    nothing = mismatch_metrics(ratio, ratio, torch.zeros(2, 2, dtype=torch.bool))
    assert math.isnan(nothing["rollout/ess_completions"])
