"""Samples complete groups, for callers that wait for all of them. This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rltrain.protocols import Sampler
from rltrain.types.samples import PolicyVersion, Prompt, Request, RolloutGroup, Sampling
from rltrain.watchdog import Deadline, no_deadline


def sample_groups(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    policy: PolicyVersion,
    deadline: Deadline = no_deadline,
) -> list[RolloutGroup]:
    """``sampling.n`` completions for each prompt, in the order of ``prompts``; a group's id is its prompt's
    position.

    deadline: for all of them together. Raises as ``Sampler.sample`` does.
    """
    requests = [Request(prompt, sampling, 0, sampling.n) for prompt in prompts]
    size = f"{len(prompts)} x {sampling.n} completions of at most {sampling.max_tokens} tokens"
    with deadline(f"the {sampler.name} engine", f"to generate {size} with version {policy}"):
        answers = {answer.request: answer for answer in sampler.sample(requests, policy)}

    groups: list[RolloutGroup] = []
    for index in range(len(requests)):
        answer = answers[index]
        groups.append(RolloutGroup(index, answer.prompt, answer.completions))
    return groups
