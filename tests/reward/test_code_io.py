"""``code_io``: what a program prints decides, however it prints it, and nothing else that it does."""

from __future__ import annotations

import json
import math
import time

import pytest

from rltrain.reward import sandbox
from rltrain.reward.code_io import code_io, same_output
from rltrain.reward.pool import RewardCall, RewardPool
from rltrain.reward.score import RewardInputs, Score
from support.patience import PATIENCE

SUM = [{"input": "1 2\n", "output": "3\n"}, {"input": "40 2\n", "output": "42\n"}]
RIGHT = {"correct": 1.0, "passed": 1.0, "no_code": 0.0, "timeout": 0.0}
WRONG = RIGHT | {"correct": 0.0, "passed": 0.0}
ADD = "a, b = map(int, input().split())\nprint(a + b)\n"

try:
    sandbox.choose_kind(False)
except ValueError as error:
    pytest.skip(reason=f"no sandbox here to run programs in: {error}", allow_module_level=True)


def inputs(*completions: str, tests: object = SUM, **columns: object) -> RewardInputs:
    count = len(completions)
    return RewardInputs("Add.", completions, (1,) * count, ("stop",) * count, {"tests": tests, **columns})


def passed(program: str, tests: object = SUM, **hp: object) -> float:
    (score,) = code_io(
        inputs(program, tests=tests), score="share", **{"seconds": 1.0, "total_seconds": 2.0, **hp}
    )
    assert score.ungraded is None
    return score.parts["passed"]


@pytest.mark.parametrize(
    ("printed", "expected", "tolerance", "is_same"),
    [
        ("1 2\n3", "1 2\n3\n\n", None, True),  # the end of the file
        ("1 2  \r\n3\t\n", "1 2\n3", None, True),  # ends of lines
        ("1  2", "1 2", None, False),  # but not inside a line
        (" 1", "1", None, False),  # nor before it
        ("1\n\n2", "1\n2", None, False),
        ("Yes", "YES", None, False),
        ("", "1", None, False),
        ("0.33333", "0.333333", None, False),
        ("0.33333", "0.333333", 1e-4, True),
        ("0.33333  x", "0.333333 x", 1e-4, True),
        ("2000001", "2000000", 1e-6, True),  # 1 of 2,000,000 is 5e-7
        ("2000003", "2000000", 1e-6, False),
        ("1e-7", "0", 1e-6, True),
        ("nan", "0", 1e9, False),  # and nothing that float() takes and a judge does not
        ("inf", "1", 1e9, False),
        ("1_0", "10", 1e9, False),
        ("1\n2", "1 2", 1.0, False),  # a line is a line
        ("5", "1" + "0" * 400, 1e-6, False),  # infinite as a float, to which every number would be near
        ("5", "1e309", 1e-9, False),
        ("1" + "0" * 400, "1.0e400", 1e-9, True),
        ("1.001e400", "1e400", 1e-2, True),
        ("1e400", "-1e400", 1e9, True),  # the difference is twice the expected number
        ("5", "1e99999999999999999999", 1e9, False),
        ("5", "inf", 1e9, False),
        ("inf", "1e309", 1e9, False),
        ("Infinity", "inf", 1e-6, True),
        ("-inf", "inf", 1e9, False),
        ("NaN", "nan", 1e-6, True),
        ("5", "nan", 1e9, False),
        ("nan", "inf", 1e9, False),
    ],
)
def test_text_is_compared_as_judges_do(printed, expected, tolerance, is_same):
    assert same_output(printed, expected, tolerance) is is_same


def test_a_program_that_prints_the_answers_is_right_and_one_that_prints_some_has_its_share():
    constant = "```python\nprint(3)\n```"
    fenced = f"The sum:\n```python\n{ADD}```\nThat is all."
    assert code_io(inputs(ADD, fenced, constant, "  ")) == [
        *(Score(1.0, RIGHT), Score(1.0, RIGHT)),
        *(Score(0.0, WRONG | {"passed": 0.5}), Score(0.0, WRONG | {"no_code": 1.0})),
    ]
    # 1 of 2 tests: -1 + 2 * 0.5 = 0
    assert [score.value for score in code_io(inputs(ADD, constant), score="share", wrong=-1.0)] == [1.0, 0.0]


