"""A calculator that the policy may ask: GSM8K's annotation as a tool call, and exact arithmetic behind it."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from rltrain.registry import method
from rltrain.rollout.environments import Step, Task

__all__ = ["Calculator", "evaluate"]

_CALL = re.compile(r"<<([^<>=]*)=(?:>>)?\s*\Z")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
}
_LONGEST = 200  # characters of an expression
_MOST_DIGITS = 60  # of any number on the way, numerator and denominator
_PLACES = 6  # decimals of a result that is no integer


@method("calculator")
class Calculator:
    """Answers a turn that ends with ``<<EXPRESSION=``, as in ``<<48/2=``, with the value; any other turn ends
    the episode with its answer.

    Knows + - * / // % and parentheses over decimal numbers, exactly; a value that is no integer is rounded to
    six decimals. What is no such expression is answered with ``error`` and the reason. The answer is graded
    by the recipe's reward functions, which read the last turn. Reports ``calls`` and ``failed_calls`` of the
    episode. No hyperparameters.
    """

    def __init__(self) -> None:
        self._calls, self._failed = 0, 0

    def reset(self, task: Task, seed: int) -> str | None:
        self._calls, self._failed = 0, 0
        return None

    def step(self, text: str) -> Step:
        call = _CALL.search(text)
        if call is None:
            return Step(done=True, parts=self._parts())
        self._calls += 1
        try:
            observation = evaluate(call[1])
        except ValueError as error:
            self._failed += 1
            observation = f"error: {error}"
        return Step(observation, parts=self._parts())

    def close(self) -> None:
        """Nothing is held."""

    def _parts(self) -> dict[str, float]:
        return {"calls": float(self._calls), "failed_calls": float(self._failed)}


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression, in digits.

    Raises ValueError with the reason where it has none.
    """
    if not expression.strip() or len(expression) > _LONGEST:
        raise ValueError(f"an expression has 1 to {_LONGEST} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError("not an expression") from error
    return _spelt(_value(tree.body, expression))


def _value(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return _bounded(_number(ast.get_source_segment(source.strip(), node) or ""))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            value = _value(node.operand, source)
            return -value if isinstance(node.op, ast.USub) else value
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            left, right = _value(node.left, source), _value(node.right, source)
            if right == 0 and not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
                raise ValueError("division by zero")
            return _bounded(_OPERATIONS[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / // % and parentheses")


def _number(digits: str) -> Fraction:
    """A decimal number as it is written: 0.1 is a tenth."""
    if not re.fullmatch(
        rf"\d{{1,{_MOST_DIGITS}}}(?:\.\d{{0,{_MOST_DIGITS}}})?|\.\d{{1,{_MOST_DIGITS}}}", digits
    ):
        raise ValueError("only decimal numbers")
    return Fraction(digits)


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**_MOST_DIGITS:
        raise ValueError(f"more than {_MOST_DIGITS} digits")
    return value


def _spelt(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**_PLACES)
    whole, rest = divmod(abs(scaled), 10**_PLACES)
    decimals = f"{rest:0{_PLACES}d}".rstrip("0")
    return ("-" if scaled < 0 else "") + (f"{whole}.{decimals}" if decimals else str(whole))
