"""Samples complete groups, for callers that wait for all of them. This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rltrain.protocols import Sampler, WrongVersionError
from rltrain.types.samples import Answer, PolicyVersion, Prompt, Request, RolloutGroup, Sampling
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

    deadline: for all of them together. Raises as ``Sampler.sample`` does, and WrongVersionError where a token
    was sampled by another version than ``policy``.
    """
    requests = [Request(prompt, sampling, 0, sampling.n) for prompt in prompts]
    size = f"{len(prompts)} x {sampling.n} completions of at most {sampling.max_tokens} tokens"
    with deadline(f"the {sampler.name} engine", f"to generate {size} with version {policy}"):
        answers = {answer.request: answer for answer in sampler.sample(requests, policy)}

    groups: list[RolloutGroup] = []
    for index in range(len(requests)):
        answer = answers[index]
        require_versions(answer, policy, sampler.name)
        groups.append(RolloutGroup(index, answer.prompt, answer.completions))
    return groups


def require_versions(answer: Answer, policy: PolicyVersion, sampler: str) -> None:
    """Raises WrongVersionError unless every token is of ``policy``: a step and an evaluation each name the
    version whose samples they are.
    """
    for completion in answer.completions:
        for span in completion.versions:
            if span.version != policy:
                raise WrongVersionError(
                    f"the {sampler} engine was asked for samples of version {policy}, and tokens "
                    f"{span.start} to {span.stop} of a completion of prompt {answer.prompt.id!r} are of "
                    f"version {span.version}"
                )
