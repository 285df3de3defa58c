"""One worker's client: the same suite on the fake worker and on a real vLLM server, and planted faults."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rltrain.errors import UserError
from rltrain.rollout.worker.answers import GarbageAnswer, GenerateRequest
from rltrain.rollout.worker.client import Seconds, WorkerBusy, WorkerClient, WorkerLost, WorkerRefused
from rltrain.rollout.worker.guard import ADAPTER, GENERATE, INFO, Choice
from support.fake_server import CONNECTION_FAULTS, FAULTS, VOCABULARY
from support.fake_worker import FakeWorker, fake_worker
from support.patience import PATIENCE
from support.server_paths import SERVER_PATHS

REQUEST = GenerateRequest(
    id="rltrain-1",
    token_ids=[11, 12, 13],
    n=4,
    temperature=1.0,
    max_tokens=24,
    seed=5,
    stop_token_ids=[1],
    salt="v1 ",
    model="policy",
)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeWorker]:
    with fake_worker() as worker:
        yield worker


@pytest.fixture(params=["fake", pytest.param("vllm", marks=pytest.mark.vllm)])
def client(request: pytest.FixtureRequest) -> Iterator[WorkerClient]:
    if request.param == "fake":
        worker = request.getfixturevalue("fake")
        worker.set_fault(None)
        connected = WorkerClient(worker.url, worker.token)
    else:
        server = request.getfixturevalue("vllm_worker")
        connected = WorkerClient(server.address.url, server.token)
    yield connected
    connected.close()


def run(client: WorkerClient, work: Coroutine[Any, Any, Any]) -> Any:
    async def close_after() -> Any:
        try:
            return await asyncio.wait_for(work, PATIENCE)  # what hangs fails, and the tests go on
        finally:
            await client.close_async()

    return asyncio.run(close_after())


async def ask(client: WorkerClient, *requests: GenerateRequest) -> list[list[Choice]]:
    labels = {client.weight_version()}
    return await asyncio.gather(
        *(client.generate(request, vocabulary=VOCABULARY, labels=labels) for request in requests)
    )


def change(**changes: Any) -> GenerateRequest:
    return dataclasses.replace(REQUEST, **changes)


def test_what_the_server_says_of_itself(client: WorkerClient) -> None:
    info = client.read_info()
    assert (info.dtype, info.max_model_len, info.max_num_seqs) == ("float32", 256, 32)
    assert (info.logprobs_mode, info.seed, info.quantization) == ("processed_logprobs", 0, None)
    assert info.version.startswith("0.3") and info.is_guarded
    assert client.world_size() == 1
    assert not client.is_paused()
    client.reset_cache()
    client.require_alive()


def test_bytes_and_json_say_the_same(client: WorkerClient) -> None:
    client.is_guarded = True
    ((*packed,),) = run(client, ask(client, REQUEST))
    client.is_guarded = False
    ((*plain,),) = run(client, ask(client, REQUEST))
    for left, right in zip(packed, plain, strict=True):
        assert list(left.token_ids) == list(right.token_ids)
        assert left.logprobs == pytest.approx(right.logprobs, abs=0.0)
        assert (left.finish, left.stop_reason, left.versions) == (
            right.finish,
            right.stop_reason,
            right.versions,
        )


def test_a_group_in_parts_has_the_tokens_of_a_whole_one(client: WorkerClient) -> None:
    parts = [change(id=f"part-{place}", n=1, seed=REQUEST.seed + place) for place in range(REQUEST.n)]
    group, *single = run(client, ask(client, REQUEST, *parts))
    assert [list(choice.token_ids) for choice in group] == [list(choice.token_ids) for (choice,) in single]
    assert len({tuple(choice.token_ids) for choice in group}) == REQUEST.n


def test_unsound_requests_are_refused_and_the_server_goes_on(client: WorkerClient) -> None:
    # vLLM's engine does not survive an empty prompt, and shortens a row that is too long without a word
    unsound = (
        {"token_ids": []},
        {"token_ids": [VOCABULARY]},
        {"token_ids": [-1]},
        {"max_tokens": 254},
        {"n": 0},
        {"n": 33},
        {"temperature": 0.0},
        {"model": "nobody"},
    )
    for changes in unsound:
        with pytest.raises(WorkerRefused, match="refuses /rltrain/v1/generate with 40"):
            run(client, ask(client, change(**changes)))
    assert len(run(client, ask(client, REQUEST))[0]) == REQUEST.n


def test_a_paused_server_keeps_its_requests(client: WorkerClient) -> None:
    async def pause_and_ask() -> list[list[Choice]]:
        await asyncio.to_thread(client.pause, "keep", True)
        assert await asyncio.to_thread(client.is_paused)
        asked = asyncio.ensure_future(ask(client, REQUEST))
        finished, _ = await asyncio.wait([asked], timeout=0.5)
        assert not finished
        await asyncio.to_thread(client.resume)
        return await asked

    before = run(client, ask(client, REQUEST))
    assert run(client, pause_and_ask()) == before


def test_an_abort_answers_with_what_is_there(client: WorkerClient) -> None:
    async def abort_after(seconds: float) -> tuple[Choice, bool]:
        long = change(n=1, max_tokens=250, stop_token_ids=[], seed=3)
        asked = asyncio.ensure_future(ask(client, long))
        await asyncio.sleep(seconds)
        await asyncio.to_thread(client.pause, "abort", True)
        answered, _ = await asyncio.wait([asked], timeout=1.0)
        await asyncio.to_thread(client.resume)  # a request that came after the pause waits for this
        ((choice,),) = await asked
        return choice, bool(answered)

    # how long a completion takes is the machine's: an abort that came before the request or its first token,
    # or after the last, is tried again, later or sooner
    seconds = 0.05
    for _ in range(20):
        choice, is_answered = run(client, abort_after(seconds))
        count = len(choice.token_ids) if is_answered else 0
        assert choice.finish == ("length" if len(choice.token_ids) == 250 else "abort")
        if 1 <= count < 250:
            return
        seconds *= 0.6 if count else 1.5
    raise AssertionError(f"no abort in 20 fell among the tokens, the last one after {seconds:.4f} s")


def read_metric(client: WorkerClient, name: str) -> float:
    """From the server's own counts, over its engines."""
    lines = client._send("GET", "/metrics", 60.0).text.splitlines()
    values = [line.rpartition(" ")[2] for line in lines if line.startswith(f"vllm:{name}{{")]
    assert values, f"the server has no metric {name}"
    return sum(map(float, values))


