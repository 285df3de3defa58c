"""No hostile program escapes, scores, or exceeds its limit; and no process of a sandbox outlives it."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rltrain.reward import sandbox
from rltrain.reward.sandbox import Limits, SandboxError, Tests, TestsError, Verdict, choose_kind, judge
from support.patience import PATIENCE

ROOT = Path(__file__).parents[2]
LIMITS = Limits(seconds=2.0, memory_mib=256, processes=4, file_mib=4, message_mib=2)
SHORT = dataclasses.replace(LIMITS, seconds=0.5)
TWICE = "def twice(x):\n    return 2 * x\n"
# The second test would pass a program that ends its loop early and then answers anything, if the comparison
# at the end did not count.
TESTS = Tests(
    (
        "assert twice(21) == 42",
        "def check(candidate):\n    for x, y in zip((1, 2), map(candidate, (1, 2))):\n        assert y == 2 "
        "* x",
    ),
    "",
    "twice",
)
HOSTILE = re.findall(
    r"^=== (\w+): (.+)\n((?:(?!===).*\n)*)",
    Path(__file__).with_name("hostile.txt").read_text(encoding="utf-8"),
    re.MULTILINE,
)
FORMER = [program for program in HOSTILE if program[0] != "endless"]
ENDLESS = [program for program in HOSTILE if program[0] == "endless"]

try:
    KIND = choose_kind(False)
except ValueError as error:  # the machine allows no sandbox: the project refuses to run code there
    pytest.skip(reason=f"no sandbox here to run programs in: {error}", allow_module_level=True)


@dataclass(frozen=True)
class Outside:
    """What a program must not reach."""

    canary: Path
    port: int
    abstract: str
    bystander: subprocess.Popen[bytes]
    visitors: list[str]

    def written_into(self, source: str) -> str:
        names = {
            "CANARY": str(self.canary),
            "FOLDER": str(Path(__file__).parent),
            "PORT": self.port,
            "ABSTRACT": self.abstract,
        }
        for name, value in {**names, "BYSTANDER": self.bystander.pid}.items():
            source = re.sub(rf"\b{name}\b", lambda _, value=value: repr(value), source)
        return source

    def is_untouched(self) -> bool:
        no_new_files = [path.name for path in self.canary.parent.iterdir()] == [self.canary.name]
        kept = self.canary.read_text() == "canary" and self.canary.stat().st_mode & 0o777 == 0o666
        return no_new_files and kept and self.bystander.poll() is None and not self.visitors


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """A file that anybody may write, a process, and two servers, with a secret in the environment of all."""
    folder = tmp_path_factory.mktemp("outside")
    canary = folder / "canary"
    canary.write_text("canary")
    for path, mode in ((canary, 0o666), (folder, 0o777)):
        path.chmod(mode)
    abstract = f"\0rltrain-{os.getpid()}"
    visitors: list[str] = []
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    servers[1].bind(abstract)
    servers[1].listen()
    for server in servers:
        threading.Thread(target=watch, args=(server, visitors), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", "SECRET")
        sandbox.FORK_SERVER.close()  # the next one starts with the secret in its environment
        bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        yield Outside(canary, servers[0].getsockname()[1], abstract, bystander, visitors)
    bystander.kill()
    bystander.wait()
    for server in servers:
        server.close()


def watch(server: socket.socket, visitors: list[str]) -> None:
    while True:
        try:
            server.accept()
        except OSError:
            return
        visitors.append(str(server.family))


def sandboxed_processes() -> list[int]:
    """Our processes in a process namespace below this one, whatever their parent is now: they have a number
    in each of the two namespaces.
    """
    processes: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            numbers = re.search(r"^NSpid:(.*)$", (folder / "status").read_text(), re.MULTILINE)
            ours = b"rltrain.reward.inside.start" in (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ours and numbers is not None and len(numbers[1].split()) > 1:
            processes.append(int(folder.name))
    return processes


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(sandboxed_processes())
    yield
    # files beside this one have sandboxes of their own, which end by themselves; what is left stays
    left = set(sandboxed_processes()) - before
    assert becomes_true(lambda: not left & set(sandboxed_processes()))


def test_a_right_program_passes_and_a_wrong_one_does_not():
    assert judge(TWICE, TESTS, LIMITS, KIND) == Verdict((True, True), "done")
    assert judge(TWICE, TESTS, SHORT, KIND) == Verdict((True, True), "done")
    assert judge("def twice(x):\n    return 42\n", TESTS, LIMITS, KIND) == Verdict((True, False), "done")


def test_there_are_enough_hostile_programs():
    assert len(HOSTILE) >= 94
    assert len({(kind, name) for kind, name, _ in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize(
    "source", [pytest.param(source, id=f"{kind}: {name}") for kind, name, source in FORMER]
)
def test_a_hostile_program_neither_escapes_nor_scores(source: str, outside: Outside):
    started = time.monotonic()
    verdict = judge(outside.written_into(source), TESTS, LIMITS, KIND)
    assert verdict.passed == (False, False), verdict
    assert time.monotonic() - started < PATIENCE
    assert outside.is_untouched()


@pytest.mark.parametrize("source", [pytest.param(source, id=name) for _, name, source in ENDLESS])
def test_an_endless_program_ends_at_its_limit(source: str, outside: Outside):
    started = time.monotonic()
    assert judge(outside.written_into(source), TESTS, SHORT, KIND) == Verdict((False, False), "timeout")
    assert SHORT.seconds <= time.monotonic() - started < PATIENCE
    assert outside.is_untouched()


def test_a_right_program_scores_but_its_daemon_does_not_outlive_it():
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        "
        "time.sleep(600)\n    os._exit(0)\n"
    )
    assert judge(daemon + TWICE, TESTS, LIMITS, KIND).passed == (True, True)  # nothing_is_left looks for it


def test_the_hostile_programs_would_succeed_outside(outside: Outside, tmp_path: Path):
    # Otherwise their failure in the sandbox proves nothing: a few that need no privilege run without a
    # sandbox.
    for name in (
        "a file outside",
        "a server on this machine",
        "an abstract socket",
        "the environment",
        "other processes",
        "memory by memfd",
        "a lock on a file that all see",
        "a shared lock on a device",
        "a read lock on part of a file",
        "a lock of the open file",
        "a look at others' locks",
        "notice of what others read",
        "a hint kept with a file",
        "a watch on a folder",
    ):
        source = next(source for kind, title, source in HOSTILE if title == name and kind != "touching")
        code = outside.written_into(source) + "\nassert twice(21) == 42\n"
        assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0, name
    deadline = time.monotonic() + PATIENCE
    while len(outside.visitors) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(outside.visitors) == sorted([str(socket.AF_INET), str(socket.AF_UNIX)])
    outside.visitors.clear()


def passes(
    program: str, *tests: str, before: str = "", entry: str | None = None, limits: Limits = LIMITS
) -> tuple[bool, ...]:
    return judge(program, Tests(tests, before, entry), limits, KIND).passed


def test_values_keep_their_types_across_the_wall():
    program = "def same(x):\n    return x\n"
    values = (
        "(1, [2.5, -0.0], {'a': {1, 2}, (3,): None}, frozenset({b'x'}), bytearray(b'y'), 1+2j, True, 2**80, "
        "-2**70, '\\ud800\\x00', "
        "float('inf'))"
    )
    assert passes(
        program, f"x = {values}\ny = same(x)\nassert x == y and repr(x) == repr(y) and type(y[1]) is list"
    )
    assert passes(
        program,
        "import math\nassert math.isnan(same(float('nan')))",
        "assert type(same(True)) is bool and type(same(1)) is int",
    ) == (True, True)


def test_what_a_program_makes_of_its_arguments_and_its_errors_reach_the_tests():
    program = (
        "def sort(x, *, reverse=False):\n    x.sort(reverse=reverse)\n"
        "def fail():\n    class Mine(ValueError):\n        pass\n    raise Mine('no')\n"
        "def count(n):\n    yield from range(n)\n"
        "from collections import Counter, namedtuple\n"
        "def letters(text):\n    return Counter(text)\n"
    )
    assert passes(
        program,
        "x = [2, 3, 1]\nassert sort(x) is None and x == [1, 2, 3]\nsort(x, reverse=True)\nassert x == [3, 2, "
        "1]",
        "try:\n    fail()\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert "
        "False",
        "assert list(count(3)) == [0, 1, 2]",
        "assert letters('aab') == {'a': 2, 'b': 1}",
        "assert missing(1) == 1",
    ) == (True, True, True, True, False)


def test_helpers_in_front_of_the_program_are_the_tests_own():
    # the program replaces the helper; the tests go on with theirs
    assert passes(
        "def helper(x):\n    return 0\ndef f(x):\n    return 0\n",
        "assert f(1) == helper(1)",
        before="def helper(x):\n    return 7\n",
    ) == (False,)


def test_the_row_is_to_blame_for_tests_that_are_no_python_or_pass_functions():
    for tests, said in (("assert (", "not valid Python"), ("assert f(lambda: 0) == 1", "not plain data")):
        with pytest.raises(TestsError, match=said):
            passes("def f(x):\n    return 1\n", tests)
    # but not for values that are the program's own doing
    assert passes("def f(x):\n    return 'a' * 1_900_000\n", "assert f(f(1) * 2) == 1") == (False,)


def test_a_program_under_its_limits_may_use_what_they_allow():
    program = (
        "import subprocess, sys, threading, os\n"
        "def f():\n"
        "    open('/tmp/x', 'wb').write(b'1' * 3_000_000)\n"
        "    thread = threading.Thread(target=lambda: None)\n    thread.start()\n    thread.join()\n"
        "    child = os.fork()\n    if child == 0:\n        os._exit(3)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.path.getsize('/tmp/x'), "
        "len(bytearray(1 << 27))\n"
    )
    assert passes(program, "assert f() == (3, 3_000_000, 1 << 27)") == (True,)


def test_a_program_may_do_to_its_own_descriptors_what_harms_nobody():
    program = (
        "import fcntl, os, sqlite3\n"
        "def f():\n"
        "    read, write = os.pipe()\n"
        "    fcntl.fcntl(read, fcntl.F_SETFL, fcntl.fcntl(read, fcntl.F_GETFL) | os.O_NONBLOCK)\n"
        "    fcntl.fcntl(write, fcntl.F_SETFD, fcntl.fcntl(write, fcntl.F_GETFD) | fcntl.FD_CLOEXEC)\n"
        "    os.write(fcntl.fcntl(write, fcntl.F_DUPFD_CLOEXEC, 10), b'a')\n"
        "    with sqlite3.connect(':memory:') as database:\n"
        "        return os.read(read, 9), database.execute('select 1 + 1').fetchone()[0]\n"
    )
    assert passes(program, "assert f() == (b'a', 2)") == (True,)


def test_runs_do_not_see_one_another():
    assert passes("def f():\n    open('/tmp/x', 'x').close()\n", "f()") == (True,)
    assert passes("def f():\n    open('/tmp/x', 'x').close()\n", "f()") == (True,)


def test_sets_iterate_and_tests_draw_alike_in_every_run():
    program = "def f():\n    return list({'a', 'b', 'c', 'd', 'e'})\n"
    orders = {
        judge(
            program,
            Tests((f"import random\nassert random.random() < 0.85 and f()[0] == {letter!r}",), "", None),
            LIMITS,
            KIND,
        ).passed
        for letter in "aaa"
    }
    assert len(orders) == 1


# the machine ------------------------------------------------------------------------------------------------


def test_a_machine_without_a_sandbox_refuses_unless_told_in_as_many_words(monkeypatch: pytest.MonkeyPatch):
    sandbox._best_kind.cache_clear()
    monkeypatch.setattr(sandbox, "try_kind", lambda kind: "unshare: Operation not permitted")
    with pytest.raises(ValueError, match=r"cannot be run safely.*Operation not permitted.*unsandboxed: true"):
        choose_kind(False)
    assert choose_kind(True) == "none"
    monkeypatch.undo()
    # A failure is not cached, and the permission of the recipe is not used if it is not needed.
    assert choose_kind(True) == KIND


def test_without_a_sandbox_the_limits_and_the_verdict_hold_still():
    assert judge(TWICE, TESTS, LIMITS, "none").passed == (True, True)
    assert judge("import os\nos._exit(0)", TESTS, LIMITS, "none").passed == (False, False)
    assert judge("x = bytearray(1 << 30)\n" + TWICE, TESTS, LIMITS, "none").passed == (False, False)
    assert judge("while True:\n    pass", TESTS, SHORT, "none").ended == "timeout"
    assert (
        sandbox.try_kind("none")
        == "started, but a program in it sees other processes or can write outside its folder"
    )


def test_a_sandbox_that_cannot_be_had_says_why():
    with pytest.raises(SandboxError, match=r"No such file|Permission"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_visible_paths", lambda paths: (["/no/such/folder"], {}))
        patch.setattr(sandbox, "_bubblewrap_command", lambda job: ["/no/such/bwrap"])
        judge(TWICE, TESTS, LIMITS, KIND)


def test_the_process_that_starts_sandboxes_is_replaced_when_it_dies():
    judge(TWICE, TESTS, LIMITS, KIND)
    process = sandbox.FORK_SERVER._process
    assert process is not None
    process.kill()
    process.wait()
    assert judge(TWICE, TESTS, LIMITS, KIND).passed == (True, True)


def test_nothing_lives_on_when_the_grader_is_killed():
    code = (
        "from rltrain.reward.sandbox import Limits, Tests, choose_kind, judge\n"
        "print('now', flush=True)\n"
        "judge('import time\\nprint(1)\\ntime.sleep(600)', Tests(('f()',), '', None), Limits(60.0, 256, 2, "
        "1, 1), choose_kind(False))\n"
    )
    before = set(sandboxed_processes())
    grader = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert becomes_true(
        lambda: len(set(sandboxed_processes()) - before) >= 4
    )  # two inits and two sandboxed processes
    grader.kill()
    grader.communicate()
    left = set(sandboxed_processes()) - before
    assert becomes_true(lambda: not left & set(sandboxed_processes()))


def becomes_true(condition: Callable[[], bool]) -> bool:
    """Whether the condition becomes true within 20 s."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


OTHERS = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from rltrain.reward.sandbox import *; from rltrain.reward import sandbox; "
)
TRIAL = "print(sandbox.candidates(), [sandbox.try_kind(kind) for kind in sandbox.candidates()])"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_has_a_sandbox_too():
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if (
        python is None
        or subprocess.run([python, "-c", "import sys; assert sys.version_info >= (3, 11)"]).returncode != 0
    ):
        pytest.skip(reason="there is no Python 3.11 that everybody may run")
    if not all(path.stat().st_mode & 0o005 == 0o005 for path in (ROOT, *ROOT.parents)):
        pytest.skip(reason=f"not everybody may read {ROOT}")
    result = subprocess.run(
        [python, "-B", "-c", OTHERS + TRIAL, str(ROOT)],
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() in ("['user'] [None]", "['user', 'bubblewrap'] [None, None]"), (
        result.stdout,
        result.stderr,
    )
