"""The results of the rules: a recipe with problems is refused, warnings are printed.

Both state the key, its value and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Findings:
    problems: list[str]
    warnings: list[str]