def test_a_request_that_is_cancelled_ends_at_the_server(client: WorkerClient) -> None:
    """It writes no more tokens, which the server counts. How soon a request is done is the machine's: one
    that was done when it was cancelled is tried again.
    """
    long = change(n=8, max_tokens=250, stop_token_ids=[])

    async def count_tokens() -> float:
        before = await asyncio.to_thread(read_metric, client, "generation_tokens_total")
        asked = asyncio.ensure_future(ask(client, long))
        async with asyncio.timeout(120):
            while await asyncio.to_thread(read_metric, client, "generation_tokens_total") == before:
                await asyncio.sleep(0.001)
            asked.cancel()
            await asyncio.wait([asked])
            await client.close_async()
            while await asyncio.to_thread(read_metric, client, "num_requests_running") > 0:
                await asyncio.sleep(0.001)
        return await asyncio.to_thread(read_metric, client, "generation_tokens_total") - before

    counts: list[float] = []
    while len(counts) < 20 and (not counts or counts[-1] == long.n * long.max_tokens):
        counts.append(run(client, count_tokens()))
    assert 0 < counts[-1] < long.n * long.max_tokens, counts


@pytest.mark.parametrize("token", ["x", "0" * 24])
def test_another_token_is_named(client: WorkerClient, token: str) -> None:
    other = WorkerClient(client.url, token)
    calls = (
        lambda: other.pause("abort", True),
        other.resume,
        other.read_info,
        lambda: other.call_workers("rltrain_alive", {}),
        lambda: other.update({}),
        lambda: run(other, other.generate(REQUEST, vocabulary=VOCABULARY, labels=())),
    )
    for call in calls:
        with pytest.raises(UserError, match="RLTRAIN_WORKER_TOKEN"):
            call()
    other.close()


def test_every_path_of_the_server_asks_for_the_token(client: WorkerClient) -> None:
    """No route is left open, whatever vLLM registers: only the token leads to an answer of its own."""
    transport = httpx.HTTPTransport(uds=client.url.removeprefix("unix:"))
    with httpx.Client(transport=transport, base_url="http://worker", timeout=60.0) as plain:
        for path in (*SERVER_PATHS, INFO, GENERATE, ADAPTER):
            for headers in ({}, {"Authorization": "Bearer " + "0" * len(client.token)}):
                for method in ("GET", "POST"):
                    assert plain.request(method, path, headers=headers).status_code == 401, (method, path)
            # without a body, and by GET, nothing that is served changes anything
            answer = plain.get(path, headers={"Authorization": f"Bearer {client.token}"})
            assert answer.status_code != 401, path
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {client.token}"}):
            assert plain.get("/health", headers=headers).status_code == 200


