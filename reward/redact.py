"""Whether a text repeats a secret, plainly or encoded: then nothing of it may be quoted."""

from __future__ import annotations

import base64
import binascii
import html
import re
import urllib.parse
from collections.abc import Iterator

LARGEST = 1 << 16  # characters of a text that is looked through; what is longer is taken to repeat the secret

_PIECE = 12  # characters of a secret that are too many to show
_LAYERS = 3  # of encodings on top of one another
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{4,}")
_HEX = re.compile(r"[0-9a-fA-F]{8,}")


def repeats(text: str, secret: str) -> bool:
    """Whether ``secret``, or 12 characters of it in a row, stands in ``text``.

    Seen through up to three of these on top of one another: percent-encoding, the escapes of JSON and Python,
    HTML entities, base64 at any offset, hexadecimal digits, line breaks; in upper or lower case.
    """
    if len(text) > LARGEST:
        return True
    size = min(_PIECE, len(secret))
    pieces = {secret[start : start + size].casefold() for start in range(len(secret) - size + 1)}
    readings = layer = {text}
    for _ in range(_LAYERS):
        layer = {decoded for reading in layer for decoded in _decoded(reading)} - readings
        readings = readings | layer
    return any(piece in reading for reading in map(str.casefold, readings) for piece in pieces)


def _decoded(text: str) -> Iterator[str]:
    yield urllib.parse.unquote(text)
    yield html.unescape(text)
    yield _ESCAPE.sub(_unescaped, text)
    yield "".join(text.split())
    digits = _HEX.findall(text)
    yield from ("\n".join(_from_hex(run[offset:]) for run in digits) for offset in range(2))
    runs = _BASE64.findall(text)
    yield from ("\n".join(_from_base64(run[offset:]) for run in runs) for offset in range(4))


def _unescaped(match: re.Match[str]) -> str:
    wide, narrow, plain = match.groups()
    return plain if plain is not None else chr(int(wide or narrow, 16))


def _from_hex(run: str) -> str:
    return bytes.fromhex(run[: len(run) // 2 * 2]).decode("latin-1")


def _from_base64(run: str) -> str:
    """As much of ``run`` as decodes, in the usual or the URL's alphabet."""
    alphabet = run.replace("-", "+").replace("_", "/")
    try:
        whole = alphabet[: len(alphabet) // 4 * 4]
        rest = alphabet[len(whole) :]
        padded = rest + "=" * (-len(rest) % 4) if len(rest) > 1 else ""
        return base64.b64decode(whole + padded).decode("latin-1")
    except binascii.Error:
        return ""
