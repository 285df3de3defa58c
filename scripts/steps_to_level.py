"""How many steps each method took to a level of a held-out metric, from the folders of ``rltrain compare``.

    python scripts/steps_to_level.py runs/prime --levels 0.6 0.7 0.75 --against grpo

Between two evaluations the metric is taken to rise in a straight line; it counts when it first gets there.
Intervals are Student's over seeds, the ratios are of a method's steps to those of ``--against`` with the same
seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rltrain.analysis.curves import Curves, student_mean


def steps_to(steps: Sequence[int], values: Sequence[float], level: float) -> float | None:
    """None: the level was never reached."""
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
    parser.add_argument("--against", help="method that the others are held against")
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
        found = {name: [steps_to(*curve, level) for curve in runs] for name, runs in curves.items()}
        for name, each in found.items():
            reached = [one for one in each if one is not None]
            line = f"{options.metric} {level:g}  {name:<8} reached by {len(reached)} of {len(each)}"
            line += f" after {student_mean(reached)} steps" if reached else ""
            base = found.get(options.against, [])
            ratios = [
                one / other for one, other in zip(each, base, strict=False) if one is not None and other
            ]
            print(
                line
                + (
                    f", {student_mean(ratios)} times those of {options.against}"
                    if ratios and name != options.against
                    else ""
                )
            )


if __name__ == "__main__":
    main()
