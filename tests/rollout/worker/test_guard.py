"""The guard in front of a server: token on every path, limits of bodies, adapters that arrive whole."""

from __future__ import annotations

import asyncio
import hmac
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from rltrain.rollout.worker import guard
from rltrain.rollout.worker.guard import Choice, Guard, decode_answer, encode_answer, frame
from support.server_paths import SERVER_PATHS

SECRET = "0123456789abcdef-token"
PATHS = (*SERVER_PATHS, guard.INFO, guard.GENERATE, guard.SCORE, guard.ADAPTER)


class App:
    """Reads the body, answers 200, and notes what reached it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.state: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        self.paths.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})


async def sample_one(state: Any, request: dict[str, Any]) -> list[Choice]:
    return [Choice(0, [5, 6], [-0.5, -0.25], "stop", 6, [("1", 0, 2)])]


async def score_ids(state: Any, request: dict[str, Any]) -> list[float]:
    return [-float(token) for token in request["token_ids"][1:]]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[App]:
    monkeypatch.setenv(guard.TOKEN, SECRET)
    monkeypatch.setenv(guard.ADAPTER_FOLDER, str(tmp_path / "adapters"))
    yield App()


def call(app: Any, method: str, path: str, token: str | None = SECRET, **content: Any) -> httpx.Response:
    """One request to the guard in front of ``app``."""

    async def send() -> httpx.Response:
        guarded = Guard(app, sample_one, score_ids)

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            scope["app"] = app
            await guarded(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(serve), base_url="http://w") as client:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            return await client.request(method, path, headers=headers, **content)

    return asyncio.run(send())


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_asks_for_the_token(app: App, path: str, method: str) -> None:
    for token in (None, "", SECRET[:-1], SECRET + "x", SECRET.upper(), "0" * len(SECRET)):
        assert call(app, method, path, token).status_code == 401
    assert app.paths == []
    if path not in (guard.INFO, guard.GENERATE, guard.SCORE, guard.ADAPTER):
        assert call(app, method, path).text == "served"


def test_the_own_routes_are_served_with_the_token(app: App) -> None:
    assert call(app, "GET", guard.INFO).json() == {"rltrain": 1, "adapters": True, "loaded": {}}
    answer = call(app, "POST", guard.GENERATE, json={"request_id": "a"})
    assert answer.status_code == 200
    assert decode_answer(answer.content)[0] == "a"
    assert call(app, "GET", guard.GENERATE).status_code == 405
    assert call(app, "POST", guard.GENERATE, json=[]).status_code == 400
    assert app.paths == []


@pytest.mark.parametrize("token", [None, "wrong", SECRET])
def test_health_is_open(app: App, token: str | None) -> None:
    assert call(app, "GET", "/health", token).text == "served"


def test_two_authorizations_are_none(app: App) -> None:
    async def send() -> int:
        statuses: list[int] = []

        async def note(message: Any) -> None:
            statuses.append(message.get("status", 0))

        header = (b"authorization", f"Bearer {SECRET}".encode())
        scope = {"type": "http", "path": "/pause", "method": "POST", "headers": [header, header]}
        await Guard(app)(scope, asyncio.Future, note)
        return statuses[0]

    assert asyncio.run(send()) == 401


def test_a_websocket_is_closed(app: App) -> None:
    async def connect() -> list[Any]:
        messages: list[Any] = []

        async def note(message: Any) -> None:
            messages.append(message)

        header = (b"authorization", f"Bearer {SECRET}".encode())
        await Guard(app)(
            {"type": "websocket", "path": "/v1/realtime", "headers": [header]}, asyncio.Future, note
        )
        return messages

    assert [message["type"] for message in asyncio.run(connect())] == ["websocket.close"]
    assert app.paths == []


def test_the_comparison_takes_the_same_time_for_every_token(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append(a), compare(a, b))[1])
    call(app, "POST", "/pause", "wrong")
    assert compared == [b"Bearer wrong"]


@pytest.mark.parametrize("token", [None, "", "short"])
def test_without_a_token_nothing_starts(token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guard.TOKEN, raising=False)
    if token is not None:
        monkeypatch.setenv(guard.TOKEN, token)
    with pytest.raises(RuntimeError, match=r"RLTRAIN_WORKER_TOKEN has \d+ characters"):
        Guard(App())


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("path", ["/update_weights", guard.GENERATE])
def test_a_body_has_a_limit(app: App, path: str, announced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY", 1000)

    async def parts() -> Any:
        for _ in range(3):
            yield b"x" * 400

    content = b"x" * 1200 if announced else parts()
    assert call(app, "POST", path, content=content).status_code == 413
    assert app.paths == []
    assert call(app, "POST", path, content=b"x" * 1000).status_code in (200, 400)


def test_the_frame_is_eight_bytes_a_token() -> None:
    choices = [
        Choice(index, list(range(1000)), [-index - 0.5] * 1000, "length", None, [("3", 0, 1000)])
        for index in range(4)
    ]
    body = encode_answer("r", choices)
    assert decode_answer(body) == ("r", choices)
    assert len(body) / 4000 < 8.2


@pytest.mark.parametrize("cut", [0, 3, 4, 20, -1])
def test_a_frame_that_is_cut_is_refused(cut: int) -> None:
    body = encode_answer("r", [Choice(0, [1, 2], [-1.0, -2.0], "stop", 2, [("1", 0, 2)])])
    with pytest.raises(ValueError, match=r"answer|announces"):
        decode_answer(body[:cut])


@pytest.mark.parametrize(
    "head", [{}, {"request_id": "r", "choices": [{}]}, {"request_id": "r", "choices": 3}]
)
def test_a_frame_with_another_head_is_refused(head: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        decode_answer(frame(head))


ADAPTER_FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 1000}


def upload(name: str = "policy-v1", files: dict[str, bytes] = ADAPTER_FILES, rest: bytes = b"") -> bytes:
    head = {"name": name, "files": {file: len(data) for file, data in files.items()}}
    return frame(head, *files.values(), rest)


def test_an_adapter_arrives_whole(app: App, tmp_path: Path) -> None:
    answer = call(app, "POST", guard.ADAPTER, content=upload())
    folder = Path(answer.json()["path"])
    assert folder == tmp_path / "adapters" / "policy-v1"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == ADAPTER_FILES
    assert call(app, "POST", guard.ADAPTER, content=upload()).status_code == 409


@pytest.mark.parametrize(
    "body",
    [
        upload()[:-1],
        upload(rest=b"more"),
        upload("../out"),
        upload("a/b"),
        upload(""),
        upload(".hidden"),
        upload(files={"adapter_config.json": b"{}"}),
        upload(files={**ADAPTER_FILES, "../x": b""}),
        frame({"name": "a"}),
        frame({"name": "a", "files": {**dict.fromkeys(ADAPTER_FILES, -1)}}),
        b"\xff\xff\xff\xff",
        b"",
    ],
)
def test_half_an_adapter_or_another_name_leaves_nothing(app: App, tmp_path: Path, body: bytes) -> None:
    assert call(app, "POST", guard.ADAPTER, content=body).status_code in (400, 413)
    assert not [*(tmp_path / "adapters").rglob("*")]
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_removed_and_nothing_else(app: App, tmp_path: Path) -> None:
    for name in ("policy-v1", "policy-v2"):
        call(app, "POST", guard.ADAPTER, content=upload(name))
    (tmp_path / "kept").touch()

    def remove(name: Any) -> int:
        return call(app, "DELETE", guard.ADAPTER, content=json.dumps({"name": name}).encode()).status_code

    assert [remove("policy-v1"), remove("policy-v1")] == [200, 200]  # a second time it is gone
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["policy-v2"]
    assert [remove(name) for name in ("", ".", "..", "../kept", "/", 7, None)] == [400] * 7
    assert (tmp_path / "kept").is_file() and (tmp_path / "adapters/policy-v2").is_dir()
    assert call(app, "POST", guard.ADAPTER, content=upload("policy-v1")).status_code == 200


def test_the_adapters_that_vllm_has_are_told_with_their_numbers(app: App) -> None:
    loaded = {"policy-1-a-1": SimpleNamespace(lora_int_id=4)}
    app.state = SimpleNamespace(openai_serving_models=SimpleNamespace(lora_requests=loaded))
    assert call(app, "GET", guard.INFO).json()["loaded"] == {"policy-1-a-1": 4}


def test_tokens_are_scored(app: App) -> None:
    answer = call(app, "POST", guard.SCORE, json={"token_ids": [4, 5, 6]})
    assert answer.json() == {"logprobs": [-5.0, -6.0]}
    for body in (b"", b"[]", b"{}"):
        assert call(app, "POST", guard.SCORE, content=body).status_code == 400


def test_the_label_of_a_request_is_that_of_its_tokens_unless_the_base_changed() -> None:
    span = SimpleNamespace(version="default", start=0, end=3)
    assert guard._label_spans([span], None) == [("default", 0, 3)]
    assert guard._label_spans([span], "7") == [("7", 0, 3)]
    later = SimpleNamespace(version="8", start=3, end=5)
    assert guard._label_spans([span, later], "7") == [("default", 0, 3), ("8", 3, 5)]
    assert guard._label_spans([], "7") == []


def test_a_worker_without_a_folder_takes_no_adapter(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guard.ADAPTER_FOLDER)
    assert call(app, "POST", guard.ADAPTER, content=upload()).status_code == 404
    assert call(app, "GET", guard.INFO).json()["adapters"] is False


def test_the_guard_loads_with_the_standard_library_alone() -> None:
    code = (
        "import json, sys\nimport rltrain.rollout.worker.guard\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in json.loads(done.stdout) if not name.startswith("_")}
    assert loaded <= {*sys.stdlib_module_names, "rltrain"}
