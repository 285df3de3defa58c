"""Rules about truncated sampling, repetition penalties and stop texts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.schema import OnlinePairsRecipe, SampledRecipe


def token_choice_problems(recipe: SampledRecipe) -> Iterator[str]:
    """Why the recipe's completions could not be sampled so, or not be learned from."""
    rollout = recipe.rollout
    if rollout.engine == "vllm_server" and recipe.eval.top_h is not None:
        yield (
            f"eval.top_h is {recipe.eval.top_h:g}, which vLLM's server does not have; use rollout.engine "
            "vllm or transformers, or eval.top_p"
        )
    if rollout.environment is not None:
        for key, stop in (("rollout", rollout.stop), ("eval", recipe.eval.stop)):
            if stop:
                yield (
                    f"{key}.stop is given, but in rollout.environment {rollout.environment.name} EOS ends a "
                    f"turn and the environment an episode; drop {key}.stop or the environment"
                )
    if rollout.repetition_penalty != 1:
        yield (
            f"rollout.repetition_penalty is {rollout.repetition_penalty:g}: it changes logits by the text "
            "before them, so that the learner's log-probs would be of another distribution than the one "
            "sampled from; leave it at 1, and set eval.repetition_penalty for evaluations"
        )
    if rollout.truncates:
        yield from _truncation_problems(recipe)


def _truncation_problems(recipe: SampledRecipe) -> Iterator[str]:
    """Why rollouts could not be truncated."""
    rollout = recipe.rollout
    name = "rollout.top_p (or top_k, min_p, top_h)"
    if isinstance(recipe, OnlinePairsRecipe):
        yield (
            f"{name} truncates the sampling, but a preference loss takes log-probs of whole distributions, "
            "and the comparison with the engine's would end the run; sample pairs from all tokens"
        )
    if rollout.engine == "vllm_server":
        yield (
            f"{name} truncates the sampling, but vLLM's server does not return the tokens that stay, over "
            "which the learner must renormalise; use rollout.engine vllm or transformers"
        )
    for key, value in (
        ("environment", rollout.environment),
        ("extra_samples", rollout.extra_samples),
        ("adaptive_temperature", rollout.adaptive_temperature),
    ):
        if value:
            yield (
                f"{name} truncates the sampling, which rollout.{key} does not know: some log-probs would be "
                "of whole distributions and others not; drop one of them"
            )
