r"""Rewrites mathematics into notation that math-verify 0.9 reads correctly. Strings in, strings out; no
algebra.

``to_plain_notation`` reports which rules changed a text, so that a verdict can name them. Every rule sees at
most ``answer_text.LONGEST`` characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

TEXT_GROUP = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
)

_MATH_DELIMITER = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")
_DOUBLED_COMMAND = re.compile(r"\\\\[A-Za-z]")
_SINGLE_COMMAND = re.compile(r"(?<!\\)\\[A-Za-z]")
_DOUBLED_BACKSLASH = re.compile(r"(\\\\)(?:\\\\|(?=[^\s\d&+-]))")
_ESCAPED_DOLLAR = re.compile(r"(?<!\\)\\\$\s*")
_UPRIGHT_CONSTANT = re.compile(r"\\(?:mathrm|text|textrm|rm|operatorname)\s*\{\s*([ei])\s*\}")
_STOP_IN_FORMULA = re.compile(r"(?<=[^\s.\\])\s?[.,;](?=\s?(?:(?<!\\)\$(?![\w\\$])|\\[)\]]))")
_TRIGONOMETRIC = re.compile(
    r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])\s*(?:\^\s*(?:\{[^{}]*\}|\w))?\s*(?:\\left\s*)?"
)
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s?(?:\^\s?\{\s?\\circ\s?\}|\^\s?\\circ|\\degree)(?![A-Za-z])")
_ARGUMENT = re.compile(r"[\w\s.^{}\\*/]*")
_NUMBER_TIMES_NUMBER = re.compile(r"(?<![\w.^{}\\])(\d+)\((-?\d+(?:\.\d+)?)\)")
_PYTHON_POWER = re.compile(r"(?<=[\w)])(?<![A-Za-z]{2})\s?\*\*\s?(\d+|[A-Za-z]\b)")
_PYTHON_EQUATION = re.compile(r"\bEq\(([^=\n]{1,200}),\s*([^,=\n]{1,200})\)")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:(?:\\[,;: !]|~|\\thinspace\s)\d{3})+)(?!\d)")
_THIN_SPACE = re.compile(r"\\[,;: !]|~|\\thinspace\s")
# Matches a complete answer only: in a sentence, these groups would be several numbers in a row.
_ONLY_THOUSANDS = re.compile(r"([-+]?\d{1,3})((?: \d{3})+)(\.\d+)?")
_SCIENTIFIC = re.compile(r"(?<![\w.\\}])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\w.])")
_EMPTY_SET = re.compile(r"\\varnothing(?![A-Za-z])|(?:\\left\s?)?\\\{\s*(?:\\right\s?)?\\\}")
_PRIME = re.compile(r"(?<=[A-Za-z])('{1,3})(?!\w)")
_DEFINITION = re.compile(r"\$?\s?([A-Za-z])\s?\(([a-z])\)\s?=")
_LETTER = r"(?<![A-Za-z\\]){}(?![A-Za-z])"
_DECIMAL_COMMA = re.compile(r"(-?\d+),(\d{1,2})")
_BRACKETED_NUMBER = re.compile(
    r"(?<![\\\w])\[\s?(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?)\s?\](?=[.! ]{0,3}$)"
)
_MIXED_NUMBER = re.compile(r"(-?)\s?(\d+)\s+(\d+)\s?/\s?(\d+)")

_CALCULATOR_WORD = re.compile(r"\b(?:sqrt|sin|cos|tan|log|exp|and|or|inf|infinity)\b")
_CALCULATOR_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)")
_CALCULATOR_PI = re.compile(r"(?<![\\A-Za-z])pi\b")
_GLUED_CONJUNCTION = re.compile(r"(?<=[\d)}])(and|or)(?=[A-Z\d\\(-]|[a-z]\b)")
_BARE_CONJUNCTION = re.compile(r",?(?<!\{)\s+(?:and|or)\s+(?!\})")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\*?\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3}|\b(?:is|so|it|we|to|of|in|be|at|by)\b")

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+|\S", re.DOTALL)
_IS_ARGUMENT = re.compile(r"[^{}]|\\[A-Za-z]+")  # needs no braces after a command, ^ or _
_WITHOUT_MEANING = frozenset(
    (
        "\\left",
        "\\right",
        "\\displaystyle",
        "\\limits",
        "\\,",
        "\\;",
        "\\:",
        "\\!",
        "\\ ",
        "~",
        "$",
        "\\big",
        "\\Big",
    )
)
_SYNONYMS = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
    "\\leq": "\\le",
    "\\geq": "\\ge",
    "\\neq": "\\ne",
}

_UNICODE = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{NON-BREAKING HYPHEN}": "-",
        "\N{MULTIPLICATION SIGN}": "\\times ",
        "\N{MIDDLE DOT}": "\\cdot ",
        "\N{DOT OPERATOR}": "\\cdot ",
        "\N{DIVISION SIGN}": "\\div ",
        "\N{LESS-THAN OR EQUAL TO}": "\\le ",
        "\N{GREATER-THAN OR EQUAL TO}": "\\ge ",
        "\N{NOT EQUAL TO}": "\\ne ",
        "\N{ALMOST EQUAL TO}": "\\approx ",
        "\N{INFINITY}": "\\infty ",
        "\N{PLUS-MINUS SIGN}": "\\pm ",
        "\N{DEGREE SIGN}": "^\\circ ",
        "\N{EMPTY SET}": "\\emptyset ",
        "\N{UNION}": "\\cup ",
        "\N{INTERSECTION}": "\\cap ",
        "\N{ELEMENT OF}": "\\in ",
        "\N{PRIME}": "'",
        "\N{HYPHEN}": "-",
        "\N{FIGURE DASH}": "-",
        "\N{FRACTION SLASH}": "/",
        "\N{DIVISION SLASH}": "/",
        "\N{ASTERISK OPERATOR}": "*",
        "\N{NO-BREAK SPACE}": " ",
        "\N{THIN SPACE}": "\\,",
        "\N{NARROW NO-BREAK SPACE}": "\\,",
        "\N{DOUBLE-STRUCK CAPITAL R}": "\\mathbb{R}",
        "\N{DOUBLE-STRUCK CAPITAL Z}": "\\mathbb{Z}",
        "\N{DOUBLE-STRUCK CAPITAL N}": "\\mathbb{N}",
        **{chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)},  # full-width forms
    }
)
_GREEK = re.compile(r"[\N{GREEK CAPITAL LETTER ALPHA}-\N{GREEK SMALL LETTER OMEGA}]")
_VULGAR_FRACTION = re.compile(
    "[\N{VULGAR FRACTION ONE QUARTER}-\N{VULGAR FRACTION THREE QUARTERS}\u2150-\u215e]"
)
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f]+")
_SUBSCRIPT = re.compile("[\u2080-\u2089]+")
_ROOT_INDEX = {"\N{SQUARE ROOT}": "", "\N{CUBE ROOT}": "[3]", "\N{FOURTH ROOT}": "[4]"}
_ROOT = re.compile(
    f"([{''.join(_ROOT_INDEX)}])" + r"\s?(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+))"
)


class PlainText(NamedTuple):
    """A text in plain notation and the names of the rules that changed it."""

    text: str
    rules: frozenset[str]


def to_plain_notation(text: str) -> PlainText:
    """``text`` in notation that math-verify reads correctly, with the names of the rules that changed it."""
    changed: set[str] = set()
    for name, rule in RULES:
        result = rule(text)
        if result != text:
            changed.add(name)
            text = result
    return PlainText(text, frozenset(changed))


def has_delimiters(text: str) -> bool:
    return _MATH_DELIMITER.search(text) is not None


def is_formula(text: str) -> bool:
    """Whether ``text`` is undelimited mathematics: without LaTeX commands, \\text{...} and calculator names
    it contains no word."""
    rest = _COMMAND.sub(" ", TEXT_GROUP.sub(" ", text))
    return _WORD.search(_CALCULATOR_WORD.sub(" ", rest)) is None


def add_delimiters(text: str) -> str:
    """Puts undelimited mathematics between dollars, without a sentence's punctuation; keeps other texts."""
    if text.startswith("$") and text.count("$") == 1:
        text = text[1:]  # a currency sign
    if not text or has_delimiters(text) or not is_formula(text):
        return text
    return f"${text.rstrip(' .,;')}$"


