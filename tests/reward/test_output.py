"""What graders print is in one log of bounded size, under the occasion and the grader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.reward import output
from rltrain.reward.output import OutputLog, _Splitter, mark
from rltrain.reward.pool import RewardCall, RewardPool
from rltrain.reward.score import RewardInputs

PRINTERS = Path(__file__).with_name("printers.py")


def inputs(*completions: str, occasion: str = "step 3") -> RewardInputs:
    count = len(completions)
    return RewardInputs("p", completions, (1,) * count, ("stop",) * count, {}, occasion=occasion)


def printed_sections(
    log: Path, *groups: RewardInputs, names: tuple[str, ...] = ("chatty",), seconds: float = 5.0
) -> list[tuple[str, str]]:
    """(heading, text) of every section."""
    calls = [RewardCall(f"{PRINTERS}:{name}", 1.0, {}) for name in names]
    with RewardPool(calls, workers=1, seconds=seconds, memory_gib=1, deadline_seconds=60) as pool:
        pool.score(groups[:1])
        pool.log_to(log)
        pool.score(groups[1:])
    sections = log.read_text(encoding="utf-8").split("--- ")[1:]
    return [
        (heading, text.rstrip("\n")) for heading, _, text in (section.partition("\n") for section in sections)
    ]


def test_each_section_has_its_step_and_grader_as_heading_even_if_tasks_are_sent_together(tmp_path):
    groups = [inputs(f"hello {number}", occasion=f"step {number}") for number in range(12)]
    sections = printed_sections(tmp_path / "rewards.log", *groups, names=("chatty", "quiet", "to_stderr"))
    assert sections[0] == ("the start of a worker", "imported\nimported\nimported")  # once for each function
    expected = {(f"step {n}, chatty", f"chatty: hello {n}") for n in range(12)} | {
        (f"step {n}, to_stderr", f"err: hello {n}") for n in range(12)
    }
    assert set(sections[1:]) == expected and len(sections) == 25


def test_what_was_printed_before_a_timeout_without_a_line_break_or_by_a_child_process_is_there(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    groups = [inputs(completion) for completion in ("first", "then hang", "echo", "unfinished")]
    sections = printed_sections(tmp_path / "rewards.log", *groups, seconds=1.0)
    assert ("step 3, chatty", "chatty: then hang") in sections
    assert ("step 3, chatty", "chatty: echo\nfrom a child") in sections
    assert ("step 3, chatty", "chatty: unfinished\nno line break") in sections


def test_the_log_is_bounded_and_says_how_much_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_FILE_BYTES", 200_000)
    log = tmp_path / "rewards.log"
    sections = printed_sections(log, inputs("first"), *[inputs("shout") for _ in range(10)])
    # "chatty: shout", a line break and 1,000,000 letters; 65,536 bytes of that are kept
    assert sections[-1][1].endswith(f"\n[{1_000_014 - 65_536} more bytes are left out]")
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 2 and all(size <= 200_000 for size in sizes)


def test_a_grader_that_closes_or_replaces_its_stdout_is_graded(tmp_path):
    calls = [RewardCall(f"{PRINTERS}:breaks_stdout", 1.0, {})]
    with RewardPool(calls, workers=1, seconds=5, memory_gib=1, deadline_seconds=60) as pool:
        pool.log_to(tmp_path / "rewards.log")
        for how in ("close", "replace", "descriptor"):
            assert pool.score([inputs(how)])[0][0].value == 1.0
        assert "workers_replaced" not in pool.counts


def test_a_log_that_cannot_be_written_costs_no_grade(tmp_path):
    with RewardPool(
        [RewardCall(f"{PRINTERS}:chatty", 1.0, {})], workers=1, seconds=5, memory_gib=1, deadline_seconds=60
    ) as pool:
        pool.log_to(tmp_path / "no such folder" / "rewards.log")
        assert pool.score([inputs("a")])[0][0].value == 1.0


@pytest.mark.parametrize("kept", [True, False])
def test_sections_wait_for_the_file(tmp_path, kept):
    log = OutputLog()
    read, write = os.pipe()
    log.follow(read)
    if not kept:
        log.open(tmp_path / "log")
    mark(write, log.nonce, "step 1, f\nwith a line break")
    os.write(write, b"text\n")
    os.close(write)
    log.close()
    log.open(tmp_path / "log")
    assert (tmp_path / "log").read_text() == "--- step 1, f with a line break\ntext\n"


TEXTS = st.lists(st.binary(max_size=12) | st.just(b"\x1e") | st.just(b"\x1enon"), min_size=1, max_size=5)


@given(texts=TEXTS, cuts=st.lists(st.integers(1, 40), max_size=30))
def test_marks_are_found_wherever_the_chunks_begin_and_end(texts, cuts):
    stream = b""
    expected = []
    for number, text in enumerate(texts):
        stream += text + b"\x1enonce heading %d\n" % number
        expected.append((text, f"heading {number}"))
    splitter = _Splitter("nonce")
    pieces = []
    text_so_far = b""
    while stream:
        size = cuts.pop() if cuts else 1
        chunk, stream = stream[:size], stream[size:]
        for text, heading in splitter(chunk):
            text_so_far += text
            if heading is not None:
                pieces.append((text_so_far, heading))
                text_so_far = b""
    assert pieces == expected and text_so_far + splitter.rest == b""
