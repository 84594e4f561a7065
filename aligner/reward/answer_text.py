r"""Normalise the text of an answer: Unicode, spacing, \text, math delimiters, decimal and mixed numbers."""

from __future__ import annotations

import re
from collections.abc import Callable

DOLLAR = "＄"
"""Marks a dollar sign that means money; an ordinary one delimits formulas."""
SIGNS = {
    "−–‒﹣": "-", "\u00a0\u2009\u202f\u2007\u3000": " ", "\u200b\u2060\ufeff": "", "’‘′": "'", "“”": '"', "∕⁄": "/",
    "×": r"\times ", "÷": r"\div ", "⋅·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤⩽": r"\le ", "≥⩾": r"\ge ",
    "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "≈": r"\approx ",
    "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda ", "º": "°", "ℝ": r"\mathbb{R}", "∠": r"\angle ",
}  # fmt: skip
TABLE = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) != DOLLAR}
    | {sign: text for signs, text in SIGNS.items() for sign in signs}
)
RAISED = {sign: digit for sign, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True)}
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
VULGAR = dict(
    zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞",
        re.findall(r"(\d)/(\d)", "1/2 1/3 2/3 1/4 3/4 1/5 2/5 3/5 4/5 1/6 5/6 1/8 3/8 5/8 7/8"),
        strict=True,
    )
)
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|lcm|det"
ORDINAL = r"(?:st|nd|rd|th)"
Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _rules(*pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> list[Rule]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6} as the fraction (16 - 1) / 90; the parser would drop the repeating part."""
    whole, fixed, again = match.groups()
    period, shift = 10 ** len(again) - 1, 10 ** len(fixed)
    return rf"\frac{{{(int(whole or 0) * shift + int(fixed or 0)) * period + int(again)}}}{{{period * shift}}}"


COMMANDS = _rules(
    (r"(?<!\\)\\(?:[,;:!> \n]|(?:q?quad|enspace|thinspace|displaystyle|textstyle|limits)(?![A-Za-z]))|(?<!\\)~", " "),
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\l?colon(?![A-Za-z])|\\mathbin\{:\}|\{:\}", ":"),
    (r"\\lbrace(?![A-Za-z])\s*", r"\\{"),
    (r"\s*\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\langle(?![A-Za-z])\s*", "("),
    (r"\s*\\rangle(?![A-Za-z])", ")"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\s*\\degrees?(?![A-Za-z])", "°"),
    (r"\\(?:mathrm|textrm|textbf|textit|textsf|textnormal|mbox|hbox|mathsf|mathit|texttt|emph|operatorname)\s*(?=\{)", r"\\text"),
    (r"\\(?:mathbf|boldsymbol|bm|underline|textcolor\s*\{\w+\})\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"{\1}"),
    (r"\\color\s*\{\w+\}\s*", ""),
    (r"\\(?:rm|bf|it|small|normalsize|large|Large|LARGE|huge|Huge|checkmark|blacksquare)(?![A-Za-z])\s*", ""),
    (rf"\\text\s*\{{\s*({FUNCTIONS})\s*\}}", r"\\\1 "),
    (r",?\s*\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}", r" \1 "),
    (r"\\text\s*\{\s*([^A-Za-z{}\\]*|i|\(?[A-J]\)[.:]?)\s*\}", r"\1 "),
)  # fmt: skip
NUMBERS = _rules(
    (
        rf"(?<=\d)\s*\^?\s*(?:\{{\s*\\text\s*\{{\s*{ORDINAL}\s*\}}\s*\}}|\{{\s*{ORDINAL}\s*\}}|\\text\s*\{{\s*{ORDINAL}\s*\}}|{ORDINAL}\b)",
        "",
    ),
    (r"(?<=\d)\.(?=\s*[/*+)}-])", ""),
    (r"\\textcircled\s*\{?\s*(\d)\s*\}?(?:\s*,)?", r"\1, "),
    (r"(?<![\w.,])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,4})(?!\w)", r"\1\\times10^{\2}"),
    (r"(?<=[\d.])\s*[xX*]\s*(?=10\s*\^|10\*\*)", r"\\times "),
    (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{\s*(\d+)\s*\}", _repeating),
    (r"(?<![\w.,}\])/])(\d+)\s+(?:and\s+)?(\d+)\s*/\s*(\d+)(?![\d.]|\s*[\d(/^])", r"\1\\frac{\2}{\3}"),
    (r"\^\s*([-+]?\d\d+|[-+]\d)", r"^{\1}"),
    (r"(?<![\w)}\]°!%])([-+])\s+(?=[\d\\.(])", r"\1"),
)
PLAIN = _rules(
    (r"\*\*", "^"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=(?!=)", r"\\ne "),
    (r"\+/-", r"\\pm "),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"(?<![A-Za-z\\])(?:[Ii]nfinity|infty|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (rf"(?<![A-Za-z\\])({FUNCTIONS})(?=\s*[(\d^_\\]|\s+[a-z]\b|\s*$)", r"\\\1"),
    (r"(?<![A-Za-z\\])sqrt\s*(?=\d)", r"\\sqrt "),
)
LEADING = re.compile(
    r"^\s*(?:\\text\s*\{\s*)?(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?(?:answer|solution)s?\s*(?:is|are|:|=)\s*:?\s*\}?"
    r"|^\s*(?:=|:|\\approx(?![a-z])|\\therefore|\\implies|\\Rightarrow)\s*",
    re.IGNORECASE,
)
WRAPPED = re.compile(r"([*_`]{1,3})(?!\s)(.*\S)\1", re.DOTALL)
DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\$\$")


def tidy(text: str) -> str:
    """Normalise an answer: no delimiters, no spacing commands, ASCII signs, money marked by `DOLLAR`."""
    text = text.strip()
    if not text.isascii():
        text = _ascii(text)
    text = _undelimited(_unwrapped(text))
    # Thousands separators in their various forms: "1{,}234", "1,\!234", "10\,080", "1 234 567".
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\[,;: ])\s*(?=\d{3}(?!\d))", "", text)
    text = re.sub(
        r"(?<![\w.,/^{-])([1-9]\d{0,2}(?: \d{3})+)(?![\d/]| *[\d/(])", lambda m: m.group().replace(" ", ""), text
    )
    if "\\" in text or "~" in text:
        text = _apply(COMMANDS, text)
    text = _roots(text.replace(r"\%", "%"))
    text = re.sub(r"(?<=[\d}])\s*(?:\\text\s*\{\s*)?(?:percent(?:age)?|pct)(?![A-Za-z])(?:\s*\})?", "%", text)
    text = _apply(NUMBERS, _apply(PLAIN, text))
    text = re.sub(r"\s+", " ", text).strip()
    while match := LEADING.match(text):
        if not match.end():
            break
        text = text[match.end() :]
    text = text.strip()
    if not re.search(r"[ap]\.\s?m\.$", text):
        text = re.sub(r"(?:[\s.,;:?]|(?<=[A-Za-z])!)+$", "", text)
    return text


def _roots(text: str) -> str:
    """Plain sqrt(...) to LaTeX."""
    for match in reversed(list(re.finditer(r"(?<![A-Za-z])\\?sqrt\s*\(", text))):
        end = closes_at(text, match.end() - 1)
        if end is not None:
            text = rf"{text[: match.start()]}\sqrt{{{text[match.end() : end]}}}{text[end + 1 :]}"
    return text


def outer_braces_off(text: str) -> str:
    """Strip braces around the whole text unless they hold a list: {12} is 12, {1,2} stays."""
    while text.startswith("{") and text.endswith("}") and "," not in text and closes_at(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


OPENING, CLOSING = "([{", ")]}"


def closes_at(text: str, start: int) -> int | None:
    r"""Index at which the bracket opened at `start` closes, by any kind of bracket, as in [0, 1); None if it never does.

    `\{` counts as a bracket like `{`."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] in OPENING:
            depth += 1
        elif text[at] in CLOSING:
            depth -= 1
            if depth == 0:
                return at
    return None


