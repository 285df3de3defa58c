"""The worked example of process rewards: arXiv:2412.01981 with beta 0.05, six tokens in three steps."""

from __future__ import annotations

RHO = (0.4, -0.2, 0.1, 0.3, -0.5, 0.2)  # log-ratios; steps end at tokens 1, 3 and 5
BETA = 0.05
# Steps sum to 0.01, 0.02, -0.015; their running sums are 0.01, 0.03, 0.015, and those of tokens 0.02, 0.01,
# 0.015, 0.03, 0.005, 0.015.
SCORES = [  # (series, reduction, score)
    ("step", "min", -0.015),
    ("step", "sum", 0.015),
    ("step", "mean", 0.005),
    ("step", "last", -0.015),
    ("cumulative", "min", 0.010),
    ("cumulative", "sum", 0.055),
    ("cumulative", "last", 0.015),
    ("cumulative", "mean", 0.055 / 3),
]
