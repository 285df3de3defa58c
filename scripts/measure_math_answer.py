"""Measures how often math_answer agrees with labelled answers.

python scripts/measure_math_answer.py labels.jsonl [--show]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from rltrain.reward.math_answer import math_answer, warm_up
from rltrain.reward.score import RewardInputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "labels", type=Path, help="one JSON object per line: gold, prediction, correct (bool)"
    )
    parser.add_argument("--show", action="store_true", help="print every disagreement")
    options = parser.parse_args()
    rows = [
        json.loads(line) for line in options.labels.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    warm_up()
    outcomes = {"agree": 0, "false positive": 0, "false negative": 0, "ungraded": 0}
    seconds = []
    for row in rows:
        started = time.process_time()
        inputs = RewardInputs("", (row["prediction"],), (1,), ("stop",), {"answer": row["gold"]})
        (score,) = math_answer(inputs)
        seconds.append(time.process_time() - started)
        right = score.parts.get("correct") == 1.0
        error = "false positive" if right else "false negative"
        kind = "agree" if right == row["correct"] else error
        outcomes[kind] += 1
        outcomes["ungraded"] += score.ungraded is not None
        if options.show and kind != "agree":
            print(
                f"{kind}: {row.get('id', '')} gold {row['gold'][-90:]!r} answer {score.answer!r} of "
                f"{row['prediction'][-130:]!r}"
            )
    share = outcomes["agree"] / len(rows)
    print(
        f"{outcomes['agree']} of {len(rows)} agree ({share:.1%}); "
        + ", ".join(f"{k} {v}" for k, v in outcomes.items() if k != "agree")
    )
    median, mean, longest = (
        f"{figure(seconds) * 1e3:.2f}" for figure in (statistics.median, statistics.fmean, max)
    )
    print(f"CPU time of a verdict: median {median} ms, mean {mean} ms, longest {longest} ms")


if __name__ == "__main__":
    main()
