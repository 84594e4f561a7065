"""Parse the text of an answer into one of the types of `answer_forms`."""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse
from math_verify.parser import NormalizationConfig
from sympy import And, FiniteSet, I, MatrixBase, Rational, Union, nan, zoo
from sympy.core.relational import Relational

from aligner.reward.answer_forms import Answer, Choice, Clock, Equation, Formula, Items, Quantity, Ratio, Words
from aligner.reward.answer_text import DOLLAR, balanced, closes_at, depth, outer_braces_off, split_at, split_list, tidy
from aligner.reward.units import CURRENCIES, Unit, read_unit

# It warns that its own time limit is off; the row's time limit is enforced by killing the worker.
logging.getLogger("math_verify").setLevel(logging.ERROR)
FORMULA = (
    LatexExtractionConfig(
        boxed_match_priority=-1,
        # Units are parsed here: math-verify would drop the m of "3m" and the word of "2 million".
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        ),
    ),
)
MOST_DIGITS = 4000
"""Python refuses to read integers of more digits than 4300."""
MOST_WORDS = 30
DEEPEST = 60
"""Maximum nesting of brackets."""
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?")
SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*([-+]?\d{1,4})\s*\}?")
FRACTION = re.compile(r"([-+]?)(\d{0,9})(?:\s*\\frac\s*\{\s*(-?\d{1,18})\s*\}\s*\{\s*(\d{1,18})\s*\})")
QUOTIENT = re.compile(r"([-+]?\d{1,18})\s*/\s*(\d{1,18})")
CHOICE = re.compile(r"\(\s*([A-Ja-j])\s*\)\s*[.:]?|([A-J])\s*[).:]|(?:(?i:option|choice)\s+)\(?([A-Ja-j])\)?")
CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))(?::([0-5]\d))?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
HOUR = re.compile(r"(\d{1,2})\s*([ap])\.?\s?m\.?", re.IGNORECASE)
NAME = re.compile(
    r"\(\s*[a-z]\s*(?:,\s*[a-z]\s*)+\)|(?:m\s*)?(?:\\(?:angle|triangle|overline|vec|bar|hat|mathbb|mathcal|Delta)\s*)?\|?\{?(?:[A-Za-z]{1,3}|\\(?!pi(?![a-z])|text|frac|sqrt)[A-Za-z]+)\}?\|?"
    r"'*(?:_(?:\w|\{[^{}]*\}))?'*\s*(?:\([A-Za-z0-9, ]*\))?"
)
EQUALS = re.compile(r"(?<![\\<>!=:])=(?!=)|\\equiv(?![a-z])|\\approx(?![a-z])")
RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|neq?|leqslant|geqslant)(?![a-z])")
MEMBER = re.compile(r"\\in(?![a-z])")
COLON = re.compile(r":|\s+to\s+|\s*\\text\s*\{\s*to\s*\}\s*")
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
TAIL = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*((?:\^\s*\{?\s*-?\d\s*\}?)?\s*(?:/|-|\*|\\cdot)?)\s*$")
PLAIN_TAIL = re.compile(r"(?<=[\d.})!%])(\s*)((?:°|[A-Za-zµ]).*|(?<=\s)\([A-Za-z -]{3,}\))$")
UNENDING = re.compile(r"(?:\.\.\.|…|\\[lc]?dots)\s*\$?\s*$")
COMPOUND = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)\.?,?\s+(?:and\s+)?(\d+(?:\.\d+)?)\s*([A-Za-z]+)\.?")
BUILDER = re.compile(r"\\mid(?![a-z])|\||:")
EVALUATED = re.compile(r"\\(?:d?t?binom|gcd|lcm|mod|bmod|pmod|det)(?![a-z])|_\{?\w+\}?\s*[CP]|[CP]_")
BIG = re.compile(r"\d{6}|\^\s*\{?\s*[^{}\s]*[\d^]{3}|\^.*\^|!")
COMMAND = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}(?:\{[clr|]+\})?|\\text\s*\{[^{}]*\}|\\[A-Za-z]+")
PROSE = re.compile(r"[A-Za-z]{4}|[A-Za-z]{2,}\s+[A-Za-z]{2,}")
BASE = re.compile(r"([0-9A-Fa-f]+)_\s*\{?\s*(\d{1,2})\s*\}?")


def parse_answer(text: str) -> Answer | None:
    """Parse an answer; None if it cannot be parsed."""
    if UNENDING.search(text):
        return None
    tidied = tidy(text)
    return None if depth(tidied) > DEEPEST else _parse(tidied)


