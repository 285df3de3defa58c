"""Logs the output of graders in one file of bounded size, in sections headed by step and grader.

A worker's stdout and stderr are one pipe. The worker marks in the pipe where a grader begins and ends; a
thread of the trainer reads it, so that no grader ever waits for a reader.
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import threading
from pathlib import Path

__all__ = ["OutputLog", "mark"]

_FILE_BYTES = 8 << 20  # a full file is kept as rewards.log.1, and a new one begins
_SECTION_BYTES = 64 << 10  # of the output of one grader in one task
_BUFFERED_SECTIONS = 64  # kept until there is a file
_MARK = b"\x1e"
_HEADING_BYTES = 512
_DRAIN_SECONDS = 1.0  # for reading the rest of a pipe after its worker has ended


def mark(descriptor: int, nonce: str, heading: str = "") -> None:
    """Writes a mark to a worker's output: the following output belongs to ``heading``, or to no grader."""
    line = " ".join(heading.split()).encode("utf-8", errors="replace")[:_HEADING_BYTES]
    with contextlib.suppress(OSError):  # a grader has closed its own stdout
        os.write(descriptor, _MARK + nonce.encode("ascii") + b" " + line + b"\n")


class OutputLog:
    """The log of a pool's workers. It buffers the latest sections until ``open`` names a file."""

    def __init__(self) -> None:
        self.nonce = secrets.token_hex(8)  # distinguishes a worker's marks from a grader's output
        self._path: Path | None = None
        self._buffered: collections.deque[bytes] = collections.deque(maxlen=_BUFFERED_SECTIONS)
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []

    def open(self, path: Path) -> None:
        """Appends sections to ``path`` from now on, the buffered ones first."""
        with self._lock:
            self._path = path
            while self._buffered:
                self._append(self._buffered.popleft())

    def follow(self, descriptor: int) -> None:
        """Starts a thread that reads this end of a worker's pipe until the other end is closed."""
        self._readers = [reader for reader in self._readers if reader.is_alive()]
        reader = threading.Thread(target=self._read, args=(descriptor,), daemon=True)
        self._readers.append(reader)
        reader.start()

    def close(self) -> None:
        """Waits a moment for the output of workers that have ended."""
        for reader in self._readers:
            reader.join(_DRAIN_SECONDS)

    def _read(self, descriptor: int) -> None:
        section = _Section("the start of a worker")
        split = _Splitter(self.nonce)
        try:
            while chunk := os.read(descriptor, 1 << 16):
                for text, heading in split(chunk):
                    section.add(text)
                    if heading is not None:
                        self._write(section)
                        section = _Section(heading or "after a grader had returned")
            section.add(split.rest)
            self._write(section)
        finally:
            os.close(descriptor)

    def _write(self, section: _Section) -> None:
        if not section.size:
            return
        with self._lock:
            if self._path is None:
                self._buffered.append(section.formatted_text)
            else:
                self._append(section.formatted_text)

    def _append(self, text: bytes) -> None:
        """A full disk or a removed folder loses only the log."""
        assert self._path is not None
        with contextlib.suppress(OSError):
            if self._path.exists() and self._path.stat().st_size + len(text) > _FILE_BYTES:
                os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
            with self._path.open("ab") as file:
                file.write(text)


class _Section:
    """The output of one grader in one task; of a long output, only the beginning."""

    def __init__(self, heading: str) -> None:
        self.heading = heading
        self.size = 0
        self._text = bytearray()

    def add(self, text: bytes) -> None:
        self.size += len(text)
        self._text += text[: max(_SECTION_BYTES - len(self._text), 0)]

    @property
    def formatted_text(self) -> bytes:
        left_out = self.size - len(self._text)
        more = f"\n[{left_out} more bytes are left out]" if left_out else ""
        text = bytes(self._text).rstrip(b"\n")
        return f"--- {self.heading}\n".encode("utf-8", errors="replace") + text + f"{more}\n".encode("ascii")


class _Splitter:
    """Splits a stream at a worker's marks, however the stream is cut into chunks."""

    def __init__(self, nonce: str) -> None:
        self._mark = _MARK + nonce.encode("ascii") + b" "
        self.rest = b""  # the possible beginning of a mark

    def __call__(self, chunk: bytes) -> list[tuple[bytes, str | None]]:
        """Pairs (text, heading of the text that follows); the last pair has no heading."""
        data = self.rest + chunk
        pieces = []
        while (start := data.find(self._mark)) >= 0 and (end := data.find(b"\n", start)) >= 0:
            pieces.append(
                (data[:start], data[start + len(self._mark) : end].decode("utf-8", errors="replace"))
            )
            data = data[end + 1 :]
        rest_start = data.rfind(_MARK)
        rest_start = (
            rest_start if rest_start >= 0 and len(data) - rest_start <= 2 * _HEADING_BYTES else len(data)
        )
        self.rest = data[rest_start:]
        return [*pieces, (data[:rest_start], None)]
