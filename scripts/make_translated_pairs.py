"""Translates instructions and their answers with a model, and writes the two rows of each that CLO learns
from: the question in one language, the answer in that language chosen, the same answer in the other rejected.

    python scripts/make_translated_pairs.py MODEL --data tatsu-lab/alpaca --prompt instruction \
        --answer output --language Swahili --out FILE [--rows 3200] [--recipe RECIPE] [--set KEY=VALUE ...]

MODEL translates; RECIPE (kind: online) has the engine and the lengths of what it writes. An instruction or an
answer that the model leaves as it was, or of which it writes nothing, has no rows, and is counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from make_samples import Row, write_rows

from rltrain.cli.evaluate import sample_texts
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.data.prompts import load_rows

REQUEST = "Translate this text into {language}. Write the translation alone.\n\n{text}"


def pair_rows(texts: Iterable[tuple[str, str]], translations: Iterable[tuple[str, str]]) -> list[Row]:
    """Two rows of each (instruction, answer) and its translation, none where one of the two was not
    translated.
    """
    rows: list[Row] = []
    for (question, answer), translated in zip(texts, translations, strict=True):
        asked, answered = (text.strip() for text in translated)
        if not asked or not answered or asked == question or answered == answer:
            continue
        rows.append({"prompt": question, "chosen": answer, "rejected": answered, "is_target_language": False})
        rows.append({"prompt": asked, "chosen": answered, "rejected": answer, "is_target_language": True})
    return rows


def read_texts(recipe: OnlineRecipe, count: int) -> list[tuple[str, str]]:
    """(instruction, answer) of the first rows that have both."""
    _, rows, contents, _ = load_rows(recipe.data, "train")
    texts = [
        (content, str(row.columns["answer"]))
        for row, content in zip(rows, contents, strict=True)
        if isinstance(content, str) and row.columns.get("answer")
    ]
    return texts[:count]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="of the Hub, or a file")
    parser.add_argument("--prompt", required=True, help="column of the instruction")
    parser.add_argument("--answer", required=True, help="column of its answer")
    parser.add_argument("--language", required=True, help="for example Swahili")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3200, help="instructions, the first ones")
    parser.add_argument("--recipe", default="grpo")
    parser.add_argument("--profile")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    columns = f"{{prompt: {arguments.prompt}, answer: {arguments.answer}}}"
    settings = [f"model.path={arguments.model}", f"data.train={arguments.data}", f"data.columns={columns}"]
    recipe = check(
        load_recipe(arguments.recipe, profile=arguments.profile, overrides=[*settings, *arguments.settings])
    ).recipe
    if not isinstance(recipe, OnlineRecipe):
        raise SystemExit(f"{arguments.recipe} samples nothing; name a recipe of kind: online")
    texts = read_texts(recipe, arguments.rows)
    requests = [REQUEST.format(language=arguments.language, text=text) for pair in texts for text in pair]
    translated = [first for (first,) in sample_texts(recipe, requests, 1, 0.0, None)]
    rows = pair_rows(texts, zip(translated[::2], translated[1::2], strict=True))
    write_rows(arguments.out, rows)
    print(f"{arguments.out}: {len(rows)} rows; {len(texts) - len(rows) // 2} instructions have none")


if __name__ == "__main__":
    main()
