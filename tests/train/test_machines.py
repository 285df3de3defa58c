"""What the doctor says of ranks and workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rltrain.rollout.worker.client import ServerInfo, WorkerLost
from rltrain.sync.pool import PushCost
from rltrain.train.machines import RankFacts, machine_findings, rank_finding, speed_finding, worker_finding

INFO = ServerInfo("0.32.0", "float32", 8, 4, "processed_logprobs", 0, None, 1, 2, True)
RANK = RankFacts(0, "a", {"torch": "2.13.0", "precision": "float32"})


def test_ranks_that_run_the_same_are_counted_by_machine() -> None:
    ranks = [RANK, replace(RANK, rank=1), replace(RANK, rank=2, node="b")]
    finding = rank_finding(ranks)
    assert finding.is_fine and finding.measured == "3 on a (2), b (1): torch 2.13.0, precision float32"


@pytest.mark.parametrize(
    ("software", "words"),
    [
        ({"torch": "2.12.0", "precision": "float32"}, "rank 1 on b has torch 2.12.0, rank 0 2.13.0"),
        ({"torch": "2.13.0"}, "rank 1 on b has precision -, rank 0 float32"),
    ],
)
def test_a_rank_that_runs_something_else_is_named(software: dict[str, str], words: str) -> None:
    finding = rank_finding([RANK, RankFacts(1, "b", software)])
    assert finding.is_fine is False and words in finding.measured


@pytest.mark.parametrize(
    ("workers", "is_fine", "words"),
    [
        ({"worker 0": INFO, "worker 1": INFO}, True, "2 with vLLM 0.32.0, float32: worker 0, worker 1"),
        ({"worker 0": INFO, "worker 1": replace(INFO, version="0.33.0")}, False, "1 with vLLM 0.33.0"),
        ({"worker 0": INFO, "worker 1": WorkerLost("no answer")}, False, "worker 1: no answer"),
        ({}, False, "none serves"),
    ],
)
def test_workers(workers: dict[str, Any], is_fine: bool, words: str) -> None:
    finding = worker_finding(workers)
    assert finding.is_fine is is_fine and words in finding.measured


def test_the_speed_of_weights_counts_every_worker() -> None:
    finding = speed_finding(PushCost(bytes=2**22, workers=2, seconds=0.5))
    assert finding.is_fine and finding.measured == "4.0 MiB to 2 in 0.50 s, every weight proved: 16 MiB/s"


def test_an_engine_without_workers_is_asked_for_none() -> None:
    assert len(machine_findings([RANK], object())) == 1
