"""EMPO's reward with a model that says which answers mean the same, as in its free-text runs,
arXiv:2504.05812.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from rltrain.reward import answer_text, remote
from rltrain.reward.answer_clusters import Rules, cluster, same_words, score_clusters
from rltrain.reward.judge import check_comparisons, make_chat_endpoint, make_question, quote, reply_text
from rltrain.reward.remote import RemoteError
from rltrain.reward.score import RewardInputs, Score, reward

_DECISION = re.compile(r"\bfinal decision: *(yes|no)\b", re.IGNORECASE)


def check_model(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    yield from check_comparisons(values, recipe)


@reward("empo_model", scope="group", traits={"reports_answer"}, check=check_model)
def empo_model(
    inputs: RewardInputs,
    *,
    url: str = "",
    model: str = "",
    empty: float | None = -0.5,
    all_distinct: Literal["zero", "keep"] = "keep",
    min_share: float = 0.2,
    copies: Literal["keep", "zero"] = "zero",
    entropy_low: float | None = None,
    entropy_high: float | None = None,
    token_env: str | None = None,
    max_tokens: int = 512,
    concurrency: int = 8,
    seconds: float = 60.0,
) -> list[Score]:
    """EMPO for answers in words: as ``empo``, where a model behind an OpenAI-compatible endpoint
    (``vllm serve``) decides whether two answers to the prompt mean the same, arXiv:2504.05812.

    url, model, token_env, max_tokens, concurrency, seconds: as for ``llm_judge``. The paper asks a verifier
    of 1.5B parameters. Answers that differ in case, articles and punctuation alone need no question. Each
    other answer is compared with the first member of every cluster so far, all at once; the model ends with
    "Final Decision: Yes" or "Final Decision: No", and an answer without either counts as No. The defaults of
    the other hyperparameters, those of ``empo``, are the released free-text form's.

    parts: as for ``empo``. Ungraded, all completions of the prompt: as for ``reward_model_http``, since one
    lost comparison may move every share. Raises ValueError without url, model or token.
    """
    endpoint = make_chat_endpoint(url, model, token_env, seconds, "empo_model")
    answers = [answer_text.extract_answer(completion) for completion in inputs.completions]

    def find_equal(members: Sequence[str], answer: str) -> str | None:
        if plain := next((member for member in members if same_words(member, answer)), None):
            return plain
        texts = [_equivalence_request(inputs.prompt, member, answer) for member in members]
        questions = [make_question(model, max_tokens, text) for text in texts]
        for member, reply in zip(
            members, remote.ask_all(endpoint, questions, reply_text, concurrency), strict=True
        ):
            if isinstance(reply, RemoteError):
                raise reply
            if is_equivalent(reply):
                return member
        return None

    try:
        clusters = cluster(answers, find_equal)
    except RemoteError as error:
        return [Score(0.0, ungraded=error.reason, why=str(error))] * len(answers)
    rules = Rules(empty, all_distinct, min_share, copies, entropy_low, entropy_high)
    return score_clusters(inputs, answers, clusters, rules)


def is_equivalent(reply: str) -> bool:
    """Whether the model's last decision in ``reply`` is Yes; False without any."""
    decisions = _DECISION.findall(reply)
    return bool(decisions) and decisions[-1].lower() == "yes"


def _equivalence_request(prompt: str, first: str, second: str) -> str:
    quoted = quote(question=prompt, answer_A=first, answer_B=second)
    return (
        "Do two answers to a question mean the same? Do not answer the question yourself, and do not judge "
        f'whether either answer is right.\n\n{quoted}\n\nEnd with "Final Decision: Yes" if both give the '
        'same answer to the question, or "Final Decision: No" if they do not.'
    )
