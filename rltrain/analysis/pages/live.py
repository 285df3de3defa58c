"""The page of a run that is still training, served on the loopback and renewed as the run writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from rltrain.analysis.pages.render import inline_asset
from rltrain.analysis.pages.run_page import run_page
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.errors import UserError

__all__ = ["LiveReport", "live_server"]

HOST = "127.0.0.1"
_NOTHING_YET = "<!doctype html><title>{name}</title><body><p>{name} has no training step yet ...</p></body>"


@dataclass
class LiveReport:
    """report.html of the run in ``folder`` as it is now, with a script that asks for newer ones."""

    folder: RunFolder
    _version: str = ""
    _page: str = ""

    def __post_init__(self) -> None:
        self._lock = Lock()

    @property
    def version(self) -> str:
        """Changes when the run has written a line."""
        paths = (self.folder.metrics, self.folder.transcripts)
        return "-".join(str(path.stat().st_size if path.exists() else 0) for path in paths)

    def render(self) -> str:
        """The page; the one before where a line is only half written."""
        with self._lock:
            version = self.version
            if version != self._version or not self._page:
                try:
                    page = run_page(self.folder)
                except UserError:
                    page = self._page or _NOTHING_YET.format(name=self.folder.path.name)
                self._page = page
                self._version = version
            script = f"<script>{inline_asset('live.js')}\nwatch({json.dumps(self._version)});</script></body>"
            return self._page.replace("</body>", script)


def live_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the run's page at 127.0.0.1. port 0: any free one. Raises UserError where the port is in
    use, or ``folder`` is no run.
    """
    report = LiveReport(RunFolder.from_path(folder))
    if not report.folder.recipe.is_file():
        raise UserError(f"{folder} holds no run ({report.folder.recipe.name} is missing)")
    handler: Any = type("Handler", (_Handler,), {"report": report})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise UserError(f"port {port} of {HOST} cannot be used ({error.strerror}); choose another") from error


class _Handler(BaseHTTPRequestHandler):
    report: LiveReport

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            # a page elsewhere whose name was pointed at this machine must not read the run
            self._send(403, "text/plain", "this page is served on the loopback only")
        elif self.path == "/":
            self._send(200, "text/html; charset=utf-8", self.report.render())
        elif self.path == "/version":
            self._send(200, "text/plain", self.report.version)
        else:
            self._send(404, "text/plain", "only / is here")

    def _send(self, status: int, kind: str, text: str) -> None:
        data = text.encode("utf-8", errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""