@lru_cache(maxsize=4096)
def expression(source: str) -> Any:
    """A LaTeX formula as an unevaluated SymPy object; None if it is not one."""
    if re.search(r"(?<![_^\d])\d+\s+\d", source) or not balanced(source):  # "3 4" would be 7
        return None
    if PROSE.search(COMMAND.sub(" \\\\ ", source)):  # a word would be a product of its letters
        return None
    if EVALUATED.search(source) and BIG.search(source):  # the parser computes these at once
        return None
    latex = source.replace("°", r"^{\circ}")
    parsed = parse(f"${latex}$", FORMULA, fallback_mode="no_fallback", parsing_timeout=None)
    value: Any = parsed[0] if parsed else None
    symbols = getattr(value, "free_symbols", ())
    if [symbol.name for symbol in symbols] == ["i"] and not isinstance(value, MatrixBase):
        value = value.subs(next(iter(symbols)), I)
    return None if value in (zoo, nan) else value


def number(text: str) -> Quantity | None:
    """Parse a number: 12, -1,234.50, .5, 2/3, 1\\frac{1}{2}, 6.02\\times10^{23}."""
    if len(text) > MOST_DIGITS:
        return None
    if PLAIN_NUMBER.fullmatch(text) and any(map(str.isdigit, text)):
        return Quantity(text, Fraction(text.replace(",", "").rstrip(".")), "." not in text.rstrip("."))
    quotient = QUOTIENT.fullmatch(text)
    if quotient and int(quotient[2]):
        return Quantity(text, Fraction(int(quotient[1]), int(quotient[2])))
    mixed = FRACTION.fullmatch(text)
    if mixed and int(mixed[4]) and not (mixed[2] and mixed[3].startswith("-")):
        value = int(mixed[2] or 0) + Fraction(int(mixed[3]), int(mixed[4]))
        return Quantity(text, -value if mixed[1] == "-" else value)
    scientific = SCIENTIFIC.fullmatch(text)
    if scientific:
        return Quantity(text, Fraction(scientific[1]) * Fraction(10) ** int(scientific[2]), False)
    return None


def _parse(text: str) -> Answer | None:
    text = outer_braces_off(text.strip())
    if not text:
        return None
    return (
        number(text)
        or _choice(text)
        or _clock(text)
        or _compound(text)
        or _list(text)
        or _words(text)
        or _equation(text)
        or _bracketed(text)
        or _ratio(text)
        or _both_signs(text)
        or _formula_with_signs(text)
        or _quantity(text)
    )


def _choice(text: str) -> Answer | None:
    in_text = TEXT.fullmatch(text)
    match = CHOICE.match(text := in_text[1].strip() if in_text else text)
    if not match:
        return None
    letter, rest = "".join(group or "" for group in match.groups()), text[match.end() :].strip()
    if rest and (
        match[3] or letter.islower() or re.match(r"[-+*/^=<>,;_(\\](?!\\?(?:text|frac|sqrt|pi|\$))|[,;]", rest)
    ):
        return None
    beside = _parse(rest) if rest else None
    if rest and (beside is None or isinstance(beside, Choice)):  # several letters choose nothing
        return None
    return Choice(text, letter.casefold(), beside)


def _clock(text: str) -> Answer | None:
    plain = TEXT.sub(r" \1", text).strip()
    hour = HOUR.fullmatch(plain)
    if hour and 1 <= int(hour[1]) <= 12:
        return Clock(text, int(hour[1]) % 12 * 3600, hour[2].casefold())
    match = CLOCK.fullmatch(plain)
    if not match or int(match[1]) > 24:
        return None
    hours = int(match[1]) % 12 if int(match[1]) <= 12 else int(match[1])
    clock: Clock | None = Clock(
        text, hours * 3600 + int(match[2]) * 60 + int(match[3] or 0), match[4].casefold() if match[4] else None
    )
    if match[4]:
        return clock if int(match[1]) <= 12 else None
    return Ratio(text, tuple(Fraction(part) for part in plain.split(":")), clock)


def _list(text: str) -> Answer | None:
    if PLAIN_NUMBER.fullmatch(text) or not re.search(r"[,;]|and|or", text):
        return None
    joined = re.sub(
        r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)",
        lambda m: m.group().replace(",", "") if _outside(text, m.start()) else m.group(),
        text,
    )
    parts = split_list(joined)
    if len(parts) < 2:
        return _parse(joined) if joined != text else None
    items = [_parse(part) for part in parts]
    if not all(items):
        return _words(text)
    return _either(text, items) or Items(text, "", tuple(item for item in items if item is not None))


def _either(text: str, items: list[Answer | None]) -> Answer | None:
    """ "x < -2 or x > 3" as one set; None for other lists."""
    relations = [item.value for item in items if isinstance(item, Formula) and isinstance(item.value, Relational | And)]
    if len(relations) < len(items) or not re.search(r"(?<![A-Za-z])or(?![A-Za-z])", text):
        return None
    sets = [solutions(relation) for relation in relations]
    return Formula(text, Union(*sets)) if None not in sets else None


