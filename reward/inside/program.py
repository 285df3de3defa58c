"""Loads a program under test, then answers calls to its functions until its tests hang up.

Nothing here is trusted or secret: the program shares this process and may read, replace or end all of it. It
learns the arguments of the calls, as any tested function does, but never the expected results.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from rltrain.reward.inside.wire import Hangup, NotPlain, pack, receive_message, send_message, unpack


def serve(channel: socket.socket, source: str, limit: int) -> None:
    """Answers questions until the tests hang up. ``limit``: bytes of one message.

    A question is ["call", name, positional, named], ["value", name] or ["kinds", names]; a reply is [result,
    arguments of a call if they changed, error].
    """
    module = type(sys)("program")
    sys.modules["program"] = module
    problem = _load_program(source, vars(module))
    while True:
        try:
            question = receive_message(channel, limit)
        except Hangup:
            return
        reply = [None, None, problem] if problem else _answer(vars(module), *question)
        try:
            send_message(channel, reply, limit)
        except (NotPlain, ValueError, RecursionError, MemoryError) as error:
            send_message(channel, [None, None, ["NotPlain", str(error)[:200]]], limit)


def _answer(namespace: dict[str, Any], request: str, name: Any, *arguments: Any) -> list[Any]:
    if request == "kinds":
        return [[_kind_of_name(namespace, item) for item in name], None, None]
    if request == "value":
        return _call_function({"value": lambda: namespace[name]}, "value", [], {"d": []})
    return _call_function(namespace, name, *arguments)


def _kind_of_name(namespace: dict[str, Any], name: str) -> str:
    if name not in namespace:
        return "missing"
    return "function" if callable(namespace[name]) else "value"


def _load_program(source: str, namespace: dict[str, Any]) -> list[str] | None:
    """Loads the program; the error that stops it, as [type, message], or None."""
    try:
        exec(compile(source, "program", "exec", dont_inherit=True), namespace)
    except BaseException as error:  # whatever the program raises, SystemExit too, is its answer
        return [type(error).__name__, _error_text(error)]
    return None


def _call_function(namespace: dict[str, Any], name: str, positional: Any, named: Any) -> list[Any]:
    try:
        arguments = unpack(positional)
        keywords = unpack(named)
        if name not in namespace:
            raise NameError(f"name {name!r} is not defined")
        result = pack(namespace[name](*arguments, **keywords))
        after = pack(arguments)
        return [result, after if after != positional else None, None]
    except NotPlain as error:
        return [None, None, ["NotPlain", str(error)]]
    except BaseException as error:  # a call that exits must not end the loop of answers
        return [None, None, [_builtin_name(error), _error_text(error)]]


def _builtin_name(error: BaseException) -> str:
    """The name of the error's type, or of its nearest built-in ancestor, which the tests know too."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _error_text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # __str__ may be the program's own
        return ""
