"""Makes docs/needs.md from rltrain/needs.py; with --check it only says whether the page is current."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from rltrain.needs import NEEDS, TRAITS, Word

PAGE = Path(__file__).parents[1] / "docs/needs.md"
HEAD = """\
# Needs and traits

What `@method(name, needs=..., traits=...)` may declare. Made from `rltrain/needs.py` by
`scripts/needs_table.py`. B completions, T completion tokens, N examples of a preference loss. The constant in
`rltrain.needs` has the name in capitals, and the text itself declares the same: `OLD_LOGP` or `"old_logp"`.
An argument follows a colon: `POLICY_LOSS("clip")` or `"policy_loss:clip"`; a hyperparameter in braces is
replaced by its value: `CLAMPED_ENTROPY("{share}")`. A control may add `_now` to a statistic, as in
`EXPECTED_ENTROPY_SLOPE.update_start`, and gets it at the start of each optimizer batch.

A rule about one method alone is a function beside it, `@method(name, check=...)`: see
[add a method](add_a_method.md).
"""


def page() -> str:
    tables = [
        HEAD,
        table("Needs: computed on request", NEEDS),
        table("Traits: read by rules and stages", TRAITS),
    ]
    return "\n".join(tables)


def table(title: str, words: Mapping[str, Word]) -> str:
    rows = [f"| `{name}` | {argument(word)} | {word.meaning} |" for name, word in words.items()]
    return "\n".join([f"## {title}", "", "| name | argument | meaning |", "|---|---|---|", *rows, ""])


def argument(word: Word) -> str:
    return f"{word.argument}, optional" if word.is_optional else word.argument


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