def solutions(relation: Any) -> Any:
    """The solution set of an inequality in one variable; None if SymPy finds none."""
    try:
        return relation.as_set()
    except Exception:  # several variables, or not solvable by SymPy
        return None


def _compound(text: str) -> Answer | None:
    """2 hours 30 minutes, 18 dollars and 50 cents."""
    match = COMPOUND.fullmatch(re.sub(r"\s+", " ", TEXT.sub(r" \1 ", text)).strip())
    if not match:
        return None
    big, small = read_unit(match[2]), read_unit(match[4])
    if not (big and small and big[0] and small[0]) or big[0].measure != small[0].measure or big[0] == small[0]:
        return None
    value = Fraction(match[1]) + Fraction(match[3]) * small[0].factor / big[0].factor
    return Quantity(text, value, "." not in text, big[0])


def _outside(text: str, at: int) -> bool:
    return balanced(text[:at])


def _words(text: str) -> Words | None:
    plain = re.sub(r"\s+", " ", TEXT.sub(r" \1 ", text)).strip()
    spelling = "".join(sign for sign in plain if sign.isalnum()).casefold()
    in_text = TEXT.fullmatch(text) is not None
    if not spelling or len(plain.split()) > MOST_WORDS:
        return None
    letters_only = all(sign.isalpha() or sign.isspace() for sign in plain)
    if letters_only and re.fullmatch(r"[u-z]{2,}", plain) and not in_text:
        return None  # a product of variables, in any order
    if letters_only and plain not in ("e", "i"):
        return Words(text, spelling)
    if in_text and not plain[0].isdigit():
        return Words(text, spelling)
    if (
        re.match(r"""["'(]?[^\W\d_]""", plain)
        and re.fullmatch(r"""[\w\s"'’.,;:!?()/&-]+""", plain)
        and "_" not in plain
    ):
        runs = re.findall(r"[^\W\d_]+", plain)
        if any(len(run) >= 3 for run in runs) and not re.search(r"[A-Za-z]\(|\d\s*[-/]\s*[A-Za-z]\b", plain):
            return Words(text, spelling)
    return None


