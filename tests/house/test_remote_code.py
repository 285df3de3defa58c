"""Code that comes with a model is never run because a call forgot to say no."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADERS = ("from_pretrained", "from_config")  # methods of classes and of variables that hold classes
ENGINES = ("LLM", "EngineArgs", "AsyncEngineArgs")  # of vLLM
ARGUMENT = "trust_remote_code"


def sources() -> list[Path]:
    return sorted(
        path for folder in ("rltrain", "reward", "scripts") for path in (ROOT / folder).rglob("*.py")
    )


def silent_loads(text: str) -> list[int]:
    """Lines of calls that may run code from a model folder and do not pass ``trust_remote_code``.

    A concrete class of a library, such as ``Qwen2Tokenizer``, is its own code; ``Auto*`` and variables may be
    anything.
    """
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if may_run_code(call) and ARGUMENT not in {word.arg for word in call.keywords}
    ]


def may_run_code(call: ast.Call) -> bool:
    name, owner = called_name(call.func), owner_name(call.func)
    concrete = owner[:1].isupper() and not owner.startswith("Auto")
    return name in ENGINES or (name in LOADERS and not concrete)


def called_name(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def owner_name(func: ast.expr) -> str:
    """``AutoConfig`` of both ``AutoConfig.from_pretrained`` and
    ``transformers.AutoConfig.from_pretrained``.
    """
    return called_name(func.value) if isinstance(func, ast.Attribute) else ""


@pytest.mark.parametrize(
    ("text", "silent"),
    [
        ("AutoConfig.from_pretrained(path)", True),
        ("transformers.AutoTokenizer.from_pretrained(path)", True),
        ("kind.from_pretrained(path)", True),
        ("AutoModelForCausalLM.from_config(config)", True),
        ("vllm.LLM(path)", True),
        ("AutoConfig.from_pretrained(path, **options)", True),  # what options hold nobody sees here
        ("AutoConfig.from_pretrained(path, trust_remote_code=trusted)", False),
        ("Qwen2Tokenizer.from_pretrained(path)", False),
        ("GenerationConfig.from_pretrained(path)", False),
    ],
)
def test_the_rule_sees_a_call_that_does_not_say_whom_it_trusts(text: str, silent: bool):
    assert bool(silent_loads(text)) is silent


def test_every_call_that_may_run_code_of_a_model_says_whether_it_is_trusted():
    # left out, transformers asks on the terminal, and a "y" on stdin runs whatever the folder holds
    readers = {
        str(path.relative_to(ROOT)): silent_loads(path.read_text(encoding="utf-8")) for path in sources()
    }
    assert not {path: lines for path, lines in readers.items() if lines}


def test_the_data_set_library_has_no_loading_scripts():
    # load_dataset takes no trust_remote_code since version 4, which runs no code of a data set at all
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floor = next(line for line in project.splitlines() if '"datasets>=' in line)
    assert int(floor.split(">=")[1].split(".")[0]) >= 4