def test_programs_end_as_python_ends_them():
    assert (
        passed(
            f"def main():\n    {ADD.replace(chr(10), chr(10) + '    ')}\nif __name__ == '__main__':\n    "
            "main()\n"
        )
        == 1.0
    )
    assert (
        passed(
            "import threading\ndef main():\n    "
            f"{ADD.replace(chr(10), chr(10) + '    ')}\nthreading.Thread(target=main).start()\n"
        )
        == 1.0
    )
    assert (
        passed(
            "import atexit, sys\natexit.register(lambda: print(sum(map(int, sys.stdin.read().split()))))\n"
        )
        == 1.0
    )
    assert passed(ADD + "import sys\nsys.stdout.close()\n") == 1.0
    assert (
        passed(ADD + "exit()\n")
        == passed(ADD + "quit(0)\n")
        == passed(ADD + "import sys\nsys.exit()\n")
        == 1.0
    )
    assert (
        passed(
            "import sys, io\nsys.stdout = io.StringIO()\n"
            + ADD
            + "sys.__stdout__.write(sys.stdout.getvalue())\n"
        )
        == 1.0
    )
    assert (
        passed("import os\nout = os.fdopen(1, 'w')\nout.write(str(sum(map(int, input().split()))))\n") == 1.0
    )
    assert passed("import os\nprint(sum(map(int, os.read(0, os.fstat(0).st_size).split())))\n") == 1.0
    assert passed("print(sum(map(int, open(0))))", tests=[{"input": "1\n2\n", "output": "3"}]) == 1.0


@pytest.mark.parametrize(
    "ending",
    [
        "raise SystemExit(1)",
        "1 / 0",
        "import os\nos._exit(7)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "input()",
    ],
)
def test_the_right_text_and_a_failure_after_it_is_a_failure(ending):
    assert passed(f"{ADD}import sys\nsys.stdout.flush()\n{ending}\n") == 0.0


def test_tests_come_in_the_forms_of_published_data_sets():
    by_column = {"inputs": ["1 2\n", "40 2\n"], "outputs": ["3\n", "42\n"]}  # APPS, TACO
    of_lines = {"input": [["1 2"], ["40 2"]], "output": [["3"], ["42"]]}  # CodeContests, by lines
    typed = [{"type": "stdin_stdout", **test} for test in SUM]
    assert [
        passed(ADD, tests) for tests in (by_column, of_lines, typed, json.dumps(typed), json.dumps(by_column))
    ] == [1.0] * 5
    assert passed("print(3)", SUM, max_tests=1) == 1.0