def translate_calculator_notation(gold: str, answer: str) -> tuple[str, str]:
    """Writes roots, pi, mixed numbers and conjunctions of undelimited mathematics in LaTeX."""
    return _translate_calculator(gold), _translate_calculator(answer)


def simplify_single_number(gold: str, answer: str) -> tuple[str, str]:
    """If the reference is neither a list nor an interval, a final ``[90]`` is 90 and ``1000,99`` is
    1000.99."""
    if any(mark in gold for mark in "[,("):
        return gold, answer
    comma = _DECIMAL_COMMA.fullmatch(answer)
    return gold, f"{comma[1]}.{comma[2]}" if comma else _BRACKETED_NUMBER.sub(r"\1", answer)


def unify_argument_name(gold: str, answer: str) -> tuple[str, str]:
    """Renames the answer's argument as in ``gold`` if both define the same function: f(t) = t^2 is f(x) =
    x^2."""
    expected = _DEFINITION.match(gold)
    stated = _DEFINITION.match(answer)
    if expected is None or stated is None or expected[1] != stated[1] or expected[2] == stated[2]:
        return gold, answer
    if re.search(_LETTER.format(expected[2]), answer):
        return gold, answer
    return gold, re.sub(_LETTER.format(stated[2]), expected[2], answer)


def tokens(text: str) -> list[str]:
    """The meaningful LaTeX tokens of ``text``, with synonyms unified and braces around one token removed."""
    result: list[str] = []
    raw_tokens: list[str] = _TOKEN.findall(text)
    for token in raw_tokens:
        if token in _WITHOUT_MEANING:
            continue
        token = _SYNONYMS.get(token, token)
        if token == "}" and result[-2:-1] == ["{"] and _IS_ARGUMENT.fullmatch(result[-1]):
            result[-2:] = [result[-1]]
        else:
            result.append(token)
    return result


