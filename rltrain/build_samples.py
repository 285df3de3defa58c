"""The engine with which a recipe that learns from judged completions looks at the policy's own."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from rltrain.config.schema import OfflineRecipe
from rltrain.data.chat import Endings
from rltrain.data.labels import Labelled
from rltrain.data.preferences import Pair
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.rollout.watched import WatchedEngine
from rltrain.seeds import stable_hash
from rltrain.sync.in_process import Sync
from rltrain.train.own_samples import OwnSamples
from rltrain.types import Prompt, Sampling
from rltrain.watchdog import Waiting, unwatched

__all__ = ["build_own_samples"]


def build_own_samples(
    recipe: OfflineRecipe,
    endings: Endings,
    learner: PreferenceLearner,
    held_out: Sequence[Pair | Labelled],
    waiting: Waiting = unwatched,
) -> OwnSamples | None:
    """One completion at temperature 1 of ``eval.samples`` held-out prompts, or of all where they are fewer; None where none is wanted."""
    if recipe.eval.samples == 0:
        return None
    from rltrain.rollout.transformers_engine import TransformersEngine

    seed = stable_hash(recipe.seed, "own samples")
    distinct = list(dict.fromkeys(one.prompt for one in held_out))
    chosen = Random(seed).sample(distinct, min(recipe.eval.samples, len(distinct)))
    model, device = recipe.model, learner.device
    whole = device.type == "cpu" or recipe.learner.precision == "float32"
    engine = TransformersEngine(
        model.path,
        revision=model.revision,
        stop_token_ids=endings.stop,
        pad_token_id=endings.pad,
        decode=lambda token_ids: "",  # nobody reads them
        max_rows=256,
        device=device,
        dtype=torch.float32 if whole else torch.bfloat16,
        attention="auto" if model.attention == "flash_attention_2" else model.attention,
    )
    engine.sleep()
    prompts = tuple(Prompt(f"{number:06d}", token_ids, "") for number, token_ids in enumerate(chosen))
    watched = WatchedEngine(engine, "transformers", waiting)
    sync = Sync(watched, learner.names.ties, sample=1, full_every=1, seed=seed)
    return OwnSamples(watched, sync, prompts, Sampling(n=1, temperature=1.0, max_tokens=recipe.data.max_completion_tokens, seed=seed))
