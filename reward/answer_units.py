r"""What stands behind a number and is no part of it: units, nouns, the base of a numeral. Strings in, strings
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
_SURE = rf"(?:{_GROUP}|{_DEGREE}|{_QUANTITY})"
_WITH_UNIT = re.compile(rf"(.*?[\w)}}]){_SPACE}(?:({_SURE}(?:{_JOINT}{_SURE}){{0,5}})|({_NOUN}))\s?\.?")

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
    """A value, and what is behind it: nothing, a unit that can be nothing else, or a letter that may be a
    variable."""

    value: str
    unit: str
    sure: bool


def split_unit(text: str) -> Quantity:
    match = _WITH_UNIT.fullmatch(text)
    if match is None:
        return Quantity(text, "", True)
    value, unit, noun = match.groups()
    if noun is not None:
        return Quantity(value, noun, True)
    bare = _TEXT_COMMAND.sub("", unit)
    sure = bare != unit or "circ" in unit or any(len(atom) > 1 for atom in _ATOMS.findall(unit))
    return Quantity(value, unit, sure)


def without_units(gold: str, answer: str) -> tuple[str, str]:
    """Both without their units, unless these contradict each other. A single letter behind a number is a unit
    where the other text has the same unit, or, in an answer, where the reference has neither unit nor
    variable; else it is a variable."""
    expected, stated = split_unit(gold), split_unit(answer)
    if not expected.unit and not stated.unit:
        return gold, answer
    same = _canonical(expected.unit) == _canonical(stated.unit)
    if expected.unit and stated.unit and not same and _is_known(expected.unit) and _is_known(stated.unit):
        return gold, answer
    if expected.unit and not expected.sure and not same:
        return gold, answer
    if not expected.unit and not stated.sure and _has_variable(gold):
        return gold, answer
    return expected.value, stated.value


def numeral(text: str) -> tuple[str, int] | None:
    """Digits and base of a numeral whose base is written: ``101_2``, ``1F_{16}``, ``101_{\\text{two}}``,
    ``101 base 2``; else None."""
    match = _NUMERAL.fullmatch(text.strip("$ "))
    if match is None:
        return None
    written = match[2] or match[3]
    base = int(written) if written.isdigit() else _base_named(written)
    digits = match[1].lstrip("0") or "0"
    if not 2 <= base <= len(_DIGITS) or not all(digit in _DIGITS[:base] for digit in digits.replace(".", "")):
        return None
    return digits, base


def same_numeral(gold: str, answer: str) -> bool | None:
    """Whether two numerals agree in their digits and, where both state it, in their base. None where neither
    states a base."""
    expected, stated = numeral(gold), numeral(answer)
    if expected is None and stated is None:
        return None
    if expected is not None and stated is not None:
        return expected == stated
    digits = (expected or stated or ("", 0))[0]
    other = (answer if expected is not None else gold).strip("$ ")
    return re.sub(r"(?<=\d),(?=\d{3})", "", other).lstrip("0") == digits


def _base_named(word: str) -> int:
    return _BASE_WORDS.index(word) + 2 if word in _BASE_WORDS else 0


def _canonical(unit: str) -> tuple[str, ...]:
    """The unit's names and powers in order, spellings made one."""
    bare = re.sub(r"\\cdot|\*|\^|[{}\s]|\\[,;: !]|~|\\circ", " ", _TEXT_COMMAND.sub("", unit)).replace(
        " per ", " / "
    )
    parts: list[str] = []
    power = 1
    names: list[str] = re.findall(r"[A-Za-z]+|-?\d+|/", bare)
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


def _is_known(unit: str) -> bool:
    names = [part for part in _canonical(unit) if part.isalpha()]
    return bool(names) and all(name in _UNITS or name in "CF" for name in names)


def _has_variable(text: str) -> bool:
    return re.search(r"[A-Za-z]", _COMMAND.sub(" ", text)) is not None