def nesting_depth(text: str) -> int:
    """How deep brackets and braces are nested."""
    level = deepest = 0
    for character in text:
        if character in "({[":
            level += 1
            deepest = max(deepest, level)
        elif character in ")}]":
            level = max(level - 1, 0)
    return deepest


def _translate_calculator(text: str) -> str:
    if has_delimiters(text) or not is_formula(text):
        return text
    latex = _CALCULATOR_ROOT.sub(r"\\sqrt{\1}", text.rstrip(" .,;"))
    latex = _BARE_CONJUNCTION.sub(", ", _CALCULATOR_PI.sub(r"\\pi ", latex))
    mixed = _MIXED_NUMBER.fullmatch(latex)
    return mixed.expand(r"\1\2\\frac{\3}{\4}") if mixed else latex


def _replace_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _ROOT.sub(lambda root: f"\\sqrt{_ROOT_INDEX[root[1]]}{{{root[2] or root[3] or root[4]}}}", text)
    text = _SUPERSCRIPT.sub(lambda run: f"^{{{_normalize_compatibility(run[0])}}}", text)
    text = _SUBSCRIPT.sub(lambda run: f"_{{{_normalize_compatibility(run[0])}}}", text)
    text = _VULGAR_FRACTION.sub(
        lambda sign: "\\frac{{{}}}{{{}}}".format(*_normalize_compatibility(sign[0]).split("\u2044")), text
    )
    text = _GREEK.sub(lambda letter: _greek_command(letter[0]), text)
    return text.translate(_UNICODE)


def _join_spaced_thousands(text: str) -> str:
    number = _ONLY_THOUSANDS.fullmatch(text.strip("$ "))
    return "".join((number[1], number[2].replace(" ", ""), number[3] or "")) if number else text


def _normalize_compatibility(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")


def _greek_command(letter: str) -> str:
    name = unicodedata.name(letter, "").rpartition(" ")[2].lower()
    return f"\\{name.capitalize() if letter.isupper() else name} "


def _unescape_backslashes(text: str) -> str:
    """Removes one level of escaping where every command has a doubled backslash; a matrix row still ends in
    two."""
    if not _DOUBLED_COMMAND.search(text) or _SINGLE_COMMAND.search(text):
        return text
    return _DOUBLED_BACKSLASH.sub(lambda pair: pair[0][: len(pair[0]) // 2], text)


def _convert_degrees_in_arguments(text: str) -> str:
    """Converts degrees to radians in the arguments of trigonometric functions, and nowhere else."""
    pieces: list[str] = []
    done = 0
    for function in _TRIGONOMETRIC.finditer(text):
        if function.start() < done:
            continue
        end = _end_of_argument(text, function.end())
        pieces += [
            text[done : function.end()],
            _DEGREES.sub(r"\\frac{\1 \\pi}{180}", text[function.end() : end]),
        ]
        done = end
    return "".join([*pieces, text[done:]])


def _end_of_argument(text: str, start: int) -> int:
    """Where a function's argument ends: at its closing bracket, or else after the product that follows."""
    if text[start : start + 1] not in ("(", "{", "["):
        argument = _ARGUMENT.match(text, start)
        return argument.end() if argument else start
    level = 0
    for position in range(start, len(text)):
        level += (text[position] in "({[") - (text[position] in ")}]")
        if level == 0:
            return position + 1
    return len(text)


RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("doubled backslashes", _unescape_backslashes),
    ("Unicode", _replace_unicode),
    ("escaped currency", lambda text: _ESCAPED_DOLLAR.sub("", text)),
    ("upright constant", lambda text: _UPRIGHT_CONSTANT.sub(r"\1", text)),
    ("Python equation", lambda text: _PYTHON_EQUATION.sub(r"\1 = \2", text)),
    ("Python power", lambda text: _PYTHON_POWER.sub(r"^{\1}", text)),
    ("spaced thousands", lambda text: _THOUSANDS.sub(lambda number: _THIN_SPACE.sub("", number[0]), text)),
    ("thousands alone", _join_spaced_thousands),
    ("scientific", lambda text: _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text)),
    ("product of numbers", lambda text: _NUMBER_TIMES_NUMBER.sub(r"\1 \\cdot \2", text)),
    ("glued conjunction", lambda text: _GLUED_CONJUNCTION.sub(r" \1 ", text)),
    ("empty set", lambda text: _EMPTY_SET.sub(lambda _: "\\emptyset", text)),
    ("degrees in an argument", _convert_degrees_in_arguments),
    ("prime", lambda text: _PRIME.sub(lambda prime: f"_{{p{len(prime[1])}}}", text)),
    ("full stop in a formula", lambda text: _STOP_IN_FORMULA.sub("", text)),
)
