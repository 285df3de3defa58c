"""``code_tests``: where the program is found, what its tests make of it, and what is not its fault."""

from __future__ import annotations

import sysconfig

import pytest

from rltrain.reward import code_text, sandbox
from rltrain.reward.code_tests import code_tests
from rltrain.reward.pool import RewardCall, RewardPool
from rltrain.reward.score import RewardInputs, Score

SIGNATURE = 'def twice(x):\n    """Two times x."""\n'
RIGHT = {"correct": 1.0, "passed": 1.0, "no_code": 0.0, "timeout": 0.0}
WRONG = {"correct": 0.0, "passed": 0.0, "no_code": 0.0, "timeout": 0.0}

try:
    sandbox.choose_kind(False)
except ValueError as error:
    pytest.skip(reason=f"no sandbox here to run programs in: {error}", allow_module_level=True)


def inputs(*completions: str, prompt: str = SIGNATURE, **columns: object) -> RewardInputs:
    all_columns = {
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        "entry_point": "twice",
        **columns,
    }
    count = len(completions)
    return RewardInputs(
        prompt,
        completions,
        (1,) * count,
        ("stop",) * count,
        {name: value for name, value in all_columns.items() if value is not None},
    )


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Here:\n```python\na = 1\n```\nor\n```\nb = 2\n```\nBye.", "b = 2\n"),  # the last block
        (
            "```python\ndef f(x):\n    return x\n```\nUse:\n```python\nprint(f(1))\n```",
            "def f(x):\n    return x\n",
        ),  # the one that defines it
        ("```bash\npip install x\n```\n```py\na = 1\n```", "a = 1\n"),  # not of another language
        ("```bash\npip install x\n```", None),
        (
            "~~~~python\ns = '''\n```\n'''\n~~~~",
            "s = '''\n```\n'''\n",
        ),  # a fence inside a longer one, or one of another kind
        ("```python\ndef f(x):\n    ret", "def f(x):\n    ret"),  # cut off by the token limit
        ("<think>```python\nwrong\n```</think>\n```python\nf = 1\n```<|im_end|>", "f = 1\n"),
        ("f = 1", "f = 1"),
        ("  \n<|endoftext|>", None),
    ],
)
def test_the_program_is_found_in_what_surrounds_it(completion, expected):
    assert code_text.extract_program(completion, None, "f", "auto") == expected


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 2 * x\n", "    return 2 * x\n"),
        ("    return 2 * x\n\nprint(twice(1))\n", "    return 2 * x\n"),
        (
            "    return half(x) * 4\n\ndef half(x):\n    return x / 2\n\nif __name__ == '__main__':\n    "
            "twice(1)",
            "    return half(x) * 4\n\ndef half(x):\n    return x / 2\n",
        ),
        ("    return (2\n* x\n)\n", "    return (2"),  # a line at the margin that is no definition ends it
        ("    return [\n        2 * x\n][0]\n# so\nx", "    return [\n        2 * x\n][0]\n# so"),
    ],
)
def test_a_continuation_ends_where_the_model_begins_something_else(completion, kept):
    assert code_text.extract_program(completion, SIGNATURE, "twice", "continuation") == SIGNATURE + kept


def test_auto_takes_a_body_as_a_continuation_and_a_definition_as_a_program():
    assert (
        code_text.extract_program("    return 2 * x", SIGNATURE, "twice", "auto")
        == SIGNATURE + "    return 2 * x"
    )
    assert (
        code_text.extract_program("def twice(x):\n    return 2 * x", SIGNATURE, "twice", "auto")
        == SIGNATURE + "\n\ndef twice(x):\n    return 2 * x"
    )
    assert (
        code_text.extract_program("```\ntwice = lambda x: 2 * x\n```", SIGNATURE, "twice", "auto")
        == SIGNATURE + "\n\ntwice = lambda x: 2 * x\n"
    )


def test_completions_are_scored_one_by_one():
    completions = (
        "    return 2 * x",
        "    return x",
        "```python\ndef twice(x): return x + x\n```",
        "   ",
        "    while True: pass",
    )
    assert code_tests(inputs(*completions), before_column="prompt", seconds=0.5) == [
        Score(1.0, RIGHT),
        Score(0.0, WRONG),
        Score(1.0, RIGHT),
        Score(0.0, WRONG | {"no_code": 1.0}),
        Score(0.0, WRONG | {"timeout": 1.0}),
    ]


