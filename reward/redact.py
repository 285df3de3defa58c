"""Detects a text that repeats a secret, plainly or encoded, and so must not be quoted."""

from __future__ import annotations

import base64
import binascii
import html
import re
import urllib.parse
from collections.abc import Iterator

LARGEST = 1 << 16  # characters of a text that is searched; a longer text is taken to repeat the secret

_PIECE = 12  # so many characters of a secret must not be shown
_LAYERS = 3  # nested encodings that are searched
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{4,}")
_HEX = re.compile(r"[0-9a-fA-F]{8,}")


def repeats_secret(text: str, secret: str) -> bool:
    """Whether ``text`` contains ``secret`` or 12 consecutive characters of it, in upper or lower case.

    The search sees through up to three nested layers of: percent-encoding, the escapes of JSON and Python,
    HTML entities, base64 at any offset, hexadecimal digits, line breaks.
    """
    if len(text) > LARGEST:
        return True
    size = min(_PIECE, len(secret))
    pieces = {secret[start : start + size].casefold() for start in range(len(secret) - size + 1)}
    readings = layer = {text}
    for _ in range(_LAYERS):
        layer = {decoded for reading in layer for decoded in _decodings(reading)} - readings
        readings = readings | layer
    return any(piece in reading for reading in map(str.casefold, readings) for piece in pieces)


def _decodings(text: str) -> Iterator[str]:
    yield urllib.parse.unquote(text)
    yield html.unescape(text)
    yield _ESCAPE.sub(_unescape, text)
    yield "".join(text.split())
    digits = _HEX.findall(text)
    yield from ("\n".join(_from_hex(run[offset:]) for run in digits) for offset in range(2))
    runs = _BASE64.findall(text)
    yield from ("\n".join(_from_base64(run[offset:]) for run in runs) for offset in range(4))


def _unescape(match: re.Match[str]) -> str:
    wide, narrow, plain = match.groups()
    return plain if plain is not None else chr(int(wide or narrow, 16))


def _from_hex(run: str) -> str:
    return bytes.fromhex(run[: len(run) // 2 * 2]).decode("latin-1")


def _from_base64(run: str) -> str:
    """The part of ``run`` that decodes, in the standard or the URL alphabet."""
    alphabet = run.replace("-", "+").replace("_", "/")
    try:
        complete = alphabet[: len(alphabet) // 4 * 4]
        rest = alphabet[len(complete) :]
        padded = rest + "=" * (-len(rest) % 4) if len(rest) > 1 else ""
        return base64.b64decode(complete + padded).decode("latin-1")
    except binascii.Error:
        return ""
