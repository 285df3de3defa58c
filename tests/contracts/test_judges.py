"""What everybody promises who says which of two answers is better: one suite, run against the judges of pairs
and those behind servers.

All of them here prefer the longer answer, cannot make anything of one with a "?", and those that read two
answers at once are drawn to the first: only a judge that asks in both orders gets through.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest
import torch

from rltrain.reward.judge import llm_judge, llm_judge_pairs
from rltrain.reward.reward_model_http import reward_model_http
from rltrain.reward.score import RewardInputs, Score
from rltrain.rollout.pairs.judges import JudgeContext, ModelJudge, RewardJudge, SelfJudge
from rltrain.rollout.pairs.pairing import Judge, Pairing
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span
from support.patience import PATIENCE

Verdict = float | None  # P(first is better); None: there is none, and the pair counts for nothing
ASKED = "Add 1 and 2."
BIAS = 0.3  # nats that the first of two answers gains by its place


# judges of pairs --------------------------------------------------------------------------------------------


def means(**changes: Any) -> JudgeContext:
    def log_probs(rows: TokenRows, by: str) -> torch.Tensor:
        """Of the words "A" (first half) and "B": the longer answer's, with a pull to A."""
        del by
        half = len(rows) // 2
        answers = [re.findall(r"<(.*?)>", "".join(map(chr, prompt))) for prompt in rows.prompts[:half]]
        lead = torch.tensor([float(len(first) - len(second)) + BIAS for first, second in answers])
        return torch.cat([lead, torch.zeros(half)])

    def reward_model(path: str, *, prompt_column: str | None, max_tokens: int) -> Any:
        del path, prompt_column, max_tokens
        return lambda rows: [
            math.nan if "?" in inputs.completions[place] else float(len(inputs.completions[place]))
            for inputs, place in rows
        ]

    settings: dict[str, Any] = {
        "log_probs": log_probs,
        "reward_model": reward_model,
        "decode": lambda ids: ASKED,
        "word": ord,
        "gather": list,
    }
    settings["render"] = lambda text: [*map(ord, text), *[0] * 1000 * text.count("??")]  # too long to be read
    return JudgeContext(**{**settings, "rank": 0, "ranks": 1, "max_tokens": 500, **changes})


def by_pairing(judge: Judge, first: str, second: str) -> Verdict:
    """The verdict as a run would take it."""
    completions = tuple(
        Completion(tuple(map(ord, text)), (0.0,) * len(text), "stop", text, (Span(0, len(text), 0),))
        for text in (first, second)
    )
    scores = tuple(
        Score(0.0, ungraded="unparsable") if "?" in text else Score(float(len(text)))
        for text in (first, second)
    )
    if not isinstance(judge, RewardJudge):
        scores = (Score(0.0),) * 2  # nobody but that judge knows of rewards
    judged = Pairing(judge, "disjoint", "likelier", 0.0, 0)(
        [ScoredGroup(0, Prompt("p", (7,), ASKED), completions, scores)], 1
    )
    if not judged.pairs:
        assert dict(judged.dropped) in ({}, {"tied": 1}, {"unjudged": 1})
        return 0.5 if judged.dropped.get("tied") else None
    (pair,) = judged.pairs
    return pair.p_chosen if pair.chosen == 0 else 1 - pair.p_chosen


PAIRS: dict[str, Callable[[], Judge]] = {
    "reward": lambda: RewardJudge(means(), noise=0.1),
    "reward, by difference": lambda: RewardJudge(means(), scale=0.5),
    "reward_model": lambda: ModelJudge(means(), path="model"),
    "self": lambda: SelfJudge(means(), template="{prompt} <{first}> <{second}>"),
}


