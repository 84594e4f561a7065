"""The program in a response: its fenced code blocks, found by CommonMark's rules, and which of them counts."""

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
    """The Python program in a response; None where there is none.

    Blocks are fenced (backticks or tildes) as CommonMark has it, tags such as <answer> around them aside. Those count
    whose info string begins with python, py, python3 ... (behind words on their line only where no other is); where
    there is none, those without an info string; then those inside an indented or a ```markdown block. An empty block
    does not count. Of reasoning, up to the last </think>, nothing counts; nor does reasoning that never ends.

    Args:
        block: last (as verl's prime_code and LiveCodeBench read a response), first, all (joined, in their order, as
            verl's coder1 does), or text: the response is the program itself, without a fence.
    """
    answer = final_part(response)
    if answer is None:
        return None
    if block == "text":
        return answer if answer.strip() else None
    answer = TAG_BEHIND.sub(r"\1\n", TAG_BEFORE.sub(r"\1\n", answer))
    found = _python_of(answer, depth=2)
    if not found:
        return None
    return "\n".join(found) if block == "all" else found[0 if block == "first" else -1]


def final_part(response: str) -> str | None:
    """What follows the reasoning; None where the reasoning does not end."""
    ends = list(REASONING_END.finditer(response))
    if ends:
        return response[ends[-1].end() :]
    return None if REASONING_START.match(response) else response


def _python_of(text: str, depth: int) -> list[str]:
    tokens = list(_blocks(text))
    named = _contents(token for token in tokens if _language(token, PYTHON))
    if not named:
        named = _contents(token for token in _blocks(WORDS_BEFORE.sub("\n", text)) if _language(token, PYTHON))
    found = named or _contents(token for token in tokens if token.type == "fence" and not token.info.strip())
    if found or not depth:
        return found
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
    # No HTML: a line with <answer> alone would begin a block of HTML that hides the fence below it.
    return MarkdownIt("commonmark", {"html": False}).disable("inline")
