"""A calculator for the policy, called with GSM8K's annotation and computing with exact arithmetic."""

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
_MAX_CHARACTERS = 200  # of an expression
_MAX_DIGITS = 60  # of any intermediate number, in numerator and denominator
_DECIMALS = 6  # of a result that is not an integer


@method("calculator")
class Calculator:
    """Answers a turn that ends with ``<<EXPRESSION=``, as in ``<<48/2=``, with the value; any other turn ends
    the episode and contains the policy's answer.

    Computes + - * / // % and parentheses over decimal numbers exactly; a value that is not an integer is
    rounded to six decimals. Any other expression is answered with ``error`` and the reason. The recipe's
    reward functions grade the last turn. Reports ``calls`` and ``failed_calls`` of the episode. No
    hyperparameters.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._failed = 0

    def reset(self, task: Task, seed: int) -> str | None:
        self._calls = 0
        self._failed = 0
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
        """The calculator has no resources to release."""

    def _parts(self) -> dict[str, float]:
        return {"calls": float(self._calls), "failed_calls": float(self._failed)}


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression, as a decimal number. Raises ValueError with the reason if it has
    no value.
    """
    if not expression.strip() or len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"an expression has 1 to {_MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError("not an expression") from error
    return _format_number(_value(tree.body, expression))


def _value(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return _check_size(_parse_decimal(ast.get_source_segment(source.strip(), node) or ""))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            value = _value(node.operand, source)
            return -value if isinstance(node.op, ast.USub) else value
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            left = _value(node.left, source)
            right = _value(node.right, source)
            if right == 0 and not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
                raise ValueError("division by zero")
            return _check_size(_OPERATIONS[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / // % and parentheses")


def _parse_decimal(digits: str) -> Fraction:
    """The exact value of a decimal number: 0.1 is a tenth."""
    if not re.fullmatch(
        rf"\d{{1,{_MAX_DIGITS}}}(?:\.\d{{0,{_MAX_DIGITS}}})?|\.\d{{1,{_MAX_DIGITS}}}", digits
    ):
        raise ValueError("only decimal numbers")
    return Fraction(digits)


def _check_size(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**_MAX_DIGITS:
        raise ValueError(f"more than {_MAX_DIGITS} digits")
    return value


def _format_number(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**_DECIMALS)
    integer, remainder = divmod(abs(scaled), 10**_DECIMALS)
    decimals = f"{remainder:0{_DECIMALS}d}".rstrip("0")
    return ("-" if scaled < 0 else "") + (f"{integer}.{decimals}" if decimals else str(integer))
