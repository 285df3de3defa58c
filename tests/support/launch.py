"""Starts a script or a module on several ranks, with a user's file for a backend."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from support.warm import ROOT, changing_environment, own_environment, run_together


def launch_ranks(script: Path, backend: str, model: str, out: Path) -> list[dict[str, Any]]:
    """What each of two ranks of ``script MODEL OUT`` wrote into OUT/rank-<number>.json.

    backend: a name in recipes/accelerate. Skips the test where DeepSpeed is needed and not installed.
    """
    run_ranks(backend, [str(script), model, str(out)])
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def run_ranks(
    backend: str,
    arguments: Sequence[str],
    *,
    ranks: int = 2,
    folder: Path = ROOT,
    variables: Mapping[str, str] = {},
    timeout: float = 900,
) -> str:
    """Does what ``accelerate launch --config_file recipes/accelerate/BACKEND.yaml --num_processes RANKS
    ARGUMENTS`` does: accelerate itself reads the user's file and says each rank's environment; the ranks are
    started warm.

    folder: the current one. variables: environment variables besides. Returns what the ranks printed, errors
    last. Fails where a rank ends with another code than 0, and skips the test where DeepSpeed is needed and
    not installed.
    """
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install rltrain[deepspeed])")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    shared = {**own_environment(), **launcher_environment(backend, ranks), **place, **variables}
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    done = run_together(arguments, environments, folder, timeout)
    printed = "".join(rank.stdout for rank in done) + "".join(rank.stderr for rank in done)
    codes = [rank.returncode for rank in done]
    assert not any(codes), f"exit codes {codes}: {printed[-6000:]}"
    return printed


@functools.lru_cache
def launcher_environment(backend: str, ranks: int) -> dict[str, str]:
    """What accelerate sets for the ranks that it launches with a user's file."""
    file = str(ROOT / f"recipes/accelerate/{backend}.yaml")
    asked = launch_command_parser().parse_args(
        ["--config_file", file, "--num_processes", str(ranks), "script.py"]
    )
    said: dict[str, str] = {}
    with (
        changing_environment,
        mock.patch.dict(os.environ, own_environment(), clear=True),
        mock.patch.object(torch.distributed.run, "run", lambda _: said.update(os.environ)),
    ):
        before = dict(os.environ)
        launch_command(asked)
    return {name: value for name, value in said.items() if before.get(name) != value}
