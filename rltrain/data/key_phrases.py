"""Key phrases of a text by RAKE, and the text without some of them: SPO's degraded completions,
arXiv:2409.17791.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from rltrain.data.preferences import Pair
from rltrain.data.tokenization import Tokenization

__all__ = ["degraded_completions", "degraded_texts", "key_phrases", "remove_phrases"]

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SPACES = re.compile(r"[ \t]{2,}")
# of English: they end a candidate
_ENGLISH = """
a about above after again against all also am an and any are as at be because been before being below
between both but by can could did do does doing down during each either else ever every few for from further
had has have having he her here hers herself him himself his how however i if in into is it its itself just
let me might more most much must my myself neither no nor not now of off on once only or other our ours
ourselves out over own per quite rather same shall she should since so some such than that the their theirs
them themselves then there these they this those though through thus to too under until up upon us very was
we well were what when where whether which while who whom whose why will with within without would yet you
your yours yourself yourselves
"""
_FUNCTION_WORDS = frozenset(_ENGLISH.split())


def key_phrases(text: str) -> list[str]:
    """The distinct key phrases of ``text`` in lower case, the most telling first (RAKE, Rose et al. 2010).

    A candidate is a longest run of words without a function word (English) or punctuation between them. A
    word scores its co-occurrences in candidates, itself included, divided by its frequency; a candidate
    scores the sum over its words. Equal scores keep the order of the text.
    """
    candidates = [tuple(text[start:stop].lower() for start, stop in run) for run in _runs(text)]
    frequency: dict[str, int] = defaultdict(int)
    degree: dict[str, int] = defaultdict(int)
    for words in candidates:
        for word in words:
            frequency[word] += 1
            degree[word] += len(words)
    scores = {words: sum(degree[word] / frequency[word] for word in words) for words in candidates}
    return [" ".join(words) for words in sorted(scores, key=lambda words: -scores[words])]


def remove_phrases(text: str, phrases: list[str]) -> str:
    """``text`` without every occurrence of ``phrases`` among its candidates; spaces left over are one."""
    gone = set(phrases)
    pieces = []
    place = 0
    for run in _runs(text):
        if " ".join(text[start:stop].lower() for start, stop in run) in gone:
            pieces.append(text[place : run[0][0]])
            place = run[-1][1]
    return _SPACES.sub(" ", "".join((*pieces, text[place:])))


def degraded_texts(text: str, levels: int, share: float) -> dict[int, str]:
    """``text`` degraded to each degree from 0 (intact) to ``levels - 1``, which lacks ``share`` of the key
    phrases, the most telling ones; degree d lacks d / (levels - 1) of that.

    A degree that lacks no phrase more than the one before is left out: short texts have few.
    """
    phrases = key_phrases(text)
    texts = {0: text}
    removed = 0
    for degree in range(1, levels):
        count = round(share * len(phrases) * degree / (levels - 1))
        if count > removed:
            texts[degree] = remove_phrases(text, phrases[:count])
            removed = count
    return texts


def degraded_completions(
    pair: Pair, tokenization: Tokenization, levels: int, share: float
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(degree, token ids) of the pair's chosen completion, intact first, then degraded.

    The special tokens at its end stay; a degraded one is tokenised anew.
    """
    special = {*tokenization.tokenizer.all_special_ids, *tokenization.stop_tokens.stop}
    length = len(pair.chosen)
    while length and pair.chosen[length - 1] in special:
        length -= 1
    tail = pair.chosen[length:]
    texts = degraded_texts(tokenization.decode(pair.chosen[:length]), levels, share)
    degraded = (
        (degree, (*tokenization.tokenizer(text, add_special_tokens=False)["input_ids"], *tail))
        for degree, text in texts.items()
        if degree
    )
    return ((0, pair.chosen), *((degree, token_ids) for degree, token_ids in degraded if token_ids))


def _runs(text: str) -> Iterator[list[tuple[int, int]]]:
    """The candidates of ``text``, each as the spans of its words."""
    run: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        if run and text[run[-1][1] : match.start()].strip(" "):  # more than spaces between two words
            yield run
            run = []
        if match.group().lower() in _FUNCTION_WORDS:
            if run:
                yield run
            run = []
        else:
            run.append(match.span())
    if run:
        yield run
