"""Makes docs/needs.md from rltrain/needs.py; with --check it only says whether the page is current."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from rltrain.needs import NEEDS, TRAITS

PAGE = Path(__file__).parents[1] / "docs/needs.md"
HEAD = """\
# Needs and traits

What `@method(name, needs=..., traits=...)` may declare. Made from `rltrain/needs.py` by
`scripts/needs_table.py`. B completions, T completion tokens, N examples of a preference loss. An argument
follows a colon: `entropy:0.5`, `policy_loss:clip`; a hyperparameter in braces is replaced by its value:
`clamped_entropy:{share}`. A control may add `_now` to a statistic and gets it at the start of each optimizer
batch.
"""


def page() -> str:
    tables = [
        HEAD,
        table("Needs: computed on request", NEEDS),
        table("Traits: read by rules and stages", TRAITS),
    ]
    return "\n".join(tables)


def table(title: str, words: Mapping[str, str]) -> str:
    rows = [f"| `{word}` | {meaning} |" for word, meaning in words.items()]
    return "\n".join([f"## {title}", "", "| name | meaning |", "|---|---|", *rows, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the page is not current"
    )
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is not current; run python scripts/needs_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
