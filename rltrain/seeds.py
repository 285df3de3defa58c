"""Seeds derived from names, so that a resumed run samples as the uninterrupted run would have."""

from __future__ import annotations

import hashlib


def stable_hash(*parts: object) -> int:
    """A 31-bit seed from ``parts``, equal in every process and on every machine (``hash()`` is not)."""
    text = "\x1f".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF
