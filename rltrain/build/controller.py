"""Builds the controller: on rank 0 its process, and in that what draws, samples and grades."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch

from rltrain.build.context import RunContext
from rltrain.build.engines import build_sampler
from rltrain.build.inputs import RunInputs, build_grader
from rltrain.build.pool import find_homes, make_connector, make_pusher, open_pool
from rltrain.build.rollout import (
    RolloutParts,
    SamplingLearner,
    add_journal,
    build_evaluator,
    build_guard,
    build_learner_sync,
    build_order,
    build_source,
    make_sampling,
)
from rltrain.build.schedule import WeightsDigest
from rltrain.build.server import read_names
from rltrain.config.schema import Data, RewardStage, Rollout, SampledRecipe
from rltrain.data.tokenization import Tokenization
from rltrain.errors import UserError
from rltrain.process import Process
from rltrain.protocols import RolloutEngine
from rltrain.rollout.colocated import ColocatedRollouts, GradedSampler
from rltrain.rollout.controller import (
    ControlledRollouts,
    Controller,
    RemoteDeadline,
    answer_calls,
    end_with_parent,
    pack_rollouts,
    sendable,
    start_process,
)
from rltrain.rollout.engines.checks import WeightShapes
from rltrain.rollout.engines.controlled_pool import ControlledPool, WorkerAddress
from rltrain.rollout.engines.vllm_pool import PoolSampler
from rltrain.rollout.extra_samples import SamplerContext
from rltrain.rollout.packed import pack_groups
from rltrain.rollout.pool.pool import ADMIT, WorkerPool
from rltrain.rollout.verdicts import label_of_only_function
from rltrain.rollout.worker.flags import WorkerSettings, worker_settings
from rltrain.rollout.worker.requests import ServerModel
from rltrain.rollout.worker.threads import LoopThread
from rltrain.sync.adapter import AdapterSync
from rltrain.timeline import Timeline
from rltrain.types.samples import Prompt, Sampling

__all__ = ["ControllerSetup", "build_controlled", "start_controller"]

_MODULE = "rltrain.build.controller"


@dataclass(frozen=True)
class ControllerSetup:
    """What the process needs to know, all of it plain data. known: every prompt by id, held-out ones too."""

    data: Data
    rollout: Rollout
    reward: RewardStage
    settings: WorkerSettings
    tokenization: Tokenization
    prompts: tuple[Prompt, ...]
    known: dict[str, Prompt]
    seed: int
    deadline_seconds: float
    rewards_log: Path
    timeline: Path


# rank 0's side ----------------------------------------------------------------------------------------------


def build_controlled(
    inputs: RunInputs,
    learner: SamplingLearner,
    context: RunContext,
    recipe: SampledRecipe,
    rollout: Rollout,
) -> RolloutParts:
    """Starts the controller, and through it the workers. See ``build_rollout``."""
    process = context.process
    inputs.grader.close()  # the controller has its own
    precision = learner.trained.settings.precision
    settings = worker_settings(
        recipe.model, recipe.data, rollout, precision, on_gpu=process.device.type == "cuda"
    )
    held_out = () if inputs.held_out is None else inputs.held_out.prompts
    known = {prompt.id: prompt for prompt in (*inputs.train.prompts, *held_out)}
    setup = ControllerSetup(
        recipe.data,
        rollout,
        recipe.reward,
        settings,
        inputs.tokenization,
        inputs.train.prompts,
        known,
        recipe.seed,
        inputs.grader.deadline_seconds,
        context.folder.rewards_log(0),
        context.folder.timeline,
    )
    controller, state = start_controller(setup, process)
    names = read_names(recipe.model)
    dtype = getattr(torch, settings.dtype)
    engine = ControlledPool(
        controller,
        make_connector(rollout, settings).connect,
        WeightShapes(names.shapes, names.parameters),
        make_pusher(names, dtype, process, rollout.server.bucket_mib),
        dtype,
        gather=process.gather,
    )
    target = cast("RolloutEngine", engine)
    longest = recipe.data.max_prompt_tokens + rollout.max_tokens
    sync = build_learner_sync(recipe.sync, target, learner, longest, recipe.seed, process.deadline)
    source = ControlledRollouts(
        controller, engine, process, inputs.train.prompts, known, sync.verify, sync.sleep, state
    )
    evaluator = None
    if inputs.held_out is not None:
        evaluator = build_evaluator(
            recipe.eval, recipe.reward, rollout.max_tokens, recipe.seed, inputs.held_out.prompts
        )
    journaled = add_journal(source, recipe.journal, context, WeightsDigest(learner), inputs.held_out)
    return RolloutParts(journaled, sync, evaluator, build_guard(rollout, dtype, learner.trained.precision))


def start_controller(setup: ControllerSetup, process: Process) -> tuple[Controller | None, dict[str, Any]]:
    """The controller on rank 0, and its state on every rank, once workers have answered. A collective.

    Raises UserError on every rank where no worker can be used.
    """
    controller = None
    event: list[tuple[str, Any]] = []
    if process.is_main:
        controller = Controller(*start_process(_MODULE, setup), process.deadline)
        with process.deadline(f"the {setup.rollout.engine} engine", "to start"):
            event = [controller.wait()]
    process.meet()
    kind, value = process.gather(event)[0]
    if kind == "error":
        if controller is not None:
            controller.close()
        raise value
    return controller, value


# the process ------------------------------------------------------------------------------------------------


class _SentElsewhere:
    """In place of a ``Sync``: rank 0 sends and verifies weights."""

    def verify(self) -> None: ...

    def sleep(self) -> None: ...


def serve(connection: Connection) -> None:
    """Answers rank 0 until it closes."""
    setup: ControllerSetup = pickle.loads(connection.recv_bytes())
    with ExitStack() as stack:
        try:
            calls, source = _build(setup, connection, stack)
        except (RuntimeError, ValueError, OSError) as error:
            connection.send(("error", sendable(error)))
            answer_calls(connection, {}, until=("close",))
        else:
            connection.send(("result", source.state_dict()))
            answer_calls(connection, calls, until=("close",))
    connection.send(("result", None))


def _build(
    setup: ControllerSetup, connection: Connection, stack: ExitStack
) -> tuple[dict[str, Callable[..., Any]], ColocatedRollouts]:
    """The calls that rank 0 makes, and the source of completions; ``stack`` closes what they use."""
    rollout = setup.rollout
    tokenization = setup.tokenization
    connector = make_connector(rollout, setup.settings)
    grader = stack.enter_context(build_grader(setup.reward, setup.deadline_seconds))
    grader.log_to(setup.rewards_log)
    homes = find_homes(rollout, setup.settings, connector)
    timeline = Timeline(setup.timeline)
    pool, loop, close_door = open_pool(homes, connector, rollout, tokenization.vocabulary, timeline)
    stack.callback(loop.close)
    stack.callback(lambda: loop.run(pool.close()).result())
    stack.callback(close_door)

    model = ServerModel(
        WeightShapes({}, ()),
        tokenization.vocabulary,
        tuple(sorted(tokenization.stop_tokens.stop)),
        tokenization.decode,
        setup.settings.max_model_len,
    )
    calls = _pool_calls(pool, loop)

    def admit() -> None:
        connection.send((ADMIT,))
        answer_calls(connection, calls, until=("admitted",))

    engine = PoolSampler(pool, loop, model, admit)
    source = _build_source(setup, cast("RolloutEngine", engine), grader, RemoteDeadline(connection))
    source.engine_notes = lambda: loop.run(pool.notes()).result()
    stack.callback(source.close)
    return calls | _source_calls(source, setup.known), source


def _build_source(
    setup: ControllerSetup, engine: RolloutEngine, grader: Any, deadline: RemoteDeadline
) -> ColocatedRollouts:
    rollout = setup.rollout
    tokenization = setup.tokenization
    sampler = build_sampler(setup.data, rollout, engine, tokenization)
    process = Process(deadline=deadline)
    sampling = make_sampling(rollout, setup.seed)
    order = build_order(
        setup.data.order,
        setup.prompts,
        rollout.prompts,
        setup.seed,
        cast("SamplingLearner", None),  # only orders that measure the learner ask it
        fresh=True,
    )
    verdict_of = label_of_only_function(setup.reward.functions)
    context = SamplerContext(
        sampler, sampling, setup.prompts, _refuse_reference, tokenization.encode_answer, deadline
    )
    graded = GradedSampler(sampler, grader, process, verdict_of)
    sync = cast("AdapterSync", _SentElsewhere())
    return build_source(rollout, graded, order, context, sync, lambda: None)


def _refuse_reference() -> Any:
    raise UserError("no worker of the controller's holds the reference model")


def _pool_calls(pool: WorkerPool, loop: LoopThread) -> dict[str, Callable[..., Any]]:
    def find_addresses(clients: dict[str, Any]) -> dict[str, WorkerAddress]:
        return {
            name: (client.url, client.token, pool.members[name].attached) for name, client in clients.items()
        }

    def run(work: Any) -> Any:
        return loop.run(work).result()

    return {
        "begin_push": lambda waiting: find_addresses(run(pool.begin_push(waiting_only=waiting))),
        "end_push": lambda *pushed: run(pool.end_push(*pushed)),
        "serving": lambda: find_addresses(run(pool.serving())),
        "lose": lambda errors: run(pool.lose(errors)),
    }


def _source_calls(source: ColocatedRollouts, known: dict[str, Prompt]) -> dict[str, Callable[..., Any]]:
    def take(step: int, version: int) -> Any:
        rollouts = source.take(step, version)
        return pack_rollouts(rollouts, known), source.state_dict()

    def evaluate(ids: list[str], sampling: Sampling, version: int, occasion: str) -> Any:
        prompts = [known[id] for id in ids]
        return pack_groups(source.evaluate(prompts, sampling, version, occasion), known)

    def observe(metrics: dict[str, float]) -> dict[str, Any]:
        source.observe(metrics)
        return source.state_dict()

    return {
        "take": take,
        "evaluate": evaluate,
        "observe": observe,
        "load_state_dict": source.load_state_dict,
    }


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
