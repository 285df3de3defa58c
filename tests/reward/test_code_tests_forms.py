"""In what forms the row's tests may come; and that a verdict is never paid for tests that did not
call the program.
"""

from __future__ import annotations

import pytest

from rltrain.reward import sandbox
from rltrain.reward.code_tests import code_tests
from rltrain.reward.pool import RewardCall, RewardPool
from rltrain.reward.score import RewardInputs, Score

try:
    sandbox.choose_kind(False)
except ValueError as error:
    pytest.skip(reason=f"no sandbox here to run programs in: {error}", allow_module_level=True)

RIGHT = (
    "LIMIT = 9\ndef sq(x):\n    if not isinstance(x, (int, float)):\n        raise TypeError('no number')\n  "
    "  return x * x\n"
)
WRONG = "LIMIT = 8\ndef sq(x):\n    return None\n"

UNIT = (
    "import unittest\nclass Squares(unittest.TestCase):\n    def test_two(self):\n        "
    "self.assertEqual(sq(2), 4)\n"
)
FORMS = {
    "statements": "assert sq(2) == 4",
    "a helper with arguments": (
        "def check_one(got, expected):\n    assert got == expected\ncheck_one(sq(2), 4)"
    ),
    "a helper that is called like a test": (
        "def test(got, expected):\n    assert got == expected\ntest(sq(2), 4)"
    ),
    "check(candidate)": "def check(candidate):\n    assert candidate(2) == 4",
    "check()": "def check():\n    assert sq(2) == 4",
    "a main guard": "def main():\n    assert sq(2) == 4\nif __name__ == '__main__':\n    main()",
    "a script that exits": "import sys\nsys.exit(0 if sq(2) == 4 else 1)",
    "a value": "assert LIMIT == 9",
    "a value that is read late": (
        "def test_limit():\n    assert LIMIT * sq(1) == 9 and globals()['LIMIT'] == 9"
    ),
    "a pytest function": "def test_sq():\n    assert sq(2) == 4",
    "a pytest function of the candidate": "def test_sq(candidate):\n    assert candidate(2) == 4",
    "pytest's names": (
        "import pytest\nfrom pytest import approx\n"
        "@pytest.fixture\ndef two():\n    yield 2\n"
        "@pytest.fixture()\ndef four(two):\n    return two * 2\n"
        "def test_sq(two, four):\n    assert sq(two) == four\n"
        "@pytest.mark.parametrize('x, y', [(1, 1), pytest.param(3, 9), pytest.param(3, 0, "
        "marks=pytest.mark.skip)])\n"
        "@pytest.mark.parametrize('sign', [1, -1], ids=['plus', 'minus'])\n"
        "@pytest.mark.slow\ndef test_more(x, y, sign):\n    assert sq(sign * x) == y\n"
        "def test_near():\n    assert [sq(0.1 + 0.2)] == [approx(0.09)] and sq(0.1) != approx(0.011, "
        "abs=1e-4)\n"
        "def test_error():\n    with pytest.raises(TypeError, match='no number') as caught:\n        "
        "sq('a')\n"
        "    assert 'number' in str(caught.value)\n"
        "@pytest.mark.skip\ndef test_not_yet():\n    assert False\n"
        "if __name__ == '__main__':\n    pytest.main([__file__])\n".replace("__file__", "'x'")
    ),
    "a pytest class": (
        "import pytest\nclass TestSquares:\n    def setup_method(self):\n        self.two = 2\n"
        "    @pytest.fixture\n    def four(self):\n        return self.two * 2\n"
        "    @pytest.mark.parametrize('sign', [1, -1])\n    def test_two(self, four, sign):\n        assert "
        "sq(sign * self.two) == four\n"
    ),
    "a TestCase": UNIT,
    "a TestCase with main": f"{UNIT}if __name__ == '__main__':\n    unittest.main()\n",
    "a TestCase with fixtures and parts": (
        "from unittest import TestCase, main\nclass Squares(TestCase):\n    @classmethod\n    def "
        "setUpClass(cls):\n        cls.two = 2\n"
        "    def setUp(self):\n        self.four = 4\n    def test_parts(self):\n        for sign in (1, "
        "-1):\n"
        "            with self.subTest(sign=sign):\n                self.assertEqual(sq(sign * self.two), "
        "self.four)\nmain()\n"
    ),
    "imported from the module": (
        "from solution import sq as square\ndef test_sq():\n    assert square(2) == 4"
    ),
    "imported as the module": (
        "import solution\ndef test_sq():\n    assert solution.sq(2) == 4 and solution.LIMIT == 9"
    ),
    "all imported from the module": "from solution import *\ndef test_sq():\n    assert sq(2) == 4",
}
NEVER_CALLED = {
    "nothing": "# to be written",
    "check without a name for it": "def check(candidate):\n    assert candidate(2) == 4",
    "check by another name": "def check_sq(candidate):\n    assert candidate(2) == 4",
    "check that calls nothing": "def check(candidate):\n    assert candidate is not None",
    "a function that nobody calls": "def verify():\n    assert sq(2) == 4",
    "a main that nobody calls": "def main():\n    assert sq(2) == 4\nif __name__ == 'tests':\n    main()",
    "a name alone": "assert sq\nsquare = sq\nassert callable(square)",
    "a test of itself": "def test_sum():\n    assert 1 + 1 == 2",
    "an empty TestCase": (
        "import unittest\nclass Squares(unittest.TestCase):\n    def test_two(self):\n        pass\n"
        "unittest.main()"
    ),
    "a test that is skipped": (
        "import pytest\n@pytest.mark.skip(reason='slow')\ndef test_sq():\n    assert sq(2) == 4"
    ),
    "a test that skips": "import pytest\ndef test_sq():\n    pytest.skip('later')\n    assert sq(2) == 4",
    "a call that is not reached": "if False:\n    assert sq(2) == 4",
    "a call in a comprehension of nothing": "assert all(sq(x) == x * x for x in [])",
}
FAULTY = {
    "a module that is not there": (
        "import numpy\nassert sq(2) == 4",
        "import numpy, which is not there: set packages",
    ),
    "the program by another name": (
        "from squares import sq\nassert sq(2) == 4",
        "import squares, which is not there.*module",
    ),
    "a fixture that is not there": ("def test_sq(tmp_path):\n    assert sq(2) == 4", "wants tmp_path"),
    "a name that pytest has and we have not": (
        "import pytest\npytest.importorskip('numpy')",
        "pytest.importorskip, which is not supp",
    ),
    "a test that is asynchronous": ("async def test_sq():\n    assert sq(2) == 4", "test_sq is asynchronous"),
    "a fault that a test hides": ("try:\n    sq(object())\nexcept:\n    pass", "not plain data"),
}
# Each fails every test above, however it looks from outside.
HOSTILE = {
    "empty": "pass",
    "a syntax error": "def sq(:",
    "dies while loading": "import os\nos._exit(0)",
    "exits while loading": "raise SystemExit(0)",
    "dies in the call": "import os\ndef sq(x):\n    os._exit(0)\nLIMIT = 0",
    "exits in the call": "LIMIT = 0\ndef sq(x):\n    raise SystemExit(0)",
    "a function that is a value": "sq = 4\nLIMIT = 0",
    "a value that is a function": "def LIMIT():\n    return 9\nsq = None",
    "returns what is no data": (
        "class All:\n    def __eq__(self, other):\n        return True\nLIMIT = All()\ndef sq(x):\n"
        "    return LIMIT"
    ),
    "blames an import": "LIMIT = 0\ndef sq(x):\n    raise ModuleNotFoundError('numpy', name='numpy')",
    "feigns the tests' own exceptions": (
        "class BadTests(BaseException):\n    pass\nclass Skipped(BadTests):\n    pass\nLIMIT = 0\ndef "
        "sq(x):\n    raise Skipped\n"
    ),
    "defines what tests import and are": (
        "def pytest():\n    pass\ncheck = main = test_sq = pytest\nLIMIT = 0\ndef sq(x):\n    return None"
    ),
    "shadows built-in functions": "def isinstance(*_):\n    return True\n"
    "all = callable = len = isinstance\nLIMIT = 0\ndef sq(x):\n    return 0",
}


