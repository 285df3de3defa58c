"""Samplers without a model, for tests of what stands on one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rltrain.types.samples import Answer, Completion, PolicyVersion, Prompt, Request, Sampling, Span


class EchoSampler:
    """Writes the prompt's first token once per completion; keeps what it was asked."""

    name = "echo"

    def __init__(self) -> None:
        self.asked: list[
            tuple[tuple[Prompt, ...], Sampling, PolicyVersion]
        ] = []  # a call each, of one sampling
        self.requests: list[Request] = []

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        self.requests += requests
        if requests:
            [sampling] = {request.sampling for request in requests}
            self.asked.append((tuple(request.prompt for request in requests), sampling, policy))
        answers: list[Answer] = []
        for index, request in enumerate(requests):
            samples = range(request.first, request.first + request.count)
            completions = tuple(self.completion(request, sample, policy) for sample in samples)
            answers.append(Answer(index, request.prompt, completions))
        return iter(answers)

    def completion(self, request: Request, sample: int, policy: PolicyVersion) -> Completion:
        del sample
        token = request.prompt.token_ids[0]
        source = request.sampling.source
        return Completion((token,), (-0.5,), "stop", request.prompt.text, (Span(0, 1, policy),), source)

    def close(self) -> None:
        pass
