"""What the model wrote, readable line by line."""

import json
import math

from rltrain.report.reporter import Reporter
from rltrain.report.transcripts import Transcripts
from rltrain.reward.score import Score
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span


def group(number: int) -> ScoredGroup:
    completions = (
        Completion((5, 6), (-0.1, -0.2), "stop", "4\u2028!", (Span(0, 2, 3),)),
        Completion((5,), (-0.1,), "length", "", (Span(0, 1, 4),), source=1),
    )
    scores = (Score(1.0, {"correct": 1.0, "odd": math.nan}), Score(0.0, ungraded="timeout"))
    return ScoredGroup(number, Prompt(f"row-{number}", (1, 2), "2 + 2 ="), completions, scores)


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_first_groups_of_a_step_are_kept_whole(tmp_path):
    kept = Transcripts(tmp_path / "t.jsonl", groups_per_step=2)
    kept.log(7, [group(0), group(1), group(2)])
    first, second = read(tmp_path / "t.jsonl")
    assert (first["step"], first["prompt_id"], second["prompt_id"], first["prompt"]) == (
        7,
        "row-0",
        "row-1",
        "2 + 2 =",
    )
    assert first["completions"][0] == {
        "text": "4\u2028!",
        "score": 1.0,
        "parts": {"correct": 1.0, "odd": None},
        "ungraded": None,
        "finish": "stop",
        "tokens": 2,
        "version": 3,
        "source": 0,
    }


def test_an_ungraded_completion_has_a_reason_and_no_score(tmp_path):
    kept = Transcripts(tmp_path / "t.jsonl", 1)
    kept.log(1, [group(0)])
    bad = read(tmp_path / "t.jsonl")[0]["completions"][1]
    assert bad["score"] is None and bad["ungraded"] == "timeout" and bad["source"] == 1


def test_held_out_prompts_are_kept_at_every_evaluation(tmp_path):
    reporter = Reporter(None, Transcripts(tmp_path / "t.jsonl", 1), None)
    for step in (0, 5):
        reporter.evaluation(step, {"eval/reward": 0.5}, [group(0), group(1)])
    reporter.evaluation(9, {"eval/accuracy": 0.5})  # of judged examples: nothing was sampled
    reporter.close()
    lines = read(tmp_path / "t.jsonl")
    assert [(line["step"], line["stage"], line["prompt_id"]) for line in lines] == [
        (0, "eval", "row-0"),
        (5, "eval", "row-0"),
    ]


def test_zero_groups_keep_nothing(tmp_path):
    kept = Transcripts(tmp_path / "t.jsonl", 0)
    kept.log(1, [group(0)])
    assert read(tmp_path / "t.jsonl") == []
