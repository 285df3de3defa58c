"""A worker's side of the door: says where it serves, again and again, for a run that starts anew.

Imports no torch.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx

from rltrain.errors import UserError
from rltrain.rollout.pool.door import JOIN
from rltrain.rollout.worker.flags import Address

__all__ = ["Knocker", "advertised_url"]

_REPEAT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0


def advertised_url(address: Address, door: str) -> str:
    """The url under which the run at ``door`` reaches this worker; every address of this machine (0.0.0.0)
    becomes the one that faces the door.
    """
    parts = urlsplit(door)
    if parts.scheme != "http" or parts.hostname is None or parts.port is None:
        raise UserError(
            f"--join {door!r}: expected http://HOST:PORT, rollout.workers.host and port of the run"
        )
    if address.socket is not None or not _is_unspecified(address.host):
        return address.url
    family, kind, _, _, peer = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(peer)  # sends nothing: it only chooses the interface
        address_here = str(probe.getsockname()[0])
    host = f"[{address_here}]" if ":" in address_here else address_here
    return f"{'http' if address.tls is None else 'https'}://{host}:{address.port}"


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


class Knocker:
    """Knocks at ``door`` in a thread until ``close``. say: receives what is new of its answers."""

    def __init__(
        self, door: str, url: str, token: str, say: Callable[[str], None], repeat: float = _REPEAT_SECONDS
    ) -> None:
        self._door = door.rstrip("/") + JOIN
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._say = say
        self._repeat = repeat
        self._last = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rltrain-knock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(headers=self._headers, timeout=_ANSWER_SECONDS) as client:
            while not self._ended.is_set():
                news = self._knock(client)
                if news != self._last:
                    self._say(news)
                self._last = news
                self._ended.wait(self._repeat)

    def _knock(self, client: httpx.Client) -> str:
        """What the door says."""
        try:
            answer = client.post(self._door, json={"url": self._url})
        except httpx.HTTPError as error:
            return f"no run answers at {self._door} yet ({type(error).__name__}); asking again"
        if answer.status_code == 200:
            return f"joined the run at {self._door} as {self._url}"
        return f"the run at {self._door} answers {answer.status_code}: {answer.text[:200]}"
