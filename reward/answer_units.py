r"""Suffixes of a number that are not part of it: units, nouns, the base of a numeral. Strings in, strings
out."""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = (
    "mm|millimeter millimetre",
    "cm|centimeter centimetre",
    "dm|decimeter decimetre",
    "km|kilometer kilometre",
    "m|meter metre",
    "in|inch inches",
    "ft|foot feet",
    "yd|yard",
    "mi|mile",
    "mg|milligram",
    "kg|kilogram",
    "g|gram gm",
    "lb|lbs pound",
    "oz|ounce",
    "ms|millisecond",
    "s|sec second",
    "min|minute",
    "h|hr hrs hour",
    "day",
    "week wk",
    "month",
    "year yr",
    "mL|ml milliliter millilitre",
    "L|l liter litre",
    "N|newton",
    "J|joule",
    "kJ",
    "W|watt",
    "kW",
    "Pa|pascal",
    "kPa",
    "V|volt",
    "A|ampere amp",
    "K|kelvin",
    "Hz|hertz",
    "kHz",
    "mol|mole",
    "mph",
    "unit",
    "dollar",
    "cent",
)
_UNITS = {
    spelling: name.split("|")[0].split()[0]
    for name in _NAMES
    for word in name.replace("|", " ").split()
    for spelling in (word, word + "s" if len(word) > 2 else word)
}
_ATOM = "(?:" + "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True)) + ")(?![A-Za-z])"
_POWER = r"(?:\s?\^\s?\{?\s?-?[1-4]\s?\}?)?"
_QUANTITY = rf"(?<![A-Za-z\\])(?:(?:sq|square|cu|cubic)\.?\s)?{_ATOM}{_POWER}"
_DEGREE = r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)\s?(?:[CF](?![A-Za-z]))?|\bdeg(?:rees?)?(?![A-Za-z])"
_GROUP = rf"\\(?:text|textrm|textnormal|mathrm|mbox|operatorname|textit|textbf)\s?\{{[^{{}}]*\}}{_POWER}"
_NOUN = r"(?<=\s)(?!(?:and|or)\b)[A-Za-z]{3,}(?:\s[A-Za-z]{2,}){0,5}"
_SPACE = r"(?:\\[,;: !]|~|\s){0,4}"
_JOINT = rf"{_SPACE}(?:/|\\cdot|\*|per\s)?{_SPACE}"
_CERTAIN = rf"(?:{_GROUP}|{_DEGREE}|{_QUANTITY})"
_WITH_UNIT = re.compile(rf"(.*?[\w)}}]){_SPACE}(?:({_CERTAIN}(?:{_JOINT}{_CERTAIN}){{0,5}})|({_NOUN}))\s?\.?")

_COMMAND = re.compile(r"\\[A-Za-z]+")
_TEXT_COMMAND = re.compile(r"\\(?:text|textrm|textnormal|mathrm|mbox|operatorname|textit|textbf)\s?(?=\{)")
_ATOMS = re.compile(r"[A-Za-z]+")
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}

_BASE_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMERAL = re.compile(
    r"\(?(?=[A-F]*\d)([0-9A-F]+(?:\.[0-9A-F]+)?)\)?"
    r"(?:\s?_\s?\{?\s?\(?(?:\\text\s?\{\s?)?(?:base\s)?(\d{1,2}|[a-z]{3,8})\s?\}?\)?\}?|\s\(?base[\s-](\d{1,2}|[a-z]{3,8})\)?)"
)
_DIGITS = "0123456789ABCDEF"


class Quantity(NamedTuple):
    """A value and its unit, if it has one."""

    value: str
    unit: str
    is_certain: bool  # False for a letter that may be a unit or a variable


def split_unit(text: str) -> Quantity:
    match = _WITH_UNIT.fullmatch(text)
    if match is None:
        return Quantity(text, "", True)
    value, unit, noun = match.groups()
    if noun is not None:
        return Quantity(value, noun, True)
    without_commands = _TEXT_COMMAND.sub("", unit)
    is_certain = (
        without_commands != unit or "circ" in unit or any(len(atom) > 1 for atom in _ATOMS.findall(unit))
    )
    return Quantity(value, unit, is_certain)


def remove_units(gold: str, answer: str) -> tuple[str, str]:
    """Both texts without their units, unless the units contradict each other.

    A single letter after a number is a unit if the other text has the same unit, or, in an answer, if the
    reference has neither a unit nor a variable; otherwise it is a variable.
    """
    expected = split_unit(gold)
    stated = split_unit(answer)
    if not expected.unit and not stated.unit:
        return gold, answer
    same_unit = _canonical_unit(expected.unit) == _canonical_unit(stated.unit)
    if (
        expected.unit
        and stated.unit
        and not same_unit
        and _is_known_unit(expected.unit)
        and _is_known_unit(stated.unit)
    ):
        return gold, answer
    if expected.unit and not expected.is_certain and not same_unit:
        return gold, answer
    if not expected.unit and not stated.is_certain and _has_variable(gold):
        return gold, answer
    return expected.value, stated.value


def parse_numeral(text: str) -> tuple[str, int] | None:
    """Digits and base of a numeral that states its base: ``101_2``, ``1F_{16}``, ``101_{\\text{two}}``,
    ``101 base 2``; else None."""
    match = _NUMERAL.fullmatch(text.strip("$ "))
    if match is None:
        return None
    base_text = match[2] or match[3]
    base = int(base_text) if base_text.isdigit() else _base_from_word(base_text)
    digits = match[1].lstrip("0") or "0"
    if not 2 <= base <= len(_DIGITS) or not all(digit in _DIGITS[:base] for digit in digits.replace(".", "")):
        return None
    return digits, base


def same_numeral(gold: str, answer: str) -> bool | None:
    """Whether two numerals have equal digits and, if both state it, the same base. None if neither states
    it."""
    expected = parse_numeral(gold)
    stated = parse_numeral(answer)
    if expected is None and stated is None:
        return None
    if expected is not None and stated is not None:
        return expected == stated
    digits = (expected or stated or ("", 0))[0]
    other = (answer if expected is not None else gold).strip("$ ")
    return re.sub(r"(?<=\d),(?=\d{3})", "", other).lstrip("0") == digits


def _base_from_word(word: str) -> int:
    return _BASE_WORDS.index(word) + 2 if word in _BASE_WORDS else 0


def _canonical_unit(unit: str) -> tuple[str, ...]:
    """The unit's names and powers in order, with spellings unified."""
    text = re.sub(r"\\cdot|\*|\^|[{}\s]|\\[,;: !]|~|\\circ", " ", _TEXT_COMMAND.sub("", unit)).replace(
        " per ", " / "
    )
    parts: list[str] = []
    power = 1
    names: list[str] = re.findall(r"[A-Za-z]+|-?\d+|/", text)
    for part in names:
        if part in _POWER_WORDS:
            power = _POWER_WORDS[part]
        elif part in ("deg", "degree", "degrees"):
            continue
        else:
            parts.append(_UNITS.get(part, part))
            parts += [str(power)] if power > 1 else []
            power = 1
    return tuple(parts)


def _is_known_unit(unit: str) -> bool:
    names = [part for part in _canonical_unit(unit) if part.isalpha()]
    return bool(names) and all(name in _UNITS or name in "CF" for name in names)


def _has_variable(text: str) -> bool:
    return re.search(r"[A-Za-z]", _COMMAND.sub(" ", text)) is not None
