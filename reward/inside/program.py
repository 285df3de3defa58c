"""A program under test: load it, then answer calls to its functions until its tests hang up.

Nothing here is trusted or secret: the program shares this process and may read, replace or end all of it. It
learns the arguments of the calls, as any tested function does, and never what is expected of them.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from reward.inside.wire import Hangup, NotPlain, packed, receive, send, unpacked


def serve(channel: socket.socket, source: str, limit: int) -> None:
    """``limit``: bytes of one message. What is asked is ["call", name, positional, named], ["value", name] or
    ["kinds", names]; the reply [result, arguments of a call where they changed, error]."""
    module = type(sys)("program")
    sys.modules["program"] = module
    problem = _loaded(source, vars(module))
    while True:
        try:
            question = receive(channel, limit)
        except Hangup:
            return
        reply = [None, None, problem] if problem else _answer(vars(module), *question)
        try:
            send(channel, reply, limit)
        except (NotPlain, ValueError, RecursionError, MemoryError) as error:
            send(channel, [None, None, ["NotPlain", str(error)[:200]]], limit)


def _answer(namespace: dict[str, Any], what: str, name: Any, *arguments: Any) -> list[Any]:
    if what == "kinds":
        return [[_kind(namespace, one) for one in name], None, None]
    if what == "value":
        return _called({"value": lambda: namespace[name]}, "value", [], {"d": []})
    return _called(namespace, name, *arguments)


def _kind(namespace: dict[str, Any], name: str) -> str:
    if name not in namespace:
        return "missing"
    return "function" if callable(namespace[name]) else "value"


def _loaded(source: str, namespace: dict[str, Any]) -> list[str] | None:
    """What stops the program from loading, as [type, message]."""
    try:
        exec(compile(source, "program", "exec", dont_inherit=True), namespace)
    except BaseException as error:  # the program's own code: what it raises, SystemExit too, is its answer
        return [type(error).__name__, _text(error)]
    return None


def _called(namespace: dict[str, Any], name: str, positional: Any, named: Any) -> list[Any]:
    try:
        arguments, keywords = unpacked(positional), unpacked(named)
        if name not in namespace:
            raise NameError(f"name {name!r} is not defined")
        result = packed(namespace[name](*arguments, **keywords))
        after = packed(arguments)
        return [result, after if after != positional else None, None]
    except NotPlain as error:
        return [None, None, ["NotPlain", str(error)]]
    except BaseException as error:  # as in _loaded: a call that exits must not end the loop of answers
        return [None, None, [_builtin_name(error), _text(error)]]


def _builtin_name(error: BaseException) -> str:
    """The error's own type, or the nearest ancestor that the tests know as well."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # __str__ is the program's own as well
        return ""
