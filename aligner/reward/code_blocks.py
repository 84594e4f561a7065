"""Extract the Python program from a response: fenced code blocks by CommonMark's rules, and which of them is used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token

BLOCKS = ("last", "first", "all", "text")
PYTHON = re.compile(r"(?:i?python|py)[23]?(?:\.\d+)*", re.IGNORECASE)
MARKDOWN = re.compile(r"(?:markdown|md)", re.IGNORECASE)
LANGUAGE = re.compile(r"[\s{.]*(?:language-|lang=)?([\w+#.-]*)")
REASONING = r"(?:(?:seed:)?think(?:ing)?|thought|reasoning)"
REASONING_END = re.compile(rf"</{REASONING}>|\[/THINK\]", re.IGNORECASE)
REASONING_START = re.compile(rf"\s*(?:<{REASONING}>|\[THINK\])", re.IGNORECASE)
TAG_BEFORE = re.compile(r"(</?\w+>)[ \t]*(?=(?:```|~~~))")
TAG_BEHIND = re.compile(r"^([ \t]*(?:```+|~~~+))[ \t]*(?=</?\w+>)", re.MULTILINE)
WORDS_BEFORE = re.compile(r"(?<=\S)[ \t]*(?=(?:```|~~~)(?:python|py)\d?[ \t]*$)", re.MULTILINE | re.IGNORECASE)


def python_block(response: str, block: str = "last") -> str | None:
    """The Python program in a response; None if there is none.

    Blocks are fenced (backticks or tildes) as in CommonMark; tags such as <answer> around them are ignored. Candidates
    are blocks whose info string begins with python, py, python3 ... (after other words on the line only if there is no
    other); else those without an info string; else those inside an indented or a ```markdown block. Empty blocks and
    everything in the reasoning (up to the last </think>, or all of it if it never ends) are ignored.

    Args:
        block: last (as in verl's prime_code and LiveCodeBench), first, all (joined in order, as in verl's coder1), or
            text: the response itself is the program, without a fence.
    """
    answer = final_part(response)
    if answer is None:
        return None
    if block == "text":
        return answer if answer.strip() else None
    answer = TAG_BEHIND.sub(r"\1\n", TAG_BEFORE.sub(r"\1\n", answer))
    programs = _python_of(answer, depth=2)
    if not programs:
        return None
    return "\n".join(programs) if block == "all" else programs[0 if block == "first" else -1]


def final_part(response: str) -> str | None:
    """The text after the reasoning; None if the reasoning does not end."""
    ends = list(REASONING_END.finditer(response))
    if ends:
        return response[ends[-1].end() :]
    return None if REASONING_START.match(response) else response


def _python_of(text: str, depth: int) -> list[str]:
    tokens = list(_blocks(text))
    named = _contents(token for token in tokens if _language(token, PYTHON))
    if not named:
        named = _contents(token for token in _blocks(WORDS_BEFORE.sub("\n", text)) if _language(token, PYTHON))
    programs = named or _contents(token for token in tokens if token.type == "fence" and not token.info.strip())
    if programs or not depth:
        return programs
    wraps = _contents(token for token in tokens if token.type == "code_block" or _language(token, MARKDOWN))
    return [code for inner in wraps for code in _python_of(inner, depth - 1)]


def _contents(tokens: Iterable[Token]) -> list[str]:
    return [token.content for token in tokens if token.content.strip()]


def _blocks(text: str) -> Iterator[Token]:
    return (token for token in _parser().parse(text) if token.type in ("fence", "code_block"))


def _language(token: Token, pattern: re.Pattern[str]) -> bool:
    match = LANGUAGE.match(token.info)
    return bool(match and pattern.fullmatch(match.group(1)))


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    # No HTML: a line with only <answer> would start an HTML block that hides the fence below it.
    return MarkdownIt("commonmark", {"html": False}).disable("inline")
