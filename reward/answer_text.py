r"""Finds the answer in a completion. Strings in, strings out, in time linear in the completion; no algebra.

The answer that is extracted here is logged, and the verdict is computed from that text alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from rltrain.reward.answer_notation import is_formula

LONGEST = 1000  # characters of an answer that are read; no reference answer is as long
_SHORT = 64  # maximum characters of a completion that is only an answer
_BOXES = 8  # maximum number of boxes that one answer may be spread over
_STATEMENTS = 8  # number of statements of an answer that are examined, from the last

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>(?:(?:user|assistant|system)\b)?")
_LAST_LINE_ANSWER = re.compile(r"[ \t]*(?:####|A:)[ \t]*(\S.*)")
_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]{0,8}\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_STATEMENT = re.compile(
    r"(?i)answers?(?:\s*:|\s+(?:is|are)\b|\b[^.:=\d$\\\n]{0,60}?\s(?:is|are)\b|\s)[\s:*=]*"
)
_ANSWER = re.compile(r"(?i)answer")
_FINAL = re.compile(r"(?i)final\s\Z")
_VERB = re.compile(r"\s(?:is|are|equals)\s(?=[\d$\\+.-])")
_END_OF_SENTENCE = re.compile(r"\.(?=\s+[A-Z])|\n")
_BETWEEN = re.compile(r"\\(?:quad|qquad|text|mathrm|mbox)(?![A-Za-z])|\\[,;: !()\[\]]|[${}\s]+")
_NO_WORDS_BETWEEN = re.compile(r"[,;]?(?:and|or)?,?")
_CONJUNCTION = re.compile(r"(?<![A-Za-z])(?:and|or)\Z")
_CLOSES = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
_OPENS = re.compile(r"(?<!\\)(?:\$\$?|\\[(\[])")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))"
_PLAIN_NUMBERS = re.compile(rf"(?<![\w.,])-?\$?{_NUMBER}(?:\s?[-+*/^]\s?-?{_NUMBER})*(?:\s?%)?")
_LONE_EMPHASIS = re.compile(r"(?<=\w)\*\*(?=[\s.,;:]{1,4}[A-Za-z]{2})")
_SPACES = re.compile(r"[ \t\r\n\f\v]+")  # not thin spaces, which may group digits of a number
_MARKUP = "*_` \t\n"


def answer_part(completion: str) -> str:
    """The part that may contain the answer: after the reasoning block, inside answer tags, or after ``####``
    or ``A:`` on the last line."""
    text = _SPECIAL_TOKEN.sub(" ", completion)
    after_reasoning = text.rpartition("</think>")[2]
    text = after_reasoning if after_reasoning.strip() else text

    before, closing, _ = text.rpartition("</answer>")
    if closing and "<answer>" in before:
        text = before.rpartition("<answer>")[2]

    text = text.strip()
    last_line = _LAST_LINE_ANSWER.fullmatch(text.rpartition("\n")[2])
    return last_line[1] if last_line else text


def gold_part(gold: str) -> str:
    """The reference answer: GSM8K puts it after the solution and ``####``, other data sets may put it in a
    box."""
    text = gold.rpartition("####")[2].strip()
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed[0]
    start = text.rfind("\\boxed{")
    return text if start < 0 else text[start + len("\\boxed{") :]


def extract_answer(completion: str) -> str | None:
    """The answer that a completion gives, with single spaces: its last box (or boxes), the text after "answer
    is", a tag or ``####``, or the whole completion if it is one short line. None if it gives none."""
    text = answer_part(completion)
    answer = _marked_answer(text)
    if answer is None and (text != completion.strip() or _is_short(text)):
        answer = _strip_decoration(text[: LONGEST + 1])
    return answer or None


def final_answer(completion: str, *, in_words: bool = False) -> str | None:
    """Like ``extract_answer``, without the words around a formula; a completion without a marked answer gives
    its last line if ``in_words`` (the reference is words), else its last formula or number."""
    text = answer_part(completion)
    answer = _marked_answer(text)
    if answer is not None:
        return answer or None
    line = text.rpartition("\n")[2]
    if in_words:
        return _last_formula(line) or _strip_decoration(_sentence(line))
    if len(line) <= LONGEST and (_is_short(text) or is_formula(line)):
        return _last_formula(line) or _strip_decoration(line)
    return _last_formula(text) or _last_number(text)


def last_box(text: str) -> str | None:
    r"""The content of the last closed ``\boxed{...}`` or ``\fbox{...}``, braces balanced; None without
    one."""
    return next((content for content, _, _ in _boxes_from_the_last(text)), None)


def boxed_answer(text: str) -> tuple[str, int] | None:
    """The content of the last box, with the boxes that a conjunction joins to it ("[1] and [2]" is a list),
    and where it ends."""
    boxes = list(_boxes_from_the_last(text))
    if not boxes:
        return None
    contents = [boxes[0][0]]
    for (content, _, end), (_, start, _) in zip(boxes[1:], boxes, strict=False):
        if not _is_list_separator(text[end:start]):
            break
        if content != contents[-1]:
            contents.append(content)
    return ", ".join(_content_of_boxes(content) for content in reversed(contents)), boxes[0][2]


def _marked_answer(text: str) -> str | None:
    """The answer in a box or a statement; empty for an empty box; None without either."""
    boxed = boxed_answer(text)
    if boxed is not None:
        later = _stated_answer(text, after=boxed[1])
        return later or _strip_decoration(boxed[0]) or ""
    return _stated_answer(text)


