"""Table and figure of finished runs: held-out pass@k before and after, per run and over seeds.

    python scripts/summarise_runs.py NAME=runs/a-0,runs/a-1 OTHER=runs/b-0 --png out.png

Runs after one NAME are seeds of the same thing. Intervals of a run are its bootstrap intervals over prompts; the interval of a mean over
seeds is Student's t over the runs (95 %), which is wide for three of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 % quantile, by number of runs


@dataclass(frozen=True)
class Curves:
    """What one run's metrics.jsonl says."""

    evals: list[dict[str, float]]  # lines of held-out results, first to last
    steps: list[dict[str, float]]

    @classmethod
    def read(cls, folder: Path) -> Curves:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return cls([line for line in lines if "eval/pass@1" in line], [line for line in lines if "reward/mean" in line])

    def rise(self, name: str) -> float:
        return self.evals[-1][name] - self.evals[0][name]

    def shown(self, name: str, at: int) -> str:
        line = self.evals[at]
        return f"{line[name]:.3f} [{line[f'{name}_low']:.3f}, {line[f'{name}_high']:.3f}]"


def interval(values: list[float]) -> str:
    """Mean over runs with its Student interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = STUDENT_T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def table(groups: dict[str, list[Curves]]) -> list[str]:
    rows = [
        "| run | pass@1 before | pass@1 after | pass@8 before | pass@8 after | entropy first, last | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in groups.items():
        for number, run in enumerate(runs):
            cells = [run.shown(metric, at) for metric in ("eval/pass@1", "eval/pass@8") for at in (0, -1)]
            entropy = [run.steps[at]["learner/entropy_mean"] for at in (0, -1)]
            minutes = sum(step["time/step"] for step in run.steps) / 60
            rows.append(f"| {name} {number} | {' | '.join(cells)} | {entropy[0]:.2f}, {entropy[1]:.2f} | {minutes:.1f} |")
    return rows


def figure(groups: dict[str, list[Curves]], path: Path) -> None:
    panels = (("evals", "eval/pass@1", "held-out pass@1"), ("evals", "eval/pass@8", "held-out pass@8"))
    panels += (("steps", "reward/mean", "training reward"), ("steps", "learner/entropy_mean", "policy entropy, nats"))
    drawn, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (kind, metric, title) in zip(axes, panels, strict=True):
        for colour, (name, runs) in enumerate(groups.items()):
            for number, run in enumerate(runs):
                lines = getattr(run, kind)
                label = name if number == 0 else None
                axis.plot([line["step"] for line in lines], [line[metric] for line in lines], color=f"C{colour}", alpha=0.7, label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN,RUN")
    parser.add_argument("--png", type=Path, help="write the figure here")
    options = parser.parse_args()
    groups = {}
    for group in options.groups:
        name, _, folders = group.partition("=")
        groups[name] = [Curves.read(Path(folder)) for folder in folders.split(",")]
    print("\n".join(table(groups)))
    for name, runs in groups.items():
        for metric in ("eval/pass@1", "eval/pass@8"):
            print(f"{name}: rise of {metric} over {len(runs)} runs: {interval([run.rise(metric) for run in runs])}")
    if options.png is not None:
        figure(groups, options.png)


if __name__ == "__main__":
    main()
