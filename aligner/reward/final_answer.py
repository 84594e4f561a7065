r"""Extract the final answer from a response: after the reasoning, in \boxed{}, after ####, or after "the answer is"."""

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
ANNOUNCED = re.compile(
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
    """The text after the last end of reasoning; None if reasoning was opened and not closed, i.e. there is no answer."""
    if not end:
        return response
    _, tag, rest = response.rpartition(end)
    start = end.replace("/", "", 1)
    if start != end and start in rest:
        return None
    return rest if tag else response


def final_answer(text: str) -> str | None:
    r"""The content of the last \boxed{} or \fbox{}, else of the last <answer> tags, else the text after the last ####; or None.

    Boxes separated only by "and", "or" or commas are one list: "\boxed{1} and \boxed{2}" is "1, 2". A #### counts if it
    is not a Markdown heading: nothing follows its line, or a number or formula is on it. Inside <answer> tags the same
    rules apply to their content. The last box may be empty.
    """
    tagged = TAGGED.findall(text)
    content = str(tagged[-1]) if tagged else text
    answer = boxed_answer(content)
    if answer is None:
        answer = _marked(content)
    return content.strip() if answer is None and tagged else answer


def boxed_answer(text: str) -> str | None:
    r"""The content of the last \boxed{} or \fbox{}, joined with those directly before it; None if there is none."""
    boxes = _boxes(text)
    return _joined(text, boxes) if boxes else None


def unfinished(text: str) -> bool:
    """Whether its only boxes or tags never close, i.e. the response was truncated inside its answer."""
    if BOX.search(text) is not None and not _boxes(text):
        return True
    lowered = text.lower()
    return "<answer>" in lowered and "</answer>" not in lowered


def announced_answer(text: str) -> tuple[str, bool]:
    """(candidate answer of a text without a box or mark, whether it follows words such as "the answer is"); without such
    words the candidate is the whole text."""
    for phrase in reversed(list(ANNOUNCED.finditer(text))):
        rest = text[phrase.end() :]
        end = SENTENCE_END.search(rest)
        candidate = rest[: end.start() if end else None].strip(" \t\n*_`")
        if candidate:
            return candidate, True
    return text.strip(), False


def last_value(text: str, first: bool = False) -> str | None:
    """The last (or first) formula between math delimiters or number, whichever comes later (earlier)."""
    formulas = [(match.end(), next(group for group in match.groups() if group)) for match in FORMULA.finditer(text)]
    plain = FORMULA.sub(lambda match: " " * len(match.group()), text)
    numbers = [(match.end(), match.group()) for match in LAST_NUMBER.finditer(plain)]
    values = sorted(formulas + numbers, key=lambda place: place[0])
    return (values[0] if first else values[-1])[1].strip() if values else None


def _marked(text: str) -> str | None:
    """The answer after the last ####."""
    for match in reversed(list(MARKER.finditer(text))):
        line = match.group(1).strip()
        if not line or HEADING.match(line):
            continue
        if not text[match.end() :].strip() or MARKED_NUMBER.fullmatch(line.split("####")[-1].strip()):
            return line.split("####")[-1].strip() or None
    return None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each box that closes, in one pass; sorted by start."""
    starts = {match.end(): match.start() for match in BOX.finditer(text)}
    boxes: list[tuple[int, int, str]] = []
    open_braces: list[tuple[int, int | None]] = []
    for at in (at for at in starts if text[at : at + 1] != "{"):
        bare = UNBRACED.match(text, at)
        if bare:
            boxes.append((starts[at], bare.end(), bare.group()))
    for match in BRACE.finditer(text) if any(text[at : at + 1] == "{" for at in starts) else ():
        if match.group() == "{":
            open_braces.append((match.end(), starts.get(match.start())))
        elif match.group() == "}" and open_braces:
            begin, start = open_braces.pop()
            if start is not None:
                boxes.append((start, match.end(), text[begin : match.start()]))
    return sorted(boxes)


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """The last box's content, joined with the boxes before it that are separated from it only by separators."""
    start, _, content = boxes[-1]
    parts = [content.strip()]
    for begin, end, earlier in reversed(boxes[:-1]):
        if end > start:  # encloses the one that counts
            continue
        if start - end > 80 or not BETWEEN_BOXES.fullmatch(text, end, start):
            break
        start = begin
        if earlier.strip() not in parts:
            parts.append(earlier.strip())
    return ", ".join(reversed(parts))