def graded(test: object, *programs: str, entry: str | None = None, **hp: object) -> list[Score]:
    columns = {"test": test} | ({} if entry is None else {"entry_point": entry})
    count = len(programs)
    return code_tests(RewardInputs("p", programs, (1,) * count, ("stop",) * count, columns), **hp)


def entry_of(test: str) -> str | None:
    return "sq" if "candidate" in test else None


@pytest.mark.parametrize("form", FORMS)
def test_tests_of_every_form_are_run_and_no_program_escapes_their_verdict(form: str):
    test = FORMS[form]
    place = list(FORMS).index(form)
    names = [
        name for number, name in enumerate(HOSTILE) if (number - place) % 3 == 0
    ]  # all of them within three forms
    right, wrong, *hostile = graded(
        test, RIGHT, WRONG, *(HOSTILE[name] for name in names), entry=entry_of(test)
    )
    assert (right.value, right.ungraded, right.why) == (1.0, None, None)
    assert (wrong.value, wrong.ungraded) == (0.0, None)
    assert {
        name: (score.value, score.ungraded) for name, score in zip(names, hostile, strict=True)
    } == dict.fromkeys(names, (0.0, None))


@pytest.mark.parametrize("name", NEVER_CALLED)
def test_tests_that_never_call_the_program_leave_the_row_ungraded_whatever_it_is(name: str):
    entry = "sq" if name in ("check by another name", "check that calls nothing") else None
    scores = graded(
        NEVER_CALLED[name], RIGHT, WRONG, HOSTILE["empty"], HOSTILE["dies while loading"], entry=entry
    )
    assert [(score.value, score.ungraded) for score in scores[:2]] == [(0.0, "tests")] * 2
    assert scores[0].why is not None and "no test calls the program" in scores[0].why
    # a program without the function that the tests name has failed, if they do no more than name it
    expected = None if name in ("check that calls nothing", "a name alone") else "tests"
    assert [(score.value, score.ungraded) for score in scores[2:]] == [(0.0, expected)] * 2