def _equation(text: str) -> Answer | None:
    member = split_at(text, MEMBER)
    if len(member) == 2 and NAME.fullmatch(member[0]) and not RELATION.search(text):
        last = _parse(member[1])
        return Equation(text, member[0].strip(), last, False) if last else None
    if RELATION.search(text):
        return None
    sides = split_at(text, EQUALS)
    if len(sides) < 2 or not all(sides):
        return None
    # 1/3 \approx 0.33: the exact side counts, unless the left side is only a name.
    if re.search(r"\\approx", text) and not NAME.fullmatch(sides[0]) and len(sides) == 2 and "=" not in text:
        return _parse(sides[0])
    if re.search(r"\\approx", text) and len(sides) > 2:
        sides = sides[:-1]
    if len(sides) == 2 and NAME.fullmatch(sides[1]) and not NAME.fullmatch(sides[0]):
        sides.reverse()
    last = _parse(sides[-1])
    if last is None:
        return None
    first = TEXT.sub(r"\1", sides[0]).strip()
    if NAME.fullmatch(sides[0]):
        return Equation(text, re.sub(r"[\s{}]", "", sides[0]), last, False)
    if re.fullmatch(r"[A-Za-z][A-Za-z ']*", first):
        return last  # "Area = 12": the name says nothing
    closed = not any(re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", side)) for side in sides[:-1])
    return Equation(text, None, last, closed)


def _bracketed(text: str) -> Answer | None:
    if text.startswith(r"\{") and text.endswith(r"\}") and closes_at(text, 1) == len(text) - 1:
        brackets, inner = "{}", text[2:-2]
    elif text[0] in "([{" and text[-1] in ")]}" and closes_at(text, 0) == len(text) - 1:
        brackets, inner = text[0] + text[-1], text[1:-1]
    else:
        return None
    if brackets not in ("{}", "()", "[]", "(]", "[)"):
        return None
    if not inner.strip():
        return Formula(text, expression(r"\emptyset")) if brackets == "{}" else None
    if (
        brackets == "{}"
        and len(builder := split_at(inner, BUILDER)) == 2
        and NAME.fullmatch(builder[0].split(r"\in")[0].strip())
    ):
        return _parse(builder[1])
    parts = split_list(inner)
    if len(parts) == 1 and brackets == "()":
        return _parse(inner)
    items = [_parse(part) for part in parts]
    if len(parts) == 1 and brackets == "[]":
        return items[0]
    if not all(items):
        return None
    if len(parts) == 1 and (brackets in ("(]", "[)") or RELATION.search(inner)):
        return None
    return Items(text, brackets, tuple(item for item in items if item is not None))


def _ratio(text: str) -> Answer | None:
    sides = split_at(text, COLON)
    if len(sides) < 2:
        return None
    parts = [_parse(side) for side in sides]
    if not all(isinstance(part, Quantity) for part in parts):
        return None
    values = [part.value for part in parts if isinstance(part, Quantity)]
    return Ratio(text, tuple(values), None)


def _both_signs(text: str) -> Answer | None:
    """1 \\pm \\sqrt{2} as a list of two."""
    if len(re.findall(r"\\(?:pm|mp)(?![a-z])", text)) != 1:
        return None
    items = [_parse(re.sub(r"\\(?:pm|mp)(?![a-z])", sign, text)) for sign in "+-"]
    return Items(text, "", tuple(item for item in items if item is not None)) if all(items) else None


def _formula_with_signs(text: str) -> Answer | None:
    """Relations and sets, which have no units."""
    if not (RELATION.search(text) or re.search(r"\\(?:cup|cap|setminus|mathbb|emptyset|begin)(?![a-z])", text)):
        return None
    value = expression(TEXT.sub(r"\1", text) if RELATION.search(text) else text)
    return None if value is None else Formula(text, value)


def _quantity(text: str) -> Answer | None:
    body, unit, scale, percent = _measured(text)
    if body is None:
        return None
    base = BASE.fullmatch(body)
    if base and unit is None:
        return Quantity(text, int(base[1], 36), True, base=int(base[2]))
    plain = number(body)
    if plain is not None:
        return Quantity(text, plain.value * scale, plain.exact, unit, percent)
    value = expression(body)
    if value is None:
        return None
    if isinstance(value, FiniteSet):
        items = [Quantity(str(item), item, True, unit, percent) for item in value.args]
        return items[0] if len(items) == 1 else Items(text, "", tuple(items))
    if not hasattr(value, "is_number"):
        return Formula(text, value) if unit is None and not percent and scale == 1 else None
    if isinstance(value, Rational) and scale == 1:
        value = Fraction(int(value.p), int(value.q))
    return Quantity(text, value * scale if scale != 1 else value, not _decimal(body), unit, percent)


def _decimal(text: str) -> bool:
    return re.search(r"\d\.\d|(?<!\d)\.\d", text) is not None


def _measured(text: str) -> tuple[str | None, Unit | None, int, bool]:
    """(text of the number, unit, scale, whether it is a percentage); None for the text if the words are not a unit."""
    currency, rest = _currency(text)
    percent = rest.endswith("%")
    body = rest[:-1].rstrip() if percent else rest
    words, spoken = "", True
    while (tail := TAIL.search(body)) and tail.start() > 0:
        power = tail[2].replace(r"\cdot", "*").replace("-", "*") if not tail[2].startswith("^") else tail[2]
        words, body = f"{tail[1]}{power} {words}", body[: tail.start()]
    if not words and (plain := PLAIN_TAIL.search(body)):
        words, spoken, body = (
            plain[2].strip("()").replace("-", " "),
            bool(plain[1]) or plain[2].startswith("°"),
            body[: plain.start()],
        )
        if not re.fullmatch(r"[A-Za-zµ°\s/*.^{}\d-]+", words) or (not spoken and len(words) == 1):
            words, body = "", rest[:-1].rstrip() if percent else rest
    elif "°" in body and body.endswith("°"):
        words, body = f"° {words}", body[:-1]
    if not words.strip():
        return body, (read_unit(currency) or (None, 1))[0] if currency else None, 1, percent
    parsed_unit = read_unit(words, spoken, TAIL.search(rest) is not None)
    if parsed_unit is None:
        return (None, None, 1, False) if TAIL.search(rest) else (rest, None, 1, percent)
    unit, scale = parsed_unit
    if currency:
        unit = (read_unit(currency) or (None, 1))[0] if unit is None or unit.measure == (("dollar", 1),) else unit
    return body.strip() or None, unit, scale, percent


def _currency(text: str) -> tuple[str, str]:
    """(name of the currency before or after the number, or ""; the rest)."""
    match = re.match(
        rf"([-+]?)\s*(?:\\text\s*\{{\s*)?(US{DOLLAR}|{DOLLAR}|[€£¥₹]|(?:USD|EUR|GBP|Rs\.?|INR)(?![A-Za-z]))\s*\}}?\s*",
        text,
    )
    if match:
        sign = match[2].removeprefix("US").rstrip(".")
        name = CURRENCIES.get("$" if sign == DOLLAR else sign, sign)
        return name, match[1] + text[match.end() :]
    if text.endswith((DOLLAR, "€", "£", "¥", "₹")):
        return CURRENCIES["$" if text[-1] == DOLLAR else text[-1]], text[:-1].rstrip()
    return "", text