def test_a_prompt_that_is_a_signature_alone_will_do():
    assert (
        code_tests(inputs("    return 2 * x", prompt="def twice(x):\n"), before_column="prompt")[0].value
        == 1.0
    )


def test_a_list_of_assertions_gives_a_share_where_the_recipe_wants_one():
    # 2 of 4 tests: -1 + 2 * 0.5 = 0
    row = inputs(
        "def f(x):\n    return abs(x)\n",
        test=["assert f(1) == 1", "assert f(-1) == 1", "assert f(-2) == -2", "assert f('a')"],
        entry_point=None,
    )
    (share,) = code_tests(row, score="share", correct=1.0, wrong=-1.0)
    assert (share.value, share.parts["passed"], share.parts["correct"]) == (0.0, 0.5, 0.0)
    assert code_tests(row, correct=1.0, wrong=-1.0)[0].value == -1.0


def test_what_is_the_rows_fault_leaves_the_completion_ungraded():
    assert code_tests(inputs("def twice(x):\n    return 1", test="assert (")) == [
        Score(0.0, ungraded="tests")
    ]
    assert code_tests(inputs("def twice(x):\n    return 1", test="assert twice(object()) == 1")) == [
        Score(0.0, ungraded="tests")
    ]


def test_what_is_the_sandboxs_fault_leaves_the_completion_ungraded(monkeypatch):
    def fails(*_: object) -> sandbox.Verdict:
        raise sandbox.SandboxError("fork: Cannot allocate memory")

    monkeypatch.setattr(sandbox, "judge", fails)
    assert code_tests(inputs("def twice(x):\n    return 1")) == [Score(0.0, ungraded="sandbox")]


@pytest.mark.parametrize(
    ("columns", "hp", "said"),
    [
        ({"test": None}, {}, r"column 'test' must hold Python tests.*columns are: entry_point"),
        ({"test": []}, {}, "must hold Python tests"),
        ({"test": [1]}, {}, "must hold Python tests"),
        ({"code": "<|user|>def f(x):"}, {"before_column": "code"}, "is not Python.*set before_column: code"),
        ({}, {"before_column": "signature"}, "column 'signature' must hold text, got None"),
    ],
)
def test_a_row_that_lacks_what_it_needs_is_refused(columns, hp, said):
    with pytest.raises(ValueError, match=said):
        code_tests(inputs("x = 1", **columns), **hp)


def test_the_pool_runs_programs_and_refuses_at_the_start_where_nothing_can_be_run():
    call = RewardCall("code_tests", 1.0, {"before_column": "prompt", "seconds": 0.5})
    with RewardPool([call], workers=2, seconds=10.0, memory_gib=2.0, deadline_seconds=120.0) as pool:
        pool.check(inputs("0"))
        assert pool.errors == []
        groups = pool.score(
            [
                inputs("    return 2 * x", "    return 3 * x"),
                inputs("import os\nos._exit(0)", "    return x + x"),
            ]
        )
        assert [[score.value for score in group] for group in groups] == [[1.0, 0.0], [0.0, 1.0]]
        with pytest.raises(
            ValueError, match=r"first sample \(tests\): code_tests on '0': a test is not valid Python"
        ):
            pool.check(inputs("0", test="assert ("))
        with pytest.raises(ValueError, match="column 'test' must hold Python tests"):
            pool.check(inputs("0", test=None))


def test_installed_packages_are_there_only_where_the_recipe_says_so():
    if sysconfig.get_path("purelib").startswith("/tmp/"):
        pytest.skip(
            reason=(
                "the packages are installed below /tmp, in whose place the sandbox has an empty folder "
                "of its own"
            )
        )
    row = inputs("import yaml\ndef twice(x):\n    return yaml.safe_load(str(2 * x))\n")
    assert code_tests(row)[0].value == 0.0
    assert code_tests(row, packages=True)[0].value == 1.0
