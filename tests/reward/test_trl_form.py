"""A function written for TRL's GRPOTrainer is called as there, and what it logs arrives."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.reward.combine import combine
from rltrain.reward.pool import RewardPool
from rltrain.reward.resolve import RewardCall, resolve
from rltrain.reward.score import RewardInputs, Score

MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"})

SOURCE = '''
import asyncio
import functools
import re

def think_format(completions, **kwargs):
    """As published for conversational data sets."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*</think>", content, re.DOTALL) else 0.0 for content in contents]

def checks_everything(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert prompts == [prompt] * 2, prompts
    answers = [[{"role": "assistant", "content": text}] for text in ("4", "five")]
    assert completions == answers, completions
    assert completion_ids == [[1, 2], [3]] and answer == ["4", "4"] and trainer_state.global_step == 24
    prompts[0].clear()
    assert len(prompts[1]) == 2
    return [1.0, 0.0]

def texts(prompts, completions):
    assert prompts == ["p", "p"] and completions == ["4", "five"]
    return [1.0, 0.0]

async def slow_server(completions, **kwargs):
    await asyncio.sleep(0)
    return [1.0 if completion == "4" else None for completion in completions]

LOCK = asyncio.Lock()

async def one_client_for_all_calls(completions, **kwargs):
    async with LOCK:
        await asyncio.sleep(0)
    return [1.0] * len(completions)

async def our_form(inputs, *, scale):
    return [scale] * len(inputs.completions)

wrapped = functools.partial(slow_server, temperature=1.0)

class Judge:
    async def __call__(self, completions, **kwargs):
        return [2.0] * len(completions)

judge = Judge()

def logs(completions, log_metric, log_extra, **kwargs):
    log_metric("length", 1.0)
    log_metric("length", 2.0)
    log_metric("undefined", float("nan"))
    log_extra("said", [completion[::-1] for completion in completions])
    return [1.0, None]

def logs_too_few(completions, log_extra):
    log_extra("said", ["one"])
    return [1.0] * len(completions)

def logs_verdicts(completions, log_metric):
    log_metric("accuracy/correct", 1.0)
    return [1.0] * len(completions)

def reads_max_steps(completions, trainer_state):
    return [trainer_state.max_steps] * len(completions)

def wants_environments(completions, environments):
    return [1.0] * len(completions)

def default_log(completions, log_extra=None):
    return [float(log_extra is not None)] * len(completions)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "theirs.py"
    path.write_text(SOURCE)
    return path


def inputs(*completions: str, messages=None) -> RewardInputs:
    count = len(completions)
    ids = ((1, 2), (3,))
    return RewardInputs(
        *("p", completions, (1,) * count, ("stop",) * count, {"answer": "4"}),
        completion_ids=ids[:count],
        messages=messages,
        updates=24,
    )


def grade(file: Path, name: str, row: RewardInputs, **hp: object) -> list[Score]:
    return resolve(RewardCall(f"{file}:{name}", 1.0, hp))(row)


def test_conversational_prompts_come_as_messages_and_texts_as_texts(file):
    assert [
        score.value for score in grade(file, "checks_everything", inputs("4", "five", messages=MESSAGES))
    ] == [1.0, 0.0]
    assert [score.value for score in grade(file, "texts", inputs("4", "five"))] == [1.0, 0.0]
    thought = inputs("<think>a</think>b", "b", messages=MESSAGES)
    assert [score.value for score in grade(file, "think_format", thought)] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["slow_server", "wrapped"])
def test_async_functions_are_awaited(file, name):
    assert grade(file, name, inputs("4", "five")) == [Score(1.0), Score(0.0, ungraded="none")]


def test_async_callables_and_our_own_form_are_awaited_and_share_one_loop(file):
    assert grade(file, "judge", inputs("4")) == [Score(2.0)]
    assert grade(file, "our_form", inputs("4"), scale=0.5) == [Score(0.5)]
    grader = resolve(RewardCall(f"{file}:one_client_for_all_calls", 1.0, {}))
    assert [grader(inputs("4")) for _ in range(3)] == [[Score(1.0)]] * 3


def test_metrics_become_parts_and_extra_columns_texts(file):
    first, second = grade(file, "logs", inputs("ab", "cd"))
    assert (first.value, first.parts, first.extra) == (1.0, {"length": 1.5}, {"said": "ba"})
    assert second == Score(0.0, ungraded="none")
    assert combine(["logs"], [1.0], [first]).extra == {"said": "ba"}
    both = combine(["logs", "other"], [1.0, 1.0], [first, Score(0.0)])
    assert both.extra == {"logs/said": "ba"} and both.parts["logs/length"] == 1.5
    assert grade(file, "default_log", inputs("4")) == [Score(1.0)]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("logs_too_few", ValueError, "'said' has 1 values for 2 completions"),
        ("logs_verdicts", ValueError, "names verdicts on completions"),
        (
            "reads_max_steps",
            AttributeError,
            "trainer_state has global_step and nothing else here, no max_steps",
        ),
        ("wants_environments", ValueError, "wants_environments needs environments"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(file, name, error, said):
    with pytest.raises(error, match=said):
        grade(file, name, inputs("4", "five"))


def test_token_ids_messages_and_texts_travel_through_a_pool_also_one_by_one(file):
    calls = [RewardCall(f"{file}:{name}", 1.0, {}) for name in ("checks_everything", "logs")]
    with RewardPool(calls, workers=1, seconds=5, memory_gib=1, deadline_seconds=60) as pool:
        (scores,) = pool.score([inputs("4", "five", messages=MESSAGES)])
        assert scores[0].value == 2.0 and scores[0].extra == {
            "logs/said": "[{'role': 'assistant', 'content': '4'}]"
        }
    with RewardPool(calls[:1], workers=1, seconds=5, memory_gib=1, deadline_seconds=60) as pool:
        row = RewardInputs(
            "p",
            ("4", "6"),
            (1, 1),
            ("stop",) * 2,
            {"answer": "4"},
            completion_ids=((1,), (9,)),
            messages=MESSAGES,
        )
        pool.score([row])
        # together the function refuses; alone each completion has its own ids
        assert {reason for reason, _ in pool.errors} == {"error"} and len(pool.errors) == 2
