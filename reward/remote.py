"""Asks a server a JSON question with a deadline, for an answer or the reason why there is none. Standard
library only.

It follows no redirects and uses no proxies, so that a token goes only to the host that the recipe names.
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

from rltrain.reward.redact import repeats_secret

_LARGEST_ANSWER = 1 << 24  # bytes
_FIRST_PAUSE = 0.25  # seconds between attempts; doubles
_LONGEST_PAUSE = 4.0
_WITHHELD = "(not quoted: it repeats the token, or is too long to tell)"
_HEADER_TOKEN = re.compile(r"[!-~]+")
_ANSWER = TypeVar("_ANSWER")


class RemoteError(Exception):
    """``reason`` is a value for Score.ungraded: "unreachable", "timeout", "refused" (4xx), "server_error"
    (5xx) or "malformed".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def is_transient(self) -> bool:
        """Whether another attempt may succeed."""
        return self.reason in ("unreachable", "server_error")


@dataclass(frozen=True)
class Endpoint:
    """A server's address, deadline and token.

    The token comes from the environment; no message and no ``repr`` shows it.
    """

    scheme: str
    host: str
    port: int | None
    path: str
    seconds: float  # from the first attempt to the complete answer
    token: str | None = field(repr=False)


def make_endpoint(url: str, token_env: str | None, seconds: float, name: str) -> Endpoint:
    """Raises ValueError if ``url`` is not an http(s) URL or the variable ``token_env`` is not set.

    name: the reward's name, for messages.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{name}: url must be like http://host:8000/path, got {_url_without_password(parts)!r}"
        )
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
                "header can contain, such as spaces, line breaks or letters outside ASCII; "
                "export the token alone"
            )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Endpoint(parts.scheme, parts.hostname, parts.port, path, seconds, token)


def ask(endpoint: Endpoint, question: Any, read: Callable[[Any], _ANSWER]) -> _ANSWER:
    """The server's JSON answer, converted by ``read``, which raises ValueError on an answer that it cannot
    use.

    Transient errors (no connection, 429, 5xx) are retried until ``endpoint.seconds`` are over. Raises
    RemoteError.
    """
    deadline = time.monotonic() + endpoint.seconds
    pause = _FIRST_PAUSE
    body = json.dumps(question).encode("utf-8")
    while True:
        try:
            return _read(endpoint, _attempt(endpoint, body, deadline), read)
        except RemoteError as error:
            if not error.is_transient or time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def ask_all(
    endpoint: Endpoint, questions: Sequence[Any], read: Callable[[Any], _ANSWER], concurrency: int
) -> list[_ANSWER | RemoteError]:
    """An answer or an error per question, in their order; asks ``concurrency`` questions at a time."""

    def ask_or_error(question: Any) -> _ANSWER | RemoteError:
        try:
            return ask(endpoint, question, read)
        except RemoteError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(max_workers=concurrency) as threads:
        return list(threads.map(ask_or_error, questions))


def _attempt(endpoint: Endpoint, body: bytes, deadline: float) -> bytes:
    """One request. A timer shuts the connection down at the deadline, because a socket's own time limit
    restarts with every byte of a slow answer.
    """
    connect = http.client.HTTPSConnection if endpoint.scheme == "https" else http.client.HTTPConnection
    connection = connect(endpoint.host, endpoint.port, timeout=max(deadline - time.monotonic(), 0.001))
    timer: threading.Timer | None = None
    try:
        connection.connect()
        timer = threading.Timer(max(deadline - time.monotonic(), 0.0), _shut_down, [connection.sock])
        timer.daemon = True
        timer.start()
        answer = _exchange(connection, endpoint, body)
        if time.monotonic() >= deadline:
            raise TimeoutError("cut")  # the answer may be incomplete
        return answer
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline or isinstance(error, TimeoutError):
            raise RemoteError(
                "timeout", f"{endpoint.host}: no complete answer within {endpoint.seconds:g} s"
            ) from error
        quotation = _quote(endpoint, str(error))
        raise RemoteError(
            "unreachable", f"{endpoint.host}:{endpoint.port}: {type(error).__name__}: {quotation}"
        ) from None
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()


def _exchange(connection: http.client.HTTPConnection, endpoint: Endpoint, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if endpoint.token is not None:
        headers["Authorization"] = f"Bearer {endpoint.token}"
    connection.request("POST", endpoint.path, body, headers)
    response = connection.getresponse()
    answer = response.read(_LARGEST_ANSWER + 1)
    if response.status == 200:
        if len(answer) > _LARGEST_ANSWER:
            raise RemoteError("malformed", f"{endpoint.host}: an answer of more than {_LARGEST_ANSWER} bytes")
        return answer
    quotation = _quote(endpoint, answer.decode("utf-8", errors="replace"))
    reason = "server_error" if response.status >= 500 or response.status == 429 else "refused"
    raise RemoteError(reason, f"{endpoint.host}{endpoint.path} answered {response.status}: {quotation}")


def _read(endpoint: Endpoint, answer: bytes, read: Callable[[Any], _ANSWER]) -> _ANSWER:
    try:
        return read(json.loads(answer))
    except (ValueError, RecursionError) as error:
        quotation = f"{error}; it begins with {answer[:120]!r}"
        if endpoint.token is not None and repeats_secret(
            answer.decode("utf-8", errors="replace"), endpoint.token
        ):
            quotation = _WITHHELD  # the error may show a part of the token that is too short to be detected
        raise RemoteError("malformed", f"not the expected answer: {quotation}") from None


def _quote(endpoint: Endpoint, text: str) -> str:
    """The beginning of a server's text: with the token replaced, or withheld if the text contains it
    encoded."""
    if endpoint.token is None:
        return text[:300]
    text = text.replace(endpoint.token, "***")
    return _WITHHELD if repeats_secret(text, endpoint.token) else text[:300]


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the connection may have ended already
        connection.shutdown(socket.SHUT_RDWR)


def _url_without_password(parts: urllib.parse.SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