def _stated_answer(text: str, after: int = -1) -> str | None:
    """The answer that the last "answer is" or "answer:" introduces. ``after`` a box, only a "final answer"
    counts, and only if it is a formula or number."""
    starts = [word.start() for word in _ANSWER.finditer(text, max(after, 0))]
    for start in reversed(starts[-_STATEMENTS:]):
        statement = _STATEMENT.match(text, start, start + LONGEST)
        if statement is None or (after >= 0 and not _FINAL.search(text, max(start - 6, 0), start)):
            continue
        answer = _tail_answer(text[statement.end() : statement.end() + LONGEST + 1])
        if answer is not None and (
            after < 0 or any(character.isdigit() or character in "$\\" for character in answer)
        ):
            return answer
    return None


def _tail_answer(tail: str) -> str | None:
    """The first formulas after "answer is" if they begin in the same sentence; else the sentence."""
    sentence = _sentence(tail)
    verb = list(_VERB.finditer(sentence))
    if verb:
        tail = tail.lstrip()[verb[-1].end() :]
        sentence = _sentence(tail)
    spans = list(_math_spans(tail))
    if spans and spans[0][1] <= len(sentence):
        return _join_formulas(tail, spans, first=True)
    return _strip_decoration(sentence)


def _last_formula(text: str) -> str | None:
    """The last formula between delimiters, unless a number follows it."""
    window = _window(text)
    spans = list(_math_spans(window))
    if not spans:
        return None
    number = _last_number(window[spans[-1][2] :])
    return number or _join_formulas(window, spans, first=False)


def _last_number(text: str) -> str | None:
    numbers = _PLAIN_NUMBERS.findall(_window(text))
    return numbers[-1].strip() if numbers else None


def _window(text: str) -> str:
    """The end of a text, from the beginning of a line if one is near."""
    if len(text) <= 2 * LONGEST:
        return text
    window = text[-2 * LONGEST :]
    return window.partition("\n")[2] if "\n" in window[:LONGEST] else window


def _math_spans(text: str) -> Iterator[tuple[str, int, int]]:
    """Each formula between delimiters, with its start and end, delimiters included."""
    position = 0
    while (opening := _OPENS.search(text, position)) is not None:
        closing = _CLOSES[opening[0]]
        end = text.find(closing, opening.end())
        while end > 0 and closing.startswith("$") and text[end - 1] == "\\":
            end = text.find(closing, end + 1)
        if end < 0:
            position = opening.end()
            continue
        position = end + len(closing)
        if text[opening.end() : end].strip():
            yield text[opening.end() : end], opening.start(), position


def _join_formulas(text: str, spans: list[tuple[str, int, int]], *, first: bool) -> str | None:
    """The first (or last) formula and the neighbours that a comma or conjunction joins to it."""
    if not first:
        spans = spans[::-1]
    formulas = [spans[0][0]]
    for previous, span in itertools.pairwise(spans):
        between = text[previous[2] : span[1]] if first else text[span[2] : previous[1]]
        if not _NO_WORDS_BETWEEN.fullmatch(_BETWEEN.sub("", between)) or not _BETWEEN.sub("", between):
            break
        formulas.append(span[0])
    return _strip_decoration(", ".join(part.strip() for part in (formulas if first else formulas[::-1])))


def _boxes_from_the_last(text: str) -> Iterator[tuple[str, int, int]]:
    """Content, start and end of the outermost closed boxes, from the last; at most a few."""
    inner = len(text)
    end = len(text)
    for _ in range(4 * _BOXES):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return
        end = start
        opening = _BOX.match(text, start)
        closing = None if opening is None else _closing_brace(text, opening.end())
        if opening is not None and closing is not None and closing < inner:
            inner = start
            yield text[opening.end() : closing], start, closing + 1


def _closing_brace(text: str, start: int) -> int | None:
    """The position of the brace that closes the one before ``start``. An answer that is too long is cut."""
    depth = 1
    for brace in _BRACE.finditer(text, start, start + 4 * LONGEST):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return start + 4 * LONGEST if len(text) > start + 4 * LONGEST else None


def _content_of_boxes(content: str) -> str:
    inner = boxed_answer(content)
    return content.strip() if inner is None else inner[0]


def _is_list_separator(between: str) -> bool:
    """Whether the text between two boxes makes them a list: empty, a comma, or words that end in "and" or
    "or"."""
    if len(between) > _SHORT + 8 or "\n\n" in between:
        return False
    words = _BETWEEN.sub(" ", between).strip()
    if _NO_WORDS_BETWEEN.fullmatch(words.replace(" ", "")):
        return True
    return _CONJUNCTION.search(words) is not None and not re.search(r"[.!?]", words)


def _sentence(text: str) -> str:
    return _END_OF_SENTENCE.split(text[: LONGEST + 1].strip(), maxsplit=1)[0]


def _is_short(text: str) -> bool:
    return "\n" not in text and len(text) <= _SHORT


def _strip_decoration(text: str) -> str | None:
    r"""Removes emphasis, delimiters around the whole text, final punctuation and repeated spaces; None if
    nothing is left."""
    text = _LONE_EMPHASIS.sub("", text)
    previous = None
    while text != previous:
        previous = text
        text = text.strip(_MARKUP).lstrip("= ")
        text = text[:-1] if text.endswith((".", ",", ";", ":")) and not text.endswith("\\", 0, -1) else text
        for opening, closing in _CLOSES.items():
            inside = text[len(opening) : len(text) - len(closing)]
            if (
                len(text) > 2 * len(opening)
                and text.startswith(opening)
                and text.endswith(closing)
                and opening not in inside
            ):
                text = inside
    return _SPACES.sub(" ", text) or None
