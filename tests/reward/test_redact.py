"""A server that repeats the token it was sent, in whatever form, finds it in no message."""

from __future__ import annotations

import base64
import html
import json
import re
import urllib.parse
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.reward import remote
from rltrain.reward.judge import llm_judge, llm_judge_pairs, reply_text
from rltrain.reward.redact import repeats_secret
from rltrain.reward.reward_model_http import reward_model_http
from tests.reward.test_judge import inputs, reply, server  # noqa: F401  a fixture

TOKEN = 'sk-"abc/+=&<%>\\d~efGHij'
OTHER = (
    "no model of that name; the key is valid for sk-other and for 0123456789abcdef, see "
    "https://host/a%20b?c=d&amp;e"
)


def b64(text: str, before: str = "", altchars: bytes | None = None) -> str:
    return base64.b64encode((before + text).encode(), altchars).decode()


ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "header": lambda token: f"Authorization: Bearer {token}",
    "percent": lambda token: urllib.parse.quote(token, safe=""),
    "every byte percent": lambda token: "".join(f"%{ord(letter):02x}" for letter in token),
    "percent twice": lambda token: urllib.parse.quote(urllib.parse.quote(token, safe=""), safe=""),
    "form": lambda token: urllib.parse.urlencode({"token": token}),
    "json": json.dumps,
    "json in json": lambda token: json.dumps(json.dumps({"token": token})),
    "json escapes": lambda token: "".join(f"\\u{ord(letter):04X}" for letter in token),
    "python": lambda token: repr(token.encode()),
    "html": lambda token: html.escape(token),
    "html numbers": lambda token: "".join(f"&#{ord(letter)};" for letter in token),
    "base64": b64,
    "base64 of the header": lambda token: b64(token, "Bearer "),
    "basic": lambda token: b64(token, "user:"),
    "base64 at another offset": lambda token: b64(token, "u:"),
    "base64 without padding": lambda token: b64(token).rstrip("="),
    "base64 of the url": lambda token: b64(token, altchars=b"-_"),
    "base64 in lines": lambda token: re.sub(r"(.{9})", r"\1\r\n", b64(token)),
    "base64 behind a word": lambda token: "token" + b64(token),
    "base64 in json, its slashes escaped": lambda token: json.dumps(b64(token)).replace("/", "\\/"),
    "hexadecimal": lambda token: token.encode().hex(),
    "hexadecimal behind a digit": lambda token: "0" + token.encode().hex().upper(),
    "upper case": str.upper,
    "one letter short": lambda token: token[:-1],
    "in two lines": lambda token: f"{token[:6]}\n{token[6:]}",
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_token_is_found_in_every_encoding(name):
    assert repeats_secret(f'{{"error": "{ENCODINGS[name](TOKEN)}"}}', TOKEN)


def test_other_texts_do_not_repeat_it():
    assert (
        not repeats_secret(OTHER, TOKEN)
        and not repeats_secret("", TOKEN)
        and not repeats_secret("[1, 2.5, null] \\u0041 &amp; %41", TOKEN)
    )


@given(
    token=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=60),
    name=st.sampled_from(sorted(ENCODINGS)),
)
def test_tokens_of_every_kind_are_found_in_every_encoding(token, name):
    if name in ("one letter short", "in two lines") and len(token) < 13:
        return
    assert repeats_secret(ENCODINGS[name](token), token)


BODIES = {
    "refused": (403, lambda shown: json.dumps({"error": shown})),
    "server error": (500, lambda shown: f"<html>{shown}</html>"),
    "far behind": (401, lambda shown: "x" * 290 + shown),  # the quotation would end inside it
    "no json": (200, str),
    "other json": (200, lambda shown: json.dumps({"echo": {"headers": shown}})),
    "no score": (200, lambda shown: json.dumps({"scores": [shown]})),
    "no message": (200, lambda shown: json.dumps({"choices": [{"message": {"content": ["x" * 70, shown]}}]})),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["plain", "percent", "json escapes", "base64 of the header", "upper case"])
@pytest.mark.parametrize("function", [reward_model_http, llm_judge, llm_judge_pairs])
def test_no_message_shows_more_than_a_few_characters_of_it(server, monkeypatch, body, name, function):  # noqa: F811
    monkeypatch.setenv("RM_TOKEN", TOKEN)
    status, text = BODIES[body]
    server.behaviour = reply(text(ENCODINGS[name](TOKEN)), status)
    model = {} if function is reward_model_http else {"model": "m"}
    (score,) = function(inputs("a"), url=server.url(), token_env="RM_TOKEN", seconds=0.4, **model)
    assert score.ungraded is not None
    shown = score.why or ""
    encoded_token = ENCODINGS[name](TOKEN)
    assert not repeats_secret(shown, TOKEN)
    assert not any(encoded_token[start : start + 8] in shown for start in range(len(encoded_token) - 7)), (
        shown
    )


def test_what_does_not_repeat_the_token_is_quoted(server, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RM_TOKEN", TOKEN)
    endpoint = remote.make_endpoint(server.url(), "RM_TOKEN", 1.0, "f")
    for status in (403, 200):
        server.behaviour = reply(OTHER, status)
        with pytest.raises(remote.RemoteError, match="no model of that name"):
            remote.ask(endpoint, {}, reply_text)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "umlaut-\u00fc", "nul\0"])
def test_a_token_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch, token):
    monkeypatch.setattr("os.environ", {"RM_TOKEN": token})
    with pytest.raises(
        ValueError, match=r"RM_TOKEN \(token_env\) holds characters that no HTTP header can"
    ) as caught:
        remote.make_endpoint("http://host/x", "RM_TOKEN", 1.0, "f")
    assert token not in str(caught.value)
