"""push: a name as on the Hub, and checkpoints that are models."""

import pytest

from rltrain.config.rules.push import push_problems
from rltrain.config.schema import Checkpoint, Push


@pytest.mark.parametrize(
    ("push", "checkpoint", "problem"),
    [
        ({"repo": "qwen-grpo"}, {}, "push.repo is 'qwen-grpo', expected OWNER/MODEL"),
        ({"repo": "ann/a model"}, {}, "expected OWNER/MODEL"),
        ({"repo": "ann/m", "every": 10}, {}, "push.every is 10, but checkpoint.every is 0"),
        ({"repo": "ann/m", "every": 10}, {"every": 4}, "a multiple of checkpoint.every"),
        ({"repo": "ann/m", "every": 8}, {"every": 4, "format": "sharded"}, "set push.every 0"),
    ],
)
def test_what_cannot_be_pushed_is_named_before_the_run(push, checkpoint, problem):
    (text,) = push_problems(Push(**push), Checkpoint(**checkpoint))
    assert problem in text


def test_the_model_at_the_end_is_pushed_with_any_checkpoints():
    assert not list(push_problems(None, Checkpoint()))
    assert not list(push_problems(Push(repo="ann/m"), Checkpoint(format="sharded", every=3)))
    assert not list(push_problems(Push(repo="ann/m", every=8), Checkpoint(every=4)))
