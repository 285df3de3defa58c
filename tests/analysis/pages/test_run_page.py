"""The data of a run's page: facts, changes, costs, curves and completions."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rltrain.analysis.curves import Curves
from rltrain.analysis.pages.charts import Chart, Line, chart_data, law_data, run_charts, thin_steps
from rltrain.analysis.pages.completions import cut_text, group_record, mark_turned_right, read_completions
from rltrain.analysis.pages.lanes import LIMIT as LANES
from rltrain.analysis.pages.lanes import lanes_data
from rltrain.analysis.pages.render import embed_json, format_number, format_seconds, inline_asset, render_page
from rltrain.analysis.pages.run_page import page_data, page_notes, run_page, write_missing_report
from rltrain.analysis.pages.summary import list_changes, list_costs, read_facts
from rltrain.analysis.pages.timeline import LIMIT, timeline_data
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.errors import UserError
from rltrain.report.sinks import JsonLines
from rltrain.report.transcripts import Transcripts
from rltrain.reward.score import Score
from rltrain.timeline import Timeline
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span
from support.report_runs import completion, group, training_step, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder.from_path(write_run(tmp_path_factory.mktemp("runs") / "mine"))


@pytest.fixture(scope="module")
def curves(folder: RunFolder) -> Curves:
    return Curves.read(folder.path)


# facts, changes, costs --------------------------------------------------------------------------------------


def test_the_facts_are_the_recipes_and_the_environments(folder: RunFolder) -> None:
    facts = read_facts(folder)
    assert facts.title == "GRPO <b>small</b>" and facts.is_current
    stated = dict(facts.facts)
    assert stated["method"] == "group_norm + clip" and stated["model"] == "models/tiny"
    assert stated["engine"] == "transformers" and stated["seed"] == "3"
    assert stated["date"] == "2026-11-30 02:00 UTC" and stated["rltrain"] == "0.2.0 abc123"


def test_the_settings_are_those_that_differ_from_the_defaults(folder: RunFolder) -> None:
    settings = {setting.key: (setting.value, setting.default) for setting in read_facts(folder).settings}
    assert settings["seed"] == ("3", "0") and settings["train.steps"] == ("100", None)
    assert "eval.temperature" not in settings and "about.title" not in settings


def test_a_recipe_of_another_version_is_shown_whole(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "recipe.resolved.yaml").write_text(folder.recipe.read_text() + "sampler: {old: true}\n")
    facts = read_facts(RunFolder.from_path(tmp_path))
    assert not facts.is_current and facts.settings[-1].key == "train.steps"
    assert ("sampler.old", "true") in [(setting.key, setting.value) for setting in facts.settings]


def test_a_change_is_marked_where_the_intervals_are_apart(curves: Curves) -> None:
    changes = {change.name: change for change in list_changes(curves)}
    accuracy = changes["pass@1"]
    assert accuracy.before is not None and (accuracy.before.value, accuracy.after.value) == (0.4, 0.7)
    assert accuracy.better == 1 and accuracy.apart
    assert not changes["reward"].apart  # no interval is known
    entropy = changes["training entropy"]
    assert entropy.before is not None and entropy.better == 0 and entropy.after.value < entropy.before.value


def test_a_run_that_was_not_evaluated_at_its_start_shows_no_change(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log(1, training_step(1))
    lines.log(1, {"eval/pass@1": 0.5})
    lines.close()
    change = list_changes(Curves.read(tmp_path))[0]
    assert change.before is None and change.better == 0 and not change.apart


def test_costs_are_sums_over_the_steps(curves: Curves) -> None:
    costs = {label: (amount, unit) for label, amount, unit in list_costs(curves)}
    assert costs["training time"] == (150.0, "s") and costs["tokens sampled"] == (3200.0, "")
    assert costs["evaluation time"] == (5.0, "s") and costs["tokens a second, median step"] == (21.0, "")


# curves -----------------------------------------------------------------------------------------------------


def test_every_metric_is_in_exactly_one_chart(curves: Curves) -> None:
    charts, others = run_charts(curves)
    names = [
        name
        for chart in (*charts, *others)
        for line in chart.lines
        for name in (line.metric, line.low, line.high)
        if name is not None
    ]
    totals = {"time/step", "time/eval"}
    assert totals <= {line.metric for chart in others for line in chart.lines}
    assert sorted(names) == sorted(set().union(*curves.steps, *curves.evals) - {"step"})
    titles = [chart.title for chart in charts]
    assert titles[:4] == ["Reward", "Held-out pass@k", "Entropy", "Covariance"]
    entropy = charts[2].lines[0]
    assert (entropy.low, entropy.high) == ("learner/entropy_p10", "learner/entropy_p90")


def test_a_chart_has_one_value_for_each_step_and_draws_equal_curves_once(curves: Curves) -> None:
    data = chart_data(run_charts(curves)[0][0], curves)
    labels = [line["label"] for line in data["lines"]]
    assert labels == ["mean, correct", "held-out reward"]
    training, held_out = data["lines"]
    assert data["x"] == list(range(101)) and len(training["values"]) == len(held_out["values"]) == 101
    assert training["values"][0] is None and held_out["values"][1] is None
    first = [curves.steps[place]["reward/mean"] for place in (0, 1)]
    assert training["smooth"][2] == pytest.approx(sum(first) / 2, rel=1e-4)
    assert held_out["sparse"] and held_out["smooth"] is None


def test_thinning_keeps_peaks_ends_and_curves_of_few_points() -> None:
    steps = list(range(20_000))
    dense = dict.fromkeys(steps, 0.0) | {7_777: 5.0, 13_131: -5.0}
    sparse = dict.fromkeys(steps[::1000], 1.0)
    chosen = thin_steps(steps, [dense, sparse], points=1_000)
    assert {0, 19_999, 7_777, 13_131} <= set(chosen) and set(sparse) <= set(chosen)
    assert len(chosen) <= 1_000 and chosen == sorted(chosen)
    assert thin_steps(steps[:900], [dense], points=1_000) == steps[:900]


def test_a_logarithmic_axis_needs_positive_numbers(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step, value in ((1, 0.0), (2, 1e-6)):
        lines.log(step, {"time/step": 1.0, "rollout/mismatch_abs": value})
    lines.close()
    chart = Chart("mismatch", "nats", "", (Line("rollout/mismatch_abs", "abs"),), log=True)
    assert not chart_data(chart, Curves.read(tmp_path))["log"]


def test_the_law_is_in_the_order_of_entropy(curves: Curves) -> None:
    law = law_data(curves)
    assert law is not None and law["entropy"] == sorted(law["entropy"]) and len(law["fit"]) == 100
    assert law["fit"] == pytest.approx(law["reward"], abs=1e-4)  # the run follows the law


# where the time goes ------------------------------------------------------------------------------------


def test_the_timeline_has_every_phase_of_every_step_and_the_evaluation_after_it(curves: Curves) -> None:
    timeline = timeline_data(curves)
    assert timeline is not None
    assert timeline["phases"] == ["rollout", "update", "evaluation"]
    assert timeline["steps"] == list(range(101)) and len(timeline["seconds"]) == 101
    assert timeline["seconds"][0] == [0.0, 0.0, 1.0]  # the evaluation before the first step
    assert timeline["seconds"][24:26] == [[1.0, 0.5, 0.0], [1.0, 0.5, 1.0]]
    assert timeline["total"] == [100.0, 50.0, 5.0] and timeline["leftOut"] == 0


def test_phases_are_in_the_order_of_a_step_and_a_long_run_keeps_its_last_steps(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    phases = {"time/mine": 4.0, "time/sync": 3.0, "time/update": 2.0, "time/rollout": 1.0, "time/step": 10.0}
    for step in range(1, LIMIT + 3):
        lines.log(step, phases)
    lines.close()
    timeline = timeline_data(Curves.read(tmp_path))
    assert timeline is not None
    assert timeline["phases"] == ["rollout", "update", "sync", "mine"]
    assert timeline["seconds"][0] == [1.0, 2.0, 3.0, 4.0]
    assert (timeline["steps"][0], timeline["leftOut"], timeline["total"][0]) == (3, 2, LIMIT + 2)


def test_a_run_without_phases_has_no_timeline(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log(1, {"time/step": 1.0, "loss/total": 0.5, "time/examples_per_second": 2.0})
    lines.close()
    assert timeline_data(Curves.read(tmp_path)) is None


def test_lanes_are_those_of_the_timeline_and_a_long_run_keeps_its_last_events(tmp_path: Path) -> None:
    assert lanes_data(tmp_path / "timeline.jsonl") is None
    timeline = Timeline(tmp_path / "timeline.jsonl")
    timeline.add("worker b", "sample", 100.0, 101.5, requests=2, tokens=90)
    timeline.add("worker a", "lost", 102.0, 102.0, reason="no sign of life")
    timeline.add("pushes", "push", 102.0, 102.5, version=1, workers=["worker a", "worker b"])
    timeline.add("learner", "learn", 101.5, 102.0, step=1)
    lanes = lanes_data(timeline.path or tmp_path)
    assert lanes is not None and lanes["lanes"] == ["learner", "pushes", "worker a", "worker b"]
    assert lanes["kinds"] == ["learn", "lost", "push", "sample"] and lanes["leftOut"] == 0
    assert lanes["bars"] == [
        [3, 3, 0.0, 1.5, "1.5 s; requests 2; tokens 90"],
        [0, 0, 1.5, 2.0, "0.5 s; step 1"],
        [2, 1, 2.0, 2.0, "reason no sign of life"],
        [1, 2, 2.0, 2.5, "0.5 s; version 1; workers worker a, worker b"],
    ]
    for step in range(LANES):
        timeline.add("learner", "wait", 200.0 + step, step=step)
    lanes = lanes_data(timeline.path or tmp_path)
    assert lanes is not None and lanes["leftOut"] == 4 and lanes["lanes"] == ["learner"]


# completions ------------------------------------------------------------------------------------------------


def test_a_group_counts_its_right_completions_and_keeps_turns_apart() -> None:
    record = group_record(
        group(3, "1+1", completion("2", 1.0), completion("3", 0.0, turns=["a", "b"]), completion("?", None))
    )
    assert record["rate"] == pytest.approx(1 / 3) and record["mean"] == 0.5 and record["spread"] == 1.0
    right, wrong, ungraded = record["completions"]
    assert right["correct"] is True and wrong["correct"] is False and ungraded["correct"] is None
    assert wrong["turns"] == ["a", "b"] and "text" not in wrong and ungraded["ungraded"] == "timeout"


def test_without_verdicts_there_is_no_rate() -> None:
    record = group_record(group(3, "1+1", completion("2", 0.7, parts={"length": 0.7})))
    assert record["rate"] is None and record["mean"] == 0.7


def test_a_prompt_turned_right_was_mostly_wrong_first_and_is_mostly_right_last() -> None:
    right, wrong = completion("2", 1.0), completion("3", 0.0)
    groups = [
        group_record(record)
        for record in (
            group(9, "learnt", right, right),
            group(1, "learnt", wrong, wrong),
            group(1, "known", right, wrong),
            group(9, "known", right, right),
            group(1, "once", wrong, wrong),
            group(9, "once", right, right, stage="eval"),
        )
    ]
    mark_turned_right(groups)
    assert [item["turned"] for item in groups] == [True, True, False, False, False, False]


def test_completions_fit_their_budget_and_say_what_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "transcripts.jsonl"
    lines = JsonLines(path)
    for step in range(1, 1001):
        lines.append(group(step, f"{step}+1", completion("x" * 200, 0.0)))
    lines.close()
    with open(path, "a") as file:
        file.write('{"step": 1001, "stage": "rollout", "gro')  # still being written
    chosen = read_completions(path, budget=path.stat().st_size // 10)
    steps = [item["step"] for item in chosen.groups]
    assert chosen.total == 1000 and chosen.steps_total == 1000 and chosen.steps_shown == len(steps)
    assert steps[0] == 1 and steps[-1] == 1000 and 90 <= len(steps) <= 100
    assert read_completions(tmp_path / "none.jsonl").groups == ()


def test_what_transcripts_write_is_what_the_page_reads(tmp_path: Path) -> None:
    sampled = Completion((5, 6), (-0.1, -0.2), "stop", "4", (Span(0, 2, 3),))
    scored = ScoredGroup(0, Prompt("row-0", (1, 2), "2 + 2 ="), (sampled,), (Score(1.0, {"correct": 1.0}),))
    log = Transcripts(tmp_path / "t.jsonl", 1)
    log.log(7, [scored])
    log.close()
    chosen = read_completions(tmp_path / "t.jsonl")
    assert chosen.total == 1 and chosen.groups[0]["step"] == 7 and chosen.groups[0]["rate"] == 1.0


def test_a_long_text_loses_its_middle() -> None:
    text = cut_text("a" * 6 + "b" * 100 + "c" * 3, 9)
    assert text == "aaaaaa\n[... 100 characters left out ...]\nccc" and cut_text("short", 9) == "short"


# the page ---------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_but_itself_and_escapes_texts(folder: RunFolder) -> None:
    text = run_page(folder)
    parsed = _Page()
    parsed.feed(text)
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert "GRPO <b>small</b>" in parsed.text
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match is not None
    data = json.loads(match[1])
    assert data["groups"][0]["completions"][1]["text"] == "</script><b>4</b>"
    assert "loss/kl was not finite 1 time" in text


def test_long_runs_say_that_they_are_thinned(folder: RunFolder, tmp_path: Path) -> None:
    long = Curves.read(write_run(tmp_path / "long", steps=1500))
    notes = page_notes(long, read_completions(folder.transcripts))
    assert notes[0].startswith("Curves of 1500 steps are thinned to about 1000 points")
    charts = page_data(long, read_completions(tmp_path / "none"), RunFolder.from_path(tmp_path))["charts"]
    assert all(len(chart["x"]) <= 1000 for chart in charts)


def test_a_run_of_one_step_over_judged_examples_has_a_page(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log(1, {"time/step": 1.0, "loss/total": 0.5, "learner/epoch": 0.1})
    lines.log(1, {"eval/accuracy": 0.5, "eval/accuracy_low": math.nan, "eval/accuracy_high": math.nan})
    lines.close()
    text = run_page(RunFolder.from_path(tmp_path))
    assert "accuracy" in text and 'id="completions"' not in text
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        run_page(RunFolder.from_path(tmp_path / "absent"))


def test_a_report_that_exists_is_kept(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=10)
    assert write_missing_report(path) == path / "report.html"
    (path / "report.html").write_text("mine")
    assert write_missing_report(path) is None and (path / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.nan, "-"), (0.0, "0"), (0.12345, "0.123"), (12345.6, "12,346"), (1.5e-6, "1.5e-06")],
)
def test_numbers_for_readers(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_seconds_for_readers() -> None:
    assert [format_seconds(value) for value in (1.25, 200.0, 14_700.0)] == [
        "1.2 s",
        "3 min 20 s",
        "4 h 05 min",
    ]


def test_data_cannot_end_their_script_and_nan_is_refused() -> None:
    assert "<" not in embed_json({"text": "</script>&"}) and json.loads(embed_json(["</script>&"])) == [
        "</script>&"
    ]
    with pytest.raises(ValueError):
        embed_json(math.nan)


def test_a_template_that_misses_a_value_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="UndefinedError"):
        render_page("run.html.j2", title="a")


def test_the_chart_library_comes_with_its_licence() -> None:
    assert "MIT License" in inline_asset("uplot/LICENSE") and "uPlot" in inline_asset(
        "uplot/uPlot.iife.min.js"
    )