@pytest.mark.parametrize(
    "tests",
    [
        [
            {"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3},
            {"fn_name": "add", "input": [[1], [2]], "output": [[1, 2]]},
        ],
        {
            "fn_name": "add",
            "inputs": [[1, 2], [[1], [2]]],
            "outputs": [[3], [1, 2]],
        },  # APPS puts answers into a list of one
    ],
)
def test_tests_may_call_a_function_or_a_solutions_method(tests):
    method = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
    function = (
        "def add(a, b):\n    return tuple(a + b) if isinstance(a, list) else a + b\n"  # JSON has no tuples
    )
    assert passed(method, tests) == passed(function, tests) == 1.0
    assert passed("def add(a, b):\n    return 3\n", tests) == 0.5
    assert passed(ADD, tests) == passed("def add(a, b):\n    raise SystemExit(0)\n", tests) == 0.0
    assert (
        passed(
            "class All:\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return "
            "All()\n",
            tests,
        )
        == 0.0
    )
    (late,) = code_io(
        inputs("def add(a, b):\n    while True:\n        pass\n", tests=tests), total_seconds=0.4
    )
    assert late == Score(0.0, WRONG | {"timeout": 1.0})


@pytest.mark.parametrize(
    ("returned", "expected", "tolerance", "is_same"),
    [
        ("1 / 3", 0.3333, 1e-3, True),
        ("1 / 3", 0.3333, None, False),
        ("{'a': (1, 2.0001)}", {"a": [1, 2.0]}, 1e-3, True),
        ("[1, 2]", [1, 2, 3], 1.0, False),
        ("float('inf')", math.inf, None, True),  # JSON has Infinity and NaN where Python wrote it
        ("float('-inf')", math.inf, 1e9, False),
        ("5", math.inf, 1e9, False),
        ("float('nan')", math.nan, None, True),
        ("5", math.nan, 1e9, False),
        ("5", 10**400, 1e9, False),
        ("10**400", 10**400, 1e-9, True),
        ("'5'", 5, 1e9, False),
    ],
)
def test_what_a_function_returns_is_compared_with_the_same_tolerance(returned, expected, tolerance, is_same):
    program = f"inf = nan = 5\ndef f(x):\n    assert x != x\n    return {returned}\n"
    tests = [{"fn_name": "f", "input": [math.nan], "output": expected}]
    assert passed(program, tests, tolerance=tolerance) == float(is_same)


@pytest.mark.parametrize("tolerance", [math.inf, math.nan, -1.0])
def test_a_tolerance_to_which_everything_or_nothing_is_near_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a finite number"):
        code_io(inputs(ADD), tolerance=tolerance)


def test_a_column_in_front_of_the_program_that_the_row_lacks_is_refused_where_the_recipe_names_it():
    with pytest.raises(ValueError, match=r"no column 'befor'; its columns are: before, tests"):
        code_io(inputs("3", before="print("), before_column="befor")
    assert code_io(inputs(ADD, before=None))[0].value == 1.0


@pytest.mark.parametrize(
    "tests",
    [
        [{"testtype": "functional", "input": "1\n2", "output": "3"}],
        [{"fn_name": "add; x", "input": [1, 2], "output": 3}],
        [{"fn_name": "add", "input": [1, 2], "output": 3}, {"input": "1", "output": "1"}],
        [{"fn_name": "add", "input": "1", "output": 3}],
        [{"input": "1", "output": " \n"}],  # any program that prints nothing would pass
    ],
)
def test_tests_that_say_nothing_of_what_is_printed_leave_the_row_ungraded(tests):
    assert code_io(inputs(ADD, "0", tests=tests)) == [Score(0.0, ungraded="tests")] * 2


@pytest.mark.parametrize(
    "tests",
    [None, [], "[", [1], {"inputs": ["1"], "outputs": []}, [{"input": "1"}], [{"input": 1, "output": "1"}]],
)
def test_a_column_without_tests_is_refused(tests):
    with pytest.raises(
        ValueError, match=r"code_io: .*(tests|inputs and outputs|a test must have|must be text)"
    ):
        code_io(inputs(ADD, tests=tests))


def test_what_is_the_sandboxs_fault_leaves_the_completion_ungraded(monkeypatch):
    def fails(*_: object) -> sandbox.RunResult:
        raise sandbox.SandboxError("fork: Cannot allocate memory")

    monkeypatch.setattr(sandbox, "run", fails)
    assert code_io(inputs(ADD)) == [Score(0.0, ungraded="sandbox")]


# hostile programs: nothing scores that does not compute the answer ------------------------------------------

SECRET = [{"input": "1 2\n", "output": "expected-31337\n"}]
HOSTILE = {
    "looks for the answer in files": (
        "import os\nfor folder, _, files in os.walk('/'):\n    if folder.startswith(('/usr', '/lib', "
        "'/root', '/opt')):\n        continue\n"
        "    for name in files:\n        try:\n            text = open(os.path.join(folder, name), "
        "errors='ignore').read(1 << 20)\n"
        "        except OSError:\n            continue\n"
        "        if 'expected-' + '31337' in text:\n            print('expected-' + '31337')\n"
    ),
    "looks for the answer in its own memory": (
        "import gc, sys\nframe, seen = sys._getframe(), []\nwhile frame:\n    "
        "seen.append(str(frame.f_locals))\n    frame = frame.f_back\n"
        "seen += [str(one) for one in gc.get_objects() if isinstance(one, (str, dict, "
        "list))][:20000]\nwanted = 'expected-3133' + '7'\n"
        "print(wanted if any('output' in one and wanted in one for one in seen) else 0)\n"
    ),
    "exits early with status 0": "import os\nos._exit(0)\n",
    "exits while loading": "raise SystemExit(0)\n",
    "prints to the other descriptors": (
        "import os, json\nbody = json.dumps({'status': 0}).encode()\nfor fd in range(2, 64):\n    try:\n"
        "        os.write(fd, len(body).to_bytes(4, 'big') + body)\n    except OSError:\n        pass\n"
    ),
    "reads what it prints to": "import os\nprint(os.read(1, 100).decode())\n",
    "asks for more than there is": "input()\ninput()\nprint('expected-31337')\n",
    "writes its input": "import os\nos.pwrite(0, b'expected-31337', 0)\nprint(open(0).read())\n",
    "a syntax error": "print('expected-31337'\n",
    "takes all memory": "x = bytearray(1 << 40)\nprint('expected-31337')\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_not_score(name):
    assert passed(HOSTILE[name], SECRET) == 0.0


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass\n",
        "import time\ntime.sleep(600)\n",
        "import os, time\nos.write(1, b'3')\ntime.sleep(600)\n",
        "import os, time\nprint(3, flush=True)\nif os.fork():\n    time.sleep(600)\n",
        "import threading, time\nprint(3)\nthreading.Thread(target=time.sleep, args=(600,)).start()\n",
    ],
)
def test_an_endless_program_ends_at_its_limit_and_is_said_to(program):
    started = time.monotonic()
    assert code_io(inputs(program), seconds=0.4) == [Score(0.0, WRONG | {"timeout": 1.0})]
    assert 0.4 <= time.monotonic() - started < PATIENCE


