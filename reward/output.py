"""What graders print, in one file of bounded size, each stretch under the step and the grader that printed
it.

A worker's stdout and stderr are one pipe. The worker marks in it where a grader begins and ends; a thread of
the trainer reads it, so that no grader ever waits for somebody to listen.
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import threading
from pathlib import Path

__all__ = ["OutputLog", "mark"]

_FILE_BYTES = 8 << 20  # then the file is kept as rewards.log.1 and a new one begins
_STRETCH_BYTES = 64 << 10  # of what one grader prints at one time
_KEPT_STRETCHES = 64  # until there is a file
_MARK = b"\x1e"
_HEADING_BYTES = 512
_LAST_WORDS_SECONDS = 1.0  # for what is still in a pipe when its worker is gone


def mark(descriptor: int, nonce: str, heading: str = "") -> None:
    """Written by a worker: what follows belongs to ``heading``, or to nobody."""
    line = " ".join(heading.split()).encode("utf-8", errors="replace")[:_HEADING_BYTES]
    with contextlib.suppress(OSError):  # a grader has closed its own stdout
        os.write(descriptor, _MARK + nonce.encode("ascii") + b" " + line + b"\n")


class OutputLog:
    """The log of a pool's workers. Until ``open`` names a file, the latest stretches are kept for it."""

    def __init__(self) -> None:
        self.nonce = secrets.token_hex(8)  # tells a worker's marks from what a grader prints
        self._path: Path | None = None
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=_KEPT_STRETCHES)
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []

    def open(self, path: Path) -> None:
        """From now on stretches are appended to ``path``, the kept ones first."""
        with self._lock:
            self._path = path
            while self._waiting:
                self._append(self._waiting.popleft())

    def follow(self, descriptor: int) -> None:
        """Read this end of a worker's pipe until nobody holds the other."""
        self._readers = [reader for reader in self._readers if reader.is_alive()]
        reader = threading.Thread(target=self._read, args=(descriptor,), daemon=True)
        self._readers.append(reader)
        reader.start()

    def close(self) -> None:
        """Waits a moment for what ended workers have printed."""
        for reader in self._readers:
            reader.join(_LAST_WORDS_SECONDS)

    def _read(self, descriptor: int) -> None:
        stretch, split = _Stretch("the start of a worker"), _Splitter(self.nonce)
        try:
            while chunk := os.read(descriptor, 1 << 16):
                for text, heading in split(chunk):
                    stretch.add(text)
                    if heading is not None:
                        self._write(stretch)
                        stretch = _Stretch(heading or "after a grader had returned")
            stretch.add(split.rest)
            self._write(stretch)
        finally:
            os.close(descriptor)

    def _write(self, stretch: _Stretch) -> None:
        if not stretch.size:
            return
        with self._lock:
            if self._path is None:
                self._waiting.append(stretch.rendered)
            else:
                self._append(stretch.rendered)

    def _append(self, text: bytes) -> None:
        """A full disk or a removed folder costs the log and nothing else."""
        assert self._path is not None
        with contextlib.suppress(OSError):
            if self._path.exists() and self._path.stat().st_size + len(text) > _FILE_BYTES:
                os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
            with self._path.open("ab") as file:
                file.write(text)


class _Stretch:
    """What one grader printed in one task, its beginning only where it is long."""

    def __init__(self, heading: str) -> None:
        self.heading, self.size, self._text = heading, 0, bytearray()

    def add(self, text: bytes) -> None:
        self.size += len(text)
        self._text += text[: max(_STRETCH_BYTES - len(self._text), 0)]

    @property
    def rendered(self) -> bytes:
        left_out = self.size - len(self._text)
        more = f"\n[{left_out} more bytes are left out]" if left_out else ""
        text = bytes(self._text).rstrip(b"\n")
        return f"--- {self.heading}\n".encode("utf-8", errors="replace") + text + f"{more}\n".encode("ascii")


class _Splitter:
    """Cuts a stream at a worker's marks, wherever the chunks in which it arrives begin and end."""

    def __init__(self, nonce: str) -> None:
        self._mark = _MARK + nonce.encode("ascii") + b" "
        self.rest = b""  # may be the beginning of a mark

    def __call__(self, chunk: bytes) -> list[tuple[bytes, str | None]]:
        """(text, heading of what follows), the last without a heading."""
        data, pieces = self.rest + chunk, []
        while (start := data.find(self._mark)) >= 0 and (end := data.find(b"\n", start)) >= 0:
            pieces.append(
                (data[:start], data[start + len(self._mark) : end].decode("utf-8", errors="replace"))
            )
            data = data[end + 1 :]
        kept = data.rfind(_MARK)
        kept = kept if kept >= 0 and len(data) - kept <= 2 * _HEADING_BYTES else len(data)
        self.rest = data[kept:]
        return [*pieces, (data[:kept], None)]
