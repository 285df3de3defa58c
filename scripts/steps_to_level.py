"""Computes how many steps each method needs to reach a level of a held-out metric, from the folders of
``rltrain compare``.

    python scripts/steps_to_level.py runs/prime --levels 0.6 0.7 0.75 --against grpo

The metric is interpolated linearly between two evaluations; the first time that it reaches the level counts.
Intervals are Student's over seeds. The ratios divide a method's steps by those of ``--against`` with the same
seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rltrain.analysis.curves import Curves, student_mean


def steps_to(steps: Sequence[int], values: Sequence[float], level: float) -> float | None:
    """The step at which ``values`` first reach ``level``; None if they never do."""
    points = list(zip(steps, values, strict=True))
    for number, (step, value) in enumerate(points):
        if value >= level:
            if number == 0:
                return float(step)
            before, low = points[number - 1]
            return before + (step - before) * (level - low) / (value - low)
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the comparison: METHOD/seed-N below it")
    parser.add_argument("--levels", nargs="+", type=float, required=True)
    parser.add_argument("--metric", default="eval/pass@1")
    parser.add_argument("--against", help="method with which the others are compared")
    options = parser.parse_args(arguments)
    methods = {
        path.name: sorted(path.glob("seed-*")) for path in sorted(options.folder.iterdir()) if path.is_dir()
    }
    curves = {
        name: [Curves.read(run).series(options.metric) for run in runs]
        for name, runs in methods.items()
        if runs
    }
    for level in options.levels:
        steps_by_method = {name: [steps_to(*curve, level) for curve in runs] for name, runs in curves.items()}
        for name, method_steps in steps_by_method.items():
            reached = [value for value in method_steps if value is not None]
            line = f"{options.metric} {level:g}  {name:<8} reached by {len(reached)} of {len(method_steps)}"
            line += f" after {student_mean(reached)} steps" if reached else ""
            base_steps = steps_by_method.get(options.against, [])
            ratios = [
                value / base_value
                for value, base_value in zip(method_steps, base_steps, strict=False)
                if value is not None and base_value
            ]
            if ratios and name != options.against:
                line += f", {student_mean(ratios)} times those of {options.against}"
            print(line)


if __name__ == "__main__":
    main()