@pytest.mark.parametrize("name", FAULTY)
def test_what_the_tests_lack_is_their_fault_and_said(name: str):
    test, said = FAULTY[name]
    (score,) = graded(test, RIGHT)
    assert score.ungraded == "tests"
    with pytest.raises(sandbox.TestsError, match=said):
        sandbox.judge(
            RIGHT,
            sandbox.Tests((test,), "", None),
            sandbox.Limits(4.0, 256, 4, 4, 4),
            sandbox.choose_kind(False),
        )


@pytest.mark.parametrize("handler", ["except Exception", "except BaseException", "except"])
@pytest.mark.parametrize(
    "name", ["dies while loading", "dies in the call", "returns what is no data", "exits in the call"]
)
def test_a_program_that_is_gone_fails_a_test_that_expects_any_error(handler: str, name: str):
    (score,) = graded(f"try:\n    sq('a')\n{handler}:\n    pass\n", HOSTILE[name])
    assert (score.value, score.ungraded) == (0.0, None)


def test_every_function_and_method_is_a_test_of_its_own_and_those_without_a_call_do_not_count():
    test = (
        "def test_a():\n    assert sq(0) == 0\ndef test_b():\n    assert sq(2) == 4\ndef test_c():\n    "
        "assert True\n" + UNIT
    )
    (zero,) = graded([test, "import math"], "def sq(x):\n    return 0", score="share")
    assert zero.parts["passed"] == 1 / 3  # test_a of test_a, test_b and test_two
    assert graded([test, "import math"], RIGHT)[0].parts["passed"] == 1.0


def test_a_later_test_may_use_what_an_earlier_one_has_called():
    tests = ["result = sq(2)", "assert result == 4"]
    assert [score.value for score in graded(tests, RIGHT, WRONG)] == [1.0, 0.0]


def test_the_module_under_which_tests_import_the_program_is_the_recipes():
    assert graded("from squares import sq\nassert sq(2) == 4", RIGHT, WRONG, module="squares") == graded(
        "assert sq(2) == 4", RIGHT, WRONG
    )


def test_a_program_keeps_its_annotations():
    program = "def sq(x: int) -> int:\n    return x * x if sq.__annotations__['x'] is int else None\n"
    assert graded("assert sq(2) == 4", program)[0].value == 1.0


@pytest.mark.parametrize(
    ("columns", "hp", "said"),
    [
        (
            {"test": FORMS["check(candidate)"], "entry_point": "sq"},
            {"entry_column": "entrypoint"},
            "columns are: entry_point, test",
        ),
        (
            {"test": FORMS["check(candidate)"], "entry_point": "sq"},
            {"tests_column": "tests"},
            "columns are: entry_point, test",
        ),
        ({"test": FORMS["check(candidate)"], "entry_point": "sq(x)"}, {}, "must hold the name of a function"),
        ({"test": FORMS["statements"]}, {"before_column": "befor"}, "columns are: test"),
        ({"test": FORMS["check(candidate)"]}, {}, r"\(tests\).*the row gives none; set entry_column"),
        ({"test": NEVER_CALLED["nothing"]}, {}, r"\(tests\).*no test calls the program"),
    ],
)
def test_a_misspelt_column_and_tests_that_say_nothing_end_the_run_before_it_begins(columns, hp, said):
    calls = [RewardCall("code_tests", 1.0, hp)]
    with (
        RewardPool(calls, workers=1, seconds=10.0, memory_gib=2.0, deadline_seconds=60.0) as pool,
        pytest.raises(ValueError, match=said),
    ):
        pool.check(RewardInputs("p", (RIGHT,), (1,), ("stop",), columns))
