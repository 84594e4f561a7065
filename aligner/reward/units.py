"""Parse units of answers: unit words and symbols, their dimensions and factors, and scale words such as "million"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
CURRENCIES = {"$": "dollar", "€": "euro", "£": "gbp", "¥": "yen", "₹": "rupee"}
KNOWN: dict[str, tuple[str, Fraction]] = {}
"""Unit by name or symbol -> (dimension, factor to the dimension's base unit)."""
TABLE = {
    "length": "m meter metre=1 km kilometer kilometre=1000 cm centimeter centimetre=1/100 mm millimeter millimetre=1/1000"
    " dm decimeter=1/10 in inch=127/5000 ft foot=381/1250 yd yard=1143/1250 mi mile=201168/125",
    "time": "s sec second=1 ms millisecond=1/1000 min minute=60 h hr hour=3600 day=86400 week=604800",
    "month": "month=1 yr year=12 decade=120 century=1200",
    "mass": "g gram gm=1 kg kilogram=1000 mg milligram=1/1000 lb lbs pound=45359237/100000 oz ounce=45359237/1600000 tonne=1000000",
    "volume": "L l liter litre=1 mL ml milliliter millilitre=1/1000 gal gallon=473176473/125000000 quart=473176473/500000000",
    "dollar": "dollar usd buck=1 cent=1/100 penny=1/100 dime=1/10 nickel=1/20",
    "euro": "euro eur=1",
    "pound sterling": "gbp=1",
    "rupee": "rupee rs inr=1 paise=1/100",
    "yen": "yen jpy=1",
    "yuan": "yuan rmb cny=1",
    "angle": "° degree deg=1",
    "radian": "rad radian=1",
    "energy": "J joule=1 kJ kilojoule=1000 cal calorie=4.184",
    "electronvolt": "eV=1 keV=1000 MeV=1000000 GeV=1000000000",
    "force": "N newton=1 kN kilonewton=1000",
    "power": "W watt=1 kW kilowatt=1000 MW megawatt=1000000",
    "voltage": "V volt=1 mV millivolt=1/1000 kV kilovolt=1000",
    "current": "A ampere amp=1 mA milliampere=1/1000",
    "frequency": "Hz hertz=1 kHz kilohertz=1000 MHz megahertz=1000000",
    "temperature": "K kelvin=1",
    "celsius": "degreec celsius=1",
    "fahrenheit": "degreef fahrenheit=1",
    "amount": "mol mole=1",
    "magnetic flux density": "T tesla=1",
    "charge": "C coulomb=1",
    "capacitance": "F farad=1",
    "pressure": "Pa pascal=1 kPa kilopascal=1000 atm atmosphere=101325",
    "unit": "unit=1",
}
for measure, row in TABLE.items():
    names: list[str] = []
    for word in row.split():
        name, _, factor = word.partition("=")
        names.append(name)
        if factor:
            KNOWN |= dict.fromkeys(names, (measure, Fraction(factor)))
            names = []
IRREGULAR = {"feet": "foot", "inches": "inch", "centuries": "century", "pennies": "penny", "children": "child"}
IRREGULAR |= {"people": "person", "men": "man", "women": "woman", "mice": "mouse", "halves": "half"}
SHORT_FORMS = {
    "pounds? sterling": "gbp",
    "mph": "mile per hour",
    "kmph": "km per hour",
    "kph": "km per hour",
    "kmh": "km per hour",
}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
NOT_UNITS = frozenset({
    "and", "or", "not", "if", "when", "where", "but", "to", "maybe", "is", "are", "was", "the", "answer", "than", "least", "most",
    "about", "either", "both", "else", "nor", "x", "y", "z", "pi", "infinity", "undefined", "mod",
})  # fmt: skip
LETTERS = frozenset("mgshlLVWJNKATCF")
"""Single-letter symbols, which are also variable names: units only after a space or in \\text{}."""
PIECE = re.compile(r"([A-Za-z°µ]+)\.?(?:\s*\^?\s*\{?\s*([-−]?\d)\s*\}?)?|\s*([/*·.])\s*|\s+")


@dataclass(frozen=True)
class Unit:
    """A unit of measurement."""

    measure: tuple[tuple[str, int], ...]
    """(dimension or noun, power), sorted; "miles per hour" is (("length", 1), ("time", -1))."""
    factor: Fraction
    """Factor to the base unit."""


def read_unit(text: str, spoken: bool = True, in_text: bool = False) -> tuple[Unit | None, int] | None:
    r"""(unit or None, scale) of the words after a number: "million dollars" is (dollar, 1000000).

    Args:
        spoken: the words are in \text{} or follow a space, so that a single letter may be a unit.
        in_text: they are in \text{}, so that any word may be a unit.

    Returns:
        None if the words are not a unit.
    """
    words = text.strip()
    scale = 1
    while (first := re.match(r"([A-Za-z]+)\b\s*(?:of\b)?\s*", words)) and first.group(1).casefold() in SCALES:
        scale *= SCALES[first.group(1).casefold()]
        words = words[first.end() :]
    if not words:
        return None, scale
    for short, long in SHORT_FORMS.items():
        words = re.sub(rf"(?i)\b{short}\b", long, words)
    words = re.sub(r"(?i)(?:°|\bdegrees?)\s*(c|f)(?:elsius|ahrenheit)?\b", r"degree\1", words)
    measures = _measures(words, spoken, in_text)
    if measures is None:
        return None
    powers: dict[str, int] = {}
    factor = Fraction(1)
    for measure, value, power in measures:
        powers[measure] = powers.get(measure, 0) + power
        factor *= value**power
    return Unit(tuple(sorted((m, p) for m, p in powers.items() if p)), factor), scale


def _measures(words: str, spoken: bool, in_text: bool) -> list[tuple[str, Fraction, int]] | None:
    """(dimension, factor, power) per word; a noun that is not in the table is its own dimension."""
    measures: list[tuple[str, Fraction, int]] = []
    at, sign, prefix, nouns = 0, 1, 1, 0
    while at < len(words):
        piece = PIECE.match(words, at)
        if not piece or piece.end() == at:
            return None
        at = piece.end()
        name, power, operator = piece.groups()
        if operator == "/" or (name and name.casefold() in ("per", "a", "each", "every") and measures):
            sign = -1
        if not name or name.casefold() in ("per", "of", "a", "an", "each", "every") or (measures and name == "in"):
            continue
        if name.casefold() in POWERS:
            if name.casefold() in ("squared", "cubed") and measures:
                measure, factor, before = measures.pop()
                measures.append((measure, factor, before * POWERS[name.casefold()]))
            else:
                prefix = POWERS[name.casefold()]
            continue
        known_unit = _known(name, spoken)
        if known_unit is None and not _may_be_unit(name, in_text):
            return None
        nouns += known_unit is None
        if nouns > 4:
            return None
        measure, factor = known_unit or (name if _is_symbol(name) else _singular(name.casefold()), Fraction(1))
        measures.append((measure, factor, sign * prefix * int((power or "1").replace("−", "-"))))
        prefix = 1
    return measures or None


def _may_be_unit(name: str, in_text: bool) -> bool:
    """Whether a word that is not in the table can be a counted noun: not a variable or a conjunction."""
    if name.casefold() in NOT_UNITS:
        return False
    return in_text or (len(name) >= 3 and re.search(r"[aeiouyA-Z]", name) is not None)


def _is_symbol(name: str) -> bool:
    """Whether case matters (MeV and meV differ)."""
    return len(name) <= 4 and name[1:] != name[1:].lower()


def _known(name: str, spoken: bool) -> tuple[str, Fraction] | None:
    if len(name) == 1 and name.isalpha():
        return KNOWN.get(name) if spoken and name in LETTERS else None
    singular = _singular(name.casefold())
    return KNOWN.get(name) or KNOWN.get(name.casefold()) or KNOWN.get(singular)


def _singular(name: str) -> str:
    if name in IRREGULAR:
        return IRREGULAR[name]
    if len(name) > 4 and name.endswith("ies"):
        return name[:-3] + "y"
    if len(name) > 4 and re.search(r"(?:s|x|z|ch|sh)es$", name):
        return name[:-2]
    return name[:-1] if len(name) > 3 and name.endswith("s") and not name.endswith("ss") else name
