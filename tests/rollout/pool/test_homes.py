"""Where workers come from: a process that is started again, and workers that knock at the door."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from typing import Any

import pytest

from rltrain.errors import UserError
from rltrain.rollout.pool.door import Door
from rltrain.rollout.pool.homes import Connector, LocalHome
from rltrain.rollout.pool.knock import Knocker, advertised_url
from rltrain.rollout.worker.client import ServerInfo
from rltrain.rollout.worker.flags import Address, WorkerSettings
from rltrain.rollout.worker.process import WorkerDied
from support.fake_pool import wait_until

SETTINGS = WorkerSettings(model="m", dtype="float32", max_model_len=8, max_num_seqs=4, on_gpu=False)
INFO = ServerInfo("0.32.0", "float32", 8, 4, "processed_logprobs", 0, None, 1, 2, True)
TOKEN = "a-token-of-enough-characters"


class Process:
    """A local worker that serves at once, or never."""

    token = TOKEN
    address = Address(port=1)

    def __init__(self, serves: bool = True) -> None:
        self.serves = serves
        self.is_closed = False

    def wait_until_serving(self, silence_seconds: float, should_stop: Any) -> None:
        if not self.serves:
            wait_until(should_stop)
            raise WorkerDied("told to stop")

    def require_alive(self) -> None:
        if self.is_closed:
            raise WorkerDied("it has ended")

    def close(self, grace_seconds: float = 10.0) -> None:
        self.is_closed = True


class Client:
    is_closed = False

    def __init__(self, *arguments: Any) -> None: ...

    def read_info(self) -> ServerInfo:
        return INFO

    def require_alive(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


def make_home(processes: list[Process], **options: Any) -> LocalHome:
    connector: Any = Connector(Client, lambda info, url: None)  # type: ignore[arg-type]
    started: Any = iter(processes)
    return LocalHome(SETTINGS, connector, 60.0, start=lambda settings: next(started), **options)


def test_a_local_worker_is_started_again() -> None:
    processes = [Process(), Process()]
    home = make_home(processes)
    assert home.open()[1] == 8  # rows of both copies
    home.require_process()
    home.open()
    assert processes[0].is_closed and not processes[1].is_closed
    home.close()
    assert processes[1].is_closed
    with pytest.raises(WorkerDied):
        home.open()


def test_a_start_under_way_ends_with_the_pool() -> None:
    """So does one that waits for another's start."""
    gate = threading.Lock()
    homes = [make_home([Process(serves=False)], gate=gate) for _ in range(2)]
    ended: list[str] = []

    def open_one(home: LocalHome) -> None:
        with pytest.raises(WorkerDied):
            home.open()
        ended.append("ended")

    threads = [threading.Thread(target=open_one, args=(home,)) for home in homes]
    for thread in threads:
        thread.start()
    wait_until(gate.locked)
    for home in homes:
        home.close()
    for thread in threads:
        thread.join(30)
    assert ended == ["ended", "ended"]


def test_a_worker_that_does_not_fit_leaves_no_connection() -> None:
    client = Client()

    def refuse(info: ServerInfo, url: str) -> None:
        raise UserError("its dtype is bfloat16")

    connector: Any = Connector(lambda url, token: client, refuse)  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="bfloat16"):
        connector.attach("http://host:1", TOKEN)
    assert client.is_closed


def test_a_worker_knocks_again_and_again_and_says_so_once() -> None:
    said: list[str] = []
    welcomed: list[str] = []
    door = Door("127.0.0.1", 0, TOKEN, welcomed.append)
    knocker = Knocker(f"http://127.0.0.1:{door.port}", "http://10.0.0.7:8000", TOKEN, said.append, 0.01)
    try:
        wait_until(lambda: len(welcomed) > 2)
    finally:
        knocker.close()
        door.close()
    assert set(welcomed) == {"http://10.0.0.7:8000"}
    assert len(said) == 1 and "joined the run" in said[0]


def test_a_worker_goes_on_knocking_where_no_run_answers() -> None:
    said: list[str] = []
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        door = f"http://127.0.0.1:{held.getsockname()[1]}"
        knocker = Knocker(door, "http://10.0.0.7:8000", TOKEN, said.append, 0.01)
        try:
            wait_until(lambda: said)
        finally:
            knocker.close()
    assert len(said) == 1 and "no run answers" in said[0]


def test_the_url_that_a_worker_gives() -> None:
    door = "http://127.0.0.1:8900"
    assert advertised_url(Address(host="0.0.0.0", port=80), door) == "http://127.0.0.1:80"
    assert advertised_url(Address(host="10.0.0.7", port=80), door) == "http://10.0.0.7:80"
    with pytest.raises(UserError, match="--join 'elsewhere'"):
        advertised_url(Address(host="10.0.0.7", port=80), "elsewhere")


@pytest.mark.parametrize(
    ("token", "path", "body", "status"),
    [
        (TOKEN, "/join", {"url": "http://10.0.0.7:8000"}, 200),
        ("another-token-of-enough-chars", "/join", {"url": "http://10.0.0.7:8000"}, 401),
        (TOKEN, "/", {"url": "http://10.0.0.7:8000"}, 400),
        (TOKEN, "/join", {"url": "file:///etc/passwd"}, 400),
        (TOKEN, "/join", ["no url"], 400),
        (TOKEN, "/join", {"url": "http://" + "h" * 5000}, 400),
    ],
)
def test_the_door_opens_for_workers_with_the_token(token: str, path: str, body: Any, status: int) -> None:
    welcomed: list[str] = []
    door = Door("127.0.0.1", 0, TOKEN, welcomed.append)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=20)
        connection.request("POST", path, json.dumps(body), {"Authorization": f"Bearer {token}"})
        assert connection.getresponse().status == status
        connection.close()
        assert welcomed == (["http://10.0.0.7:8000"] if status == 200 else [])
        with pytest.raises(UserError, match=r"set rollout\.workers\.host and port"):
            Door("127.0.0.1", door.port, TOKEN, welcomed.append)
    finally:
        door.close()