# the fake alone ---------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(fake: FakeWorker) -> Iterator[tuple[FakeWorker, WorkerClient]]:
    client = WorkerClient(fake.url, fake.token, Seconds(call=5.0, generate=1.0))
    yield fake, client
    fake.set_fault(None)
    client.close()


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("hang", "500", "503")])
def test_no_garbage_passes(spoilt: tuple[FakeWorker, WorkerClient], fault: str) -> None:
    worker, client = spoilt
    worker.set_fault(fault)
    for is_guarded in (True, False):
        client.is_guarded = is_guarded
        if is_guarded or fault not in ("nan", "minus infinity"):  # JSON has no word for them
            with pytest.raises(GarbageAnswer):
                run(client, ask(client, REQUEST))


@pytest.mark.parametrize("fault", CONNECTION_FAULTS)
def test_half_an_answer_is_none(spoilt: tuple[FakeWorker, WorkerClient], fault: str) -> None:
    worker, client = spoilt
    client.is_guarded = True
    worker.set_fault(fault)
    with pytest.raises((GarbageAnswer, WorkerLost)):
        run(client, ask(client, REQUEST))


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("hang", WorkerLost, "has not answered request rltrain-1 within 1 s"),
        ("500", WorkerLost, "with 500: .*planted"),
        ("503", WorkerBusy, "now: .*planted"),
    ],
)
def test_a_lost_worker_is_no_busy_one(
    spoilt: tuple[FakeWorker, WorkerClient], fault: str, error: type[Exception], text: str
) -> None:
    worker, client = spoilt
    worker.set_fault(fault)
    with pytest.raises(error, match=text):
        run(client, ask(client, REQUEST))


def test_a_worker_that_stopped_is_seen_by_a_round_trip(spoilt: tuple[FakeWorker, WorkerClient]) -> None:
    worker, _ = spoilt
    client = WorkerClient(worker.url, worker.token, Seconds(alive=0.2))
    worker.change(is_stopped=True)
    try:
        client.is_paused()
        with pytest.raises(WorkerLost, match=r"within 0.2 s"):
            client.require_alive()
    finally:
        worker.change(is_stopped=False)
    client.require_alive()
    client.close()


def test_nobody_listens(tmp_path: Path) -> None:
    client = WorkerClient(f"unix:{tmp_path / 'none'}", "x" * 16)
    with pytest.raises(WorkerLost, match="cannot be reached"):
        client.resume()
    with pytest.raises(WorkerLost, match="cannot be reached"):
        client.is_guarded = True
        run(client, client.generate(REQUEST, vocabulary=9, labels=()))


@pytest.mark.parametrize("url", ["localhost:80", "ftp://x", "", "/run/socket"])
def test_an_address_has_a_scheme(url: str) -> None:
    with pytest.raises(UserError, match="expected http://"):
        WorkerClient(url, "x" * 16)


def test_a_foreign_server_is_asked_in_json() -> None:
    with fake_worker(guarded=False) as worker:
        client = WorkerClient(worker.url, worker.token)
        assert not client.read_info().is_guarded
        assert len(run(client, ask(client, REQUEST))[0]) == REQUEST.n
        client.close()


def test_no_request_meets_the_close_of_an_idle_connection(fake: FakeWorker) -> None:
    # uvicorn closes a connection 5 s after its last answer; the client must have given it up by then
    fake.set_fault(None)
    client = WorkerClient(fake.url, fake.token)

    async def ask_after_a_while() -> tuple[Any, Any]:
        await ask(client, REQUEST)
        pool = client._open_async_client()._transport._pool  # type: ignore[attr-defined]
        (connection,) = pool.connections
        assert connection.is_idle()
        await asyncio.sleep(3.0)
        await ask(client, REQUEST)
        (other,) = pool.connections
        return connection, other

    connection, other = run(client, ask_after_a_while())
    assert connection is not other
    client.close()


def test_the_token_is_not_in_what_a_client_prints() -> None:
    assert "secret" not in repr(WorkerClient("http://localhost:1", "secret" * 4))


def test_an_adapter_is_sent_without_a_shared_disk(fake: FakeWorker, tmp_path: Path) -> None:
    fake.set_fault(None)
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 9000}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    client = WorkerClient(fake.url, fake.token)
    folder = Path(client.upload_adapter("policy-v7", tmp_path))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    with pytest.raises(WorkerRefused, match="here already"):
        client.upload_adapter("policy-v7", tmp_path)
    client.close()
