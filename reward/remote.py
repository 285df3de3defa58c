"""A JSON question to a server, with a deadline: an answer or the reason why there is none. Standard library
only.

Redirects are not followed and proxies not used, so that a token goes to the host that the recipe names and to
no other.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from reward.redact import repeats

_LARGEST_ANSWER = 1 << 24  # bytes
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 4.0  # seconds between attempts; doubles
_WITHHELD = "(not quoted: it repeats the token, or is too long to tell)"
_HEADER_TOKEN = re.compile(r"[!-~]+")
_ANSWER = TypeVar("_ANSWER")


class RemoteError(Exception):
    """``reason`` is a word for Score.ungraded: "unreachable", "timeout", "refused" (4xx),
    "server_error" (5xx) or "malformed".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def passing(self) -> bool:
        """Whether another attempt may go better."""
        return self.reason in ("unreachable", "server_error")


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    The token is read from the environment, kept out of messages and of this object's text.
    """

    scheme: str
    host: str
    port: int | None
    path: str
    seconds: float  # from the first attempt to the whole answer
    token: str | None = field(repr=False)


def endpoint(url: str, token_env: str | None, seconds: float, name: str) -> Endpoint:
    """Raises ValueError on what is no http(s) URL, and where the variable ``token_env`` is not set.
    name: of the reward, for messages.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name}: url must be like http://host:8000/path, got {_without_password(parts)!r}")
    if parts.username or parts.password:
        raise ValueError(
            f"{name}: the url holds a password; put the token into an environment variable and name that in "
            "token_env"
        )
    token = None
    if token_env is not None:
        token = os.environ.get(token_env, "").strip()
        if not token:
            raise ValueError(
                f"{name}: the environment variable {token_env} (token_env) is not set; export it, or leave "
                "token_env out"
            )
        if not _HEADER_TOKEN.fullmatch(token):
            raise ValueError(
                f"{name}: the environment variable {token_env} (token_env) holds characters that no HTTP "
                "header can, such as spaces, "
                "line breaks or letters outside ASCII; export the bare token"
            )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Endpoint(parts.scheme, parts.hostname, parts.port, path, seconds, token)


def ask(place: Endpoint, question: Any, read: Callable[[Any], _ANSWER]) -> _ANSWER:
    """``read`` of the JSON that comes back. Raises RemoteError; ``read`` raises ValueError on an answer it
    cannot use.

    What may pass (no connection, 429, 5xx) is tried again until ``place.seconds`` are over.
    """
    deadline, pause = time.monotonic() + place.seconds, _FIRST_PAUSE
    body = json.dumps(question).encode("utf-8")
    while True:
        try:
            return _read(place, _attempt(place, body, deadline), read)
        except RemoteError as error:
            if not error.passing or time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def ask_all(
    place: Endpoint, questions: Sequence[Any], read: Callable[[Any], _ANSWER], concurrency: int
) -> list[_ANSWER | RemoteError]:
    """An answer or the reason for none, in the order of the questions, ``concurrency`` of them at a time."""

    def one(question: Any) -> _ANSWER | RemoteError:
        try:
            return ask(place, question, read)
        except RemoteError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(max_workers=concurrency) as threads:
        return list(threads.map(one, questions))


def _attempt(place: Endpoint, body: bytes, deadline: float) -> bytes:
    """A socket's own limit starts anew with every byte: at the deadline the connection is cut,
    however slowly an answer drips in.
    """
    connect = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = connect(place.host, place.port, timeout=max(deadline - time.monotonic(), 0.001))
    cut: threading.Timer | None = None
    try:
        connection.connect()
        cut = threading.Timer(max(deadline - time.monotonic(), 0.0), _cut, [connection.sock])
        cut.daemon = True
        cut.start()
        answer = _exchange(connection, place, body)
        if time.monotonic() >= deadline:
            raise TimeoutError("cut")  # what was read may be a part
        return answer
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline or isinstance(error, TimeoutError):
            raise RemoteError(
                "timeout", f"{place.host}: no whole answer within {place.seconds:g} s"
            ) from error
        said = _shown(place, str(error))
        raise RemoteError(
            "unreachable", f"{place.host}:{place.port}: {type(error).__name__}: {said}"
        ) from None
    finally:
        if cut is not None:
            cut.cancel()
        connection.close()


def _exchange(connection: http.client.HTTPConnection, place: Endpoint, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if place.token is not None:
        headers["Authorization"] = f"Bearer {place.token}"
    connection.request("POST", place.path, body, headers)
    response = connection.getresponse()
    answer = response.read(_LARGEST_ANSWER + 1)
    if response.status == 200:
        if len(answer) > _LARGEST_ANSWER:
            raise RemoteError("malformed", f"{place.host}: an answer of more than {_LARGEST_ANSWER} bytes")
        return answer
    said = _shown(place, answer.decode("utf-8", errors="replace"))
    reason = "server_error" if response.status >= 500 or response.status == 429 else "refused"
    raise RemoteError(reason, f"{place.host}{place.path} answered {response.status}: {said}")


def _read(place: Endpoint, answer: bytes, read: Callable[[Any], _ANSWER]) -> _ANSWER:
    try:
        return read(json.loads(answer))
    except (ValueError, RecursionError) as error:
        said = f"{error}; it begins with {answer[:120]!r}"
        if place.token is not None and repeats(answer.decode("utf-8", errors="replace"), place.token):
            said = _WITHHELD  # the error may show a part of the token that is too short to be found
        raise RemoteError("malformed", f"not the answer expected: {said}") from None


def _shown(place: Endpoint, text: str) -> str:
    """The beginning of what a server said.

    The token is replaced where it stands as it is, and nothing is quoted where it is encoded.
    """
    if place.token is None:
        return text[:300]
    text = text.replace(place.token, "***")
    return _WITHHELD if repeats(text, place.token) else text[:300]


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


def _without_password(parts: urllib.parse.SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
