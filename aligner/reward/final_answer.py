r"""Where the final answer stands in a response: after the reasoning, in a \boxed{}, behind ####, or said in a sentence."""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
UNBRACED = re.compile(r"[^\s$\\]\S*?(?=[$\s]|\\[)\]]|[.,;]?$)|\\[A-Za-z]+(?:\{[^{}]*\})*")
BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&~]|\\[,;:!()\[\] ]|\\q?quad(?![A-Za-z])|\\(?:text|mbox)\s*\{\s*(?:,?\s*(?:and|or))?\s*\}"
    r"|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
)
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
MARKER = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
MARKED_NUMBER = re.compile(
    r"[-+−]?\s*(?:\\?\$|[€£¥₹])?\s*[-+−]?[\d.][\d.,/:]*\s*(?:\\?%|°)?(?:\s*[a-z]{1,20}){0,3}\.?|\$[^$]+\$\.?|\\\(.+\\\)\.?"
)
HEADING = re.compile(
    r"(?:\d+\s*[.):]\s*)?(?:step|part|case|problem|question|section|chapter)\b|\d+\s*[.):](?!\d)", re.IGNORECASE
)
SAID = re.compile(
    r"(?i)\b(?:answer|option|choice|solution|root)s?\b[*_\s]*(?:\([^)\n]{0,40}\))?[*_\s]*(?:is|are|:|=)[*_:\s]*"
)
SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z\n])|[.!?]?\s*(?:\n|$)|\.\s*I hope\b")
FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\\d])\$(?!\s*\d[\d.,]*\s+[A-Za-z])([^$\n]+?)(?<!\\)\$", re.DOTALL
)
NUMBER = r"(?:[-+−]\s?)?(?:\\?\$|[€£¥₹])?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?"
WORDS_AFTER = (
    r"(?:\s*(?:\\?%|percent\b|°)|\s+(?:hundred|thousand|million|billion|trillion|dozen|dollars?|cents?|euros?|pounds?|seconds?"
    r"|minutes?|hours?|days?|weeks?|months?|years?|[kcm]?m|k?g|kilometers?|meters?|centimeters?|miles?|feet|inches|degrees?)\b)*"
)
LAST_NUMBER = re.compile(
    rf"\([^()\n]*\d[^()\n]*,[^()\n]*\)|(?<![\w.])\d{{1,2}}:\d{{2}}(?:\s*[ap]\.?m\b\.?)?"
    rf"|(?<![\w.^_]){NUMBER}{WORDS_AFTER}(?:\s+(?:or|and)\s+{NUMBER}{WORDS_AFTER})*"
)


def after_reasoning(response: str, end: str = "</think>") -> str | None:
    """What follows the last end of reasoning; None where reasoning has begun and not ended, so that nothing is answered."""
    if not end:
        return response
    _, found, rest = response.rpartition(end)
    start = end.replace("/", "", 1)
    if start != end and start in rest:
        return None
    return rest if found else response


def final_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{} or \fbox{}, else between <answer> tags, else behind the last ####; or None.

    Boxes with nothing but "and", "or", commas between them are one list, "\boxed{1} and \boxed{2}" is "1, 2". A ####
    is no heading: nothing follows its line, or a number or a formula stands there. In <answer> tags all of this counts
    for what they hold. The last box may be empty.
    """
    tagged = TAGGED.findall(text)
    held = str(tagged[-1]) if tagged else text
    found = boxed_answer(held)
    if found is None:
        found = _marked(held)
    return held.strip() if found is None and tagged else found


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{} or \fbox{}, or in those right before it too; None where there is none."""
    boxes = _boxes(text)
    return _joined(text, boxes) if boxes else None


def unfinished(text: str) -> bool:
    """Whether its only boxes or tags are ones that never close: the response was cut off inside its answer."""
    if BOX.search(text) is not None and not _boxes(text):
        return True
    lowered = text.lower()
    return "<answer>" in lowered and "</answer>" not in lowered


def said_answer(text: str) -> tuple[str, bool]:
    """(what may be the final answer of a text without a mark, whether it stands behind words such as "the answer is");
    where there are no such words, the whole text."""
    for phrase in reversed(list(SAID.finditer(text))):
        rest = text[phrase.end() :]
        end = SENTENCE_END.search(rest)
        said = rest[: end.start() if end else None].strip(" \t\n*_`")
        if said:
            return said, True
    return text.strip(), False


def last_value(text: str, first: bool = False) -> str | None:
    """The last (first) formula between math delimiters, or number, whichever comes later (earlier)."""
    formulas = [(match.end(), next(group for group in match.groups() if group)) for match in FORMULA.finditer(text)]
    plain = FORMULA.sub(lambda match: " " * len(match.group()), text)
    numbers = [(match.end(), match.group()) for match in LAST_NUMBER.finditer(plain)]
    found = sorted(formulas + numbers, key=lambda place: place[0])
    return (found[0] if first else found[-1])[1].strip() if found else None


def _marked(text: str) -> str | None:
    """Behind the last ####."""
    for match in reversed(list(MARKER.finditer(text))):
        said = match.group(1).strip()
        if not said or HEADING.match(said):
            continue
        if not text[match.end() :].strip() or MARKED_NUMBER.fullmatch(said.split("####")[-1].strip()):
            return said.split("####")[-1].strip() or None
    return None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each box that closes and lies in no other, or of the innermost; one pass."""
    starts = {match.end(): match.start() for match in BOX.finditer(text)}
    found: list[tuple[int, int, str]] = []
    open_braces: list[tuple[int, int | None]] = []
    for at in (at for at in starts if text[at : at + 1] != "{"):
        bare = UNBRACED.match(text, at)
        if bare:
            found.append((starts[at], bare.end(), bare.group()))
    for match in BRACE.finditer(text) if any(text[at : at + 1] == "{" for at in starts) else ():
        if match.group() == "{":
            open_braces.append((match.end(), starts.get(match.start())))
        elif match.group() == "}" and open_braces:
            begin, start = open_braces.pop()
            if start is not None:
                found.append((start, match.end(), text[begin : match.start()]))
    return sorted(found)


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """The last box's content, with those right before it where only separators stand between."""
    start, _, content = boxes[-1]
    parts = [content.strip()]
    for begin, end, earlier in reversed(boxes[:-1]):
        if end > start:  # around the one that counts
            continue
        if start - end > 80 or not BETWEEN_BOXES.fullmatch(text, end, start):
            break
        start = begin
        if earlier.strip() not in parts:
            parts.append(earlier.strip())
    return ", ".join(reversed(parts))
