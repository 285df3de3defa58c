"""What plays the episodes of a recipe: worker processes, and the dialogue between them and the policy."""

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
    """The processes that episodes are played in; they start at once."""
    module, attribute = user_class(ref.name) or (
        ENVIRONMENTS.spec(ref.name).module,
        ENVIRONMENTS.spec(ref.name).attribute,
    )
    setup = EnvironmentSetup(module, attribute, ref.hp, ref.seconds, int(ref.memory_gib * 2**30))
    return EnvironmentPool(setup, workers=ref.workers, reset_seconds=ref.reset_seconds)


def build_dialogue(data: Data, ref: EnvironmentRef, tokenization: Tokenization) -> Dialogue:
    stop, limit = tokenization.stop_tokens.stop, ref.observation_tokens
    return Dialogue(tokenization.tokenizer, stop, data, role=ref.role, observation_tokens=limit)


def check_environment(
    data: Data, ref: EnvironmentRef | None, tokenization: Tokenization, prompt: Prompt
) -> None:
    """Begins one episode.

    Raises ValueError where the environment cannot be made, refuses the task, or cannot speak to the policy.
    """
    if ref is None:
        return
    dialogue, pool = build_dialogue(data, ref, tokenization), build_pool(ref)
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