# judges behind servers --------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.mood == "hangs":
            time.sleep(600)
        body = json.dumps(answer_to(question)).encode()
        self.send_response(500 if self.server.mood == "fails" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that gave up is no news for the next test's output."""

    daemon_threads = True
    mood: Literal["answers", "hangs", "fails"] = "answers"


def answer_to(question: dict[str, Any]) -> dict[str, Any]:
    if "completions" in question:
        return {"scores": [float(len(text)) if "?" not in text else None for text in question["completions"]]}
    lines = question["messages"][0]["content"].splitlines()
    answers = [lines[number + 1] for number, line in enumerate(lines) if line.startswith("<<<response")]
    if any("?" in answer for answer in answers):
        said = "I cannot tell."
    elif len(answers) == 1:
        said = f"[[{len(answers[0])}]]"
    else:
        said = "[[A]]" if len(answers[0]) + BIAS > len(answers[1]) else "[[B]]"
    return {"choices": [{"message": {"content": said}}]}


@dataclass
class Served:
    """A reward that asks a server, as a judge of two answers."""

    reward: Callable[..., list[Score]]
    pairwise: bool
    hp: dict[str, Any] = field(default_factory=dict)

    def scores(self, server: Server, answers: Sequence[str], seconds: float = 5.0) -> list[Score]:
        inputs = RewardInputs(ASKED, tuple(answers), (1,) * len(answers), ("stop",) * len(answers), {})
        return self.reward(inputs, url=f"http://127.0.0.1:{server.server_port}", seconds=seconds, **self.hp)

    def verdict(self, server: Server, first: str, second: str) -> Verdict:
        # one by one where a score is of one answer: a server that gives no number for one answers for none of
        # them
        scores = (
            self.scores(server, (first, second))
            if self.pairwise
            else [self.scores(server, (completion,))[0] for completion in (first, second)]
        )
        if any(score.ungraded is not None for score in scores):
            return None
        first_score, second_score = (score.value for score in scores)
        return (
            0.5 + (first_score - second_score) / 2
            if self.pairwise
            else 0.5 + 0.5 * ((first_score > second_score) - (first_score < second_score))
        )


SERVED = {
    "llm_judge": Served(llm_judge, False, {"model": "j"}),
    "llm_judge_pairs": Served(llm_judge_pairs, True, {"model": "j"}),
    "reward_model_http": Served(reward_model_http, False),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    http_server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield http_server
    http_server.shutdown()
    http_server.server_close()


@pytest.fixture(params=[*PAIRS, *SERVED])
def verdict(request: pytest.FixtureRequest, server: Server) -> Callable[[str, str], Verdict]:
    server.mood = "answers"
    if request.param in PAIRS:
        judge = PAIRS[request.param]()
        return lambda first, second: by_pairing(judge, first, second)
    return lambda first, second: SERVED[request.param].verdict(server, first, second)


# the contract -----------------------------------------------------------------------------------------------


def test_the_better_answer_is_preferred_in_either_place(verdict: Any):
    first, turned = verdict("aaaa", "b"), verdict("b", "aaaa")
    assert first > 0.5 > turned
    assert first + turned == pytest.approx(1.0)


def test_equal_answers_are_a_tie_whatever_their_place(verdict: Any):
    assert verdict("aa", "bb") == verdict("bb", "aa") == pytest.approx(0.5)


def test_what_it_makes_nothing_of_gets_no_verdict_and_no_zero(verdict: Any):
    assert verdict("aa", "b??") is None
    assert verdict("b??", "aa") is None


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(("mood", "reason"), [("hangs", "timeout"), ("fails", "server_error")])
def test_a_server_that_does_not_answer_in_time_leaves_all_ungraded(
    name: str, mood: Any, reason: str, server: Server
):
    server.mood = mood
    started = time.monotonic()
    assert SERVED[name].scores(server, ("aa", "b"), seconds=0.4) == [Score(0.0, ungraded=reason)] * 2
    assert time.monotonic() - started < PATIENCE


def test_every_judge_of_pairs_is_held_to_this():
    from rltrain.config.rules.registries import JUDGES

    assert set(JUDGES.names()) <= set(PAIRS)
