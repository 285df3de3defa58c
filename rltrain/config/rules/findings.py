"""What rules find: problems refuse a recipe, warnings are printed.

Both name the key, its value and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Findings:
    problems: list[str]
    warnings: list[str]