SEPARATOR = re.compile(r"\s*[,;]\s*(?:(?:and|or)(?![A-Za-z])\s*)?|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*")


def split_list(text: str) -> list[str]:
    """Split at commas, semicolons, "and" and "or" outside of brackets and environments."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        if text[at] in OPENING or text.startswith(r"\begin", at):
            depth += 1
        elif text[at] in CLOSING or text.startswith(r"\end", at):
            depth -= 1
        elif depth == 0 and (match := SEPARATOR.match(text, at)) and match.group().strip():
            parts.append(text[start:at].strip())
            start = at = match.end()
            continue
        at += 1
    return [*parts, text[start:].strip()]


def split_at(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Split at matches of the pattern outside of brackets."""
    parts, start = [], 0
    depth_at, depth = [], 0
    for sign in text:
        depth_at.append(depth)
        depth += (sign in OPENING) - (sign in CLOSING)
    for match in pattern.finditer(text):
        if depth_at[match.start()] == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def balanced(text: str) -> bool:
    """Whether all brackets close, by any kind of bracket."""
    depth = 0
    for sign in text:
        depth += (sign in OPENING) - (sign in CLOSING)
        if depth < 0:
            return False
    return depth == 0


def depth(text: str) -> int:
    """Maximum nesting of brackets."""
    deepest = open_ = 0
    for sign in text:
        open_ += (sign in OPENING) - (sign in CLOSING)
        deepest = max(deepest, open_)
    return deepest


def _apply(rules: list[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _ascii(text: str) -> str:
    for signs, mark in ((RAISED, "^"), (LOWERED, "_")):
        text = re.sub(f"[{''.join(signs)}]+", lambda m: f"{mark}{{{''.join(signs[s] for s in m.group())}}}", text)  # noqa: B023
    text = re.sub("([①②③④⑤⑥⑦⑧⑨]) *[,、，]?", lambda m: f"{ord(m[1]) - 0x245F}, ", text)
    for sign, (over, under) in VULGAR.items():
        text = text.replace(sign, rf"\frac{{{over}}}{{{under}}}")
    text = re.sub(
        r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|(?=[({]))", lambda m: rf"\sqrt{{{m.group(1)}}}" if m.group(1) else "sqrt", text
    )
    return text.translate(TABLE)


def _unwrapped(text: str) -> str:
    """Strip Markdown bold, italics and code marks around the whole text."""
    while match := WRAPPED.fullmatch(text):
        text = match.group(2).strip()
    return text


def _undelimited(text: str) -> str:
    """Strip math delimiters; dollar signs before amounts of money become `DOLLAR`."""
    text = DELIMITER.sub(" ", text).replace(r"\$", DOLLAR)
    if text.count("$") % 2 or re.search(r"\$\s*[\d.][\d.,]*\b[^$]*[A-Za-z ]\$\s*\d", text):
        text = re.sub(r"\$(?=\s*[-+]?\s*[\d.])", DOLLAR, text)
    return _unwrapped(text.replace("$", " ").strip())
