"""A small router in front of workers, asked in turn: it proxies vLLM's own route and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

PATH = "/inference/v1/generate"


@dataclass
class FakeRouter:
    """sockets: of the workers behind it, as they are now. asked: requests by worker."""

    url: str
    sockets: Callable[[], Sequence[Path]]
    asked: list[int] = field(default_factory=list)
    turn: int = 0
    is_deaf: bool = False  # answers 502 to everything

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status, content = 404, b"{}"
        if scope["path"] == PATH:
            status, content = await self.forward(body, dict(scope["headers"]))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def forward(self, body: bytes, headers: dict[bytes, bytes]) -> tuple[int, bytes]:
        sockets = self.sockets()
        place = self.turn % len(sockets)
        self.turn += 1
        if self.is_deaf:
            return 502, b"deaf"
        self.asked.append(place)
        transport = httpx.AsyncHTTPTransport(uds=str(sockets[place]))
        authorization = headers[b"authorization"].decode()
        async with httpx.AsyncClient(transport=transport, timeout=120) as client:
            try:
                answer = await client.post(
                    f"http://worker{PATH}", content=body, headers={"Authorization": authorization}
                )
            except httpx.HTTPError as error:
                return 502, type(error).__name__.encode()
        return answer.status_code, answer.content


@contextlib.contextmanager
def fake_router(folder: Path, sockets: Callable[[], Sequence[Path]]) -> Iterator[FakeRouter]:
    """A router at a Unix socket in ``folder``, in a thread."""
    path = folder / "router"
    router = FakeRouter(f"unix:{path}", sockets)
    started = threading.Event()
    holder: list[Any] = []

    async def serve() -> None:
        config = uvicorn.Config(
            router.serve, uds=str(path), log_level="critical", interface="asgi3", lifespan="off"
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        holder.append(server)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield router
    finally:
        holder[0].force_exit = True
        holder[0].should_exit = True
        thread.join(20)
