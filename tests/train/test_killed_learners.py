"""A learner is killed while its workers sample ahead of it, or in the middle of a push to them. The next one
goes on with what is on the disk: under a lag to the bit, under a bound with every group that was there, none
of them lost or trained on twice.
"""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.parquet import read_table

from rltrain.checkpoint.journal import Journal, WaitingGroups
from rltrain.checkpoint.journal_table import groups_of_table
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.types.samples import RolloutGroup, ScoredGroup
from support.fake_pool import make_weights, wait_until
from support.fake_worker import FakeWorker
from support.learners import GO, error_of, learn_here, read_saved
from support.pool_runs import PROMPTS, digest, update
from support.warm import warm_context

STEPS = 6
OLDEST = 2
STUCK_SECONDS = 600.0  # of a token


@pytest.fixture(scope="module")
def workers() -> Iterator[list[FakeWorker]]:
    """Two that outlive every learner."""
    with contextlib.ExitStack() as stack:
        opened = [FakeWorker() for _ in range(2)]
        for worker in opened:
            stack.callback(worker.close)
        yield opened


def start(folder: Path, workers: list[FakeWorker], schedule: str, **options: Any) -> Any:
    """A process that learns."""
    folder.mkdir(exist_ok=True)
    urls = [worker.url for worker in workers]
    process = warm_context().Process(
        target=learn_here, args=(folder, urls, schedule, STEPS, OLDEST), kwargs=options
    )
    process.start()
    return process


def finish(folder: Path, workers: list[FakeWorker], schedule: str) -> dict[str, Any]:
    """The last checkpoint of a learner that nobody kills."""
    process = start(folder, workers, schedule)
    process.join(300)
    process.kill()
    assert process.exitcode == 0
    saved = read_saved(folder)
    assert saved is not None and saved["step"] == STEPS
    return saved


def kill_while_sampling(folder: Path, workers: list[FakeWorker], schedule: str) -> None:
    """When some groups are there and others are under way: on a worker that has come to a stand."""
    stuck = workers[1]
    left = stuck.read("running")  # of learners that were killed before
    process = start(folder, workers, schedule, waits_after=2)
    wait_until(lambda: (read_saved(folder) or {"step": 0})["step"] == 2)
    stuck.change(seconds=STUCK_SECONDS)
    (folder / GO).touch()
    wait_until(lambda: stuck.read("running") > left and (schedule == "lag" or waiting(folder).numbers()))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    stuck.change(seconds=0.001)


def kill_in_push(folder: Path, workers: list[FakeWorker], schedule: str) -> None:
    """When the workers have a part of the weights."""
    process = start(folder, workers, schedule, dies_in_push=3)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


KILLS = {"while workers sample": kill_while_sampling, "in a push": kill_in_push}


def waiting(folder: Path) -> WaitingGroups:
    return WaitingGroups(RunFolder(folder))


def trained_on(folder: Path) -> dict[int, tuple[ScoredGroup, ...]]:
    journal = Journal(RunFolder(folder))
    return {step: journal.read(step).groups for step in journal.steps()}


@pytest.fixture(scope="module")
def uninterrupted(workers: list[FakeWorker], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The final weights under the lag."""
    folder = tmp_path_factory.mktemp("lag") / "run"
    return digest(finish(folder, workers, "lag")["weights"])


@pytest.mark.parametrize("kill", KILLS)
def test_under_a_lag_a_killed_learner_goes_on_to_the_bit(
    kill: str, workers: list[FakeWorker], uninterrupted: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    KILLS[kill](folder, workers, "lag")
    saved = read_saved(folder)
    assert saved is not None and saved["step"] < STEPS
    ahead = [step for step, _ in saved["state"]["ahead"]]
    assert ahead == [*range(saved["step"] + 1, min(saved["step"] + OLDEST, STEPS) + 1)]
    before = trained_on(folder)
    assert set(before) >= {*range(1, saved["step"] + 1), *ahead}
    assert digest(finish(folder, workers, "lag")["weights"]) == uninterrupted
    after = trained_on(folder)
    assert sorted(after) == [*range(1, STEPS + 1)]
    assert {step: after[step] for step in before} == before  # nothing of it was sampled again


@pytest.mark.parametrize("kill", KILLS)
def test_under_a_bound_a_killed_learner_loses_no_group(
    kill: str, workers: list[FakeWorker], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    KILLS[kill](folder, workers, "bounded")
    before = trained_on(folder)
    disk = waiting(folder)
    kept = [group for number in disk.numbers() for group in groups_of_table(read_table(disk.path(number)))]
    assert kept or kill == "in a push"
    saved = finish(folder, workers, "bounded")

    after = trained_on(folder)
    assert sorted(after) == [*range(1, STEPS + 1)]
    assert {step: after[step] for step in before} == before
    trained = [group for groups in after.values() for group in groups]
    prompts = Counter(group.prompt.id for group in trained)
    assert prompts == {prompt.id: STEPS for prompt in PROMPTS}
    tokens = [tuple(completion.token_ids for completion in group.completions) for group in trained]
    assert len(set(tokens)) == len(tokens)  # no group twice
    assert all(tuple(row.token_ids for row in group.completions) in tokens for group in kept)
    assert not disk.numbers()
    for step, groups in after.items():
        for group in groups:
            for completion in group.completions:
                ages = [step - 1 - span.version for span in completion.versions]
                assert min(ages) >= 0 and max(ages) <= OLDEST
                assert error_of(group.prompt.token_ids[-1], completion, saved["past"]) < 1e-5

    # what the journal has makes the final weights
    weights = make_weights(3)
    for groups in after.values():
        update(weights, [RolloutGroup(each.group, each.prompt, each.completions) for each in groups])
    assert digest(weights) == digest(saved["weights"])
