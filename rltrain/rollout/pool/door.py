"""Where workers that come by themselves knock: ``POST /join {"url": URL}`` with the run's token.

Imports no torch.
"""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6

from rltrain.errors import UserError

__all__ = ["JOIN", "Door"]

JOIN = "/join"
_LONGEST_BODY = 4096  # bytes
_SECONDS = 10.0  # without a byte, after which a connection is given up
_URLS = ("http://", "https://", "unix:")


class Door:
    """Listens in a thread until ``close``. welcome(url) is called for every worker that knocks, again and
    again while it is there. Raises UserError where the address cannot be listened at.
    """

    def __init__(self, host: str, port: int, token: str, welcome: Callable[[str], None]) -> None:
        class Handler(_Handler):
            expected = f"Bearer {token}".encode()
            open_for = staticmethod(welcome)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            address_family = AF_INET6 if ":" in host else AF_INET

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise UserError(
                f"rollout.workers: cannot listen at {host} port {port} for workers that join: "
                f"{error.strerror}; set rollout.workers.host and port to a free one"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """expected: value of the header with the token. open_for(url): lets a worker in."""

    expected: bytes
    open_for: Callable[[str], None]
    timeout = _SECONDS

    def do_POST(self) -> None:
        header = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(header, self.expected):
            self._answer(401, "the run has another token: set RLTRAIN_WORKER_TOKEN to it")
            return
        url = self._read_url()
        if self.path != JOIN or url is None:
            self._answer(400, f'expected POST {JOIN} with {{"url": "http://HOST:PORT"}}')
            return
        self.open_for(url)
        self._answer(200, "welcome")

    def _read_url(self) -> str | None:
        """The url in the body; None where there is none."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _LONGEST_BODY:
            return None
        try:
            url = json.loads(self.rfile.read(int(length)))["url"]
        except (ValueError, KeyError, TypeError):
            return None
        return url if isinstance(url, str) and url.startswith(_URLS) else None

    def _answer(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""
