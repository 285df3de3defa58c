"""The parts that play a recipe's episodes: worker processes, and the dialogue between them and the policy."""

from __future__ import annotations

from rltrain.config.rules.environment import user_class
from rltrain.config.rules.registries import ENVIRONMENTS
from rltrain.config.schema import Data, EnvironmentRef
from rltrain.data.chat import Dialogue
from rltrain.data.tokenization import Tokenization
from rltrain.rollout.environments import Task
from rltrain.rollout.environments.pool import EnvironmentPool, Failure, Opening
from rltrain.rollout.environments.worker import EnvironmentSetup
from rltrain.types.samples import Prompt


def build_pool(ref: EnvironmentRef) -> EnvironmentPool:
    """The processes in which episodes are played; they start immediately."""
    module, attribute = user_class(ref.name) or (
        ENVIRONMENTS.spec(ref.name).module,
        ENVIRONMENTS.spec(ref.name).attribute,
    )
    setup = EnvironmentSetup(module, attribute, ref.hp, ref.seconds, int(ref.memory_gib * 2**30))
    return EnvironmentPool(setup, workers=ref.workers, reset_seconds=ref.reset_seconds)


def build_dialogue(data: Data, ref: EnvironmentRef, tokenization: Tokenization) -> Dialogue:
    return Dialogue(
        tokenization.tokenizer,
        tokenization.stop_tokens.stop,
        data,
        role=ref.role,
        observation_tokens=ref.observation_tokens,
    )


def check_environment(
    data: Data, ref: EnvironmentRef | None, tokenization: Tokenization, prompt: Prompt
) -> None:
    """Begins one episode.

    Raises ValueError if the environment cannot be created, refuses the task, or if its text cannot be
    rendered for the policy.
    """
    if ref is None:
        return

    dialogue = build_dialogue(data, ref, tokenization)
    pool = build_pool(ref)
    try:
        pool.begin([(Task(prompt.id, prompt.text, dict(prompt.columns)), 0)])
        [(_, opening)] = pool.answers()
        pool.end()
    finally:
        pool.close()

    if isinstance(opening, Failure):
        raise ValueError(
            f"rollout.environment {ref.name} fails on the first task ({opening.reason}): {opening.message}"
        )
    assert isinstance(opening, Opening)
    if opening.text is not None:
        dialogue.opening(opening.text)