def test_all_tests_together_have_a_limit_of_their_own():
    started = time.monotonic()
    tests = [{"input": "", "output": "3"}] * 50
    (score,) = code_io(
        inputs("import time\ntime.sleep(0.3)\nprint(3)\n", tests=tests),
        score="share",
        seconds=1.0,
        total_seconds=0.8,
    )
    # 2 whole ones fit, and a third that is cut; on a slow machine fewer
    assert score.parts["passed"] <= 3 / 50 and score.parts["timeout"] == 1.0
    assert time.monotonic() - started < PATIENCE


def test_output_without_end_is_cut_at_its_limit():
    started = time.monotonic()
    flood = "while True:\n    print('3' * 100000)\n"
    assert code_io(inputs(flood), output_mib=1) == [Score(0.0, WRONG)]
    assert time.monotonic() - started < PATIENCE


def test_a_daemon_neither_delays_nor_outlives_the_answer():
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n    os._exit(0)\n"
    started = time.monotonic()
    assert passed(daemon + ADD) == 1.0
    assert time.monotonic() - started < PATIENCE


def test_runs_do_not_see_one_another():
    # the second run of the same program starts from an empty folder
    counting = "import os\nopen('/tmp/x', 'x').close()\n" + ADD
    assert passed(counting) == 1.0


def test_a_completion_can_be_the_end_of_a_program():
    before = "import atexit\natexit.register(lambda: print(answer))\nanswer = "
    row = inputs("46", "47", "4x", tests=[{"input": "", "output": "46"}], before=before)
    assert [score.value for score in code_io(row)] == [1.0, 0.0, 0.0]


def test_the_pool_runs_them_and_refuses_tests_that_anything_passes_at_the_start():
    call = RewardCall("code_io", 1.0, {"max_tests": 2, "seconds": 0.5, "total_seconds": 1.0})
    with RewardPool([call], workers=2, seconds=10.0, memory_gib=2.0, deadline_seconds=120.0) as pool:
        pool.check(inputs("0"))
        groups = pool.score([inputs(ADD, "print(3)"), inputs("while True:\n    pass", ADD)])
        assert [[score.value for score in group] for group in groups] == [[1.0, 0.0], [0.0, 1.0]]
        assert pool.counts == {}
        with pytest.raises(
            ValueError, match=r"first sample \(tests\): code_io on '0': no test of the row expects any output"
        ):
            pool.check(inputs("0", tests=[{"input": "1", "output": ""}]))
