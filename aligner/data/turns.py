"""Find an assistant turn in its rendered conversation: where the generation prompt ends and where the turn ends."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aligner.data.chat import REASONING, Conversation, Notes, message_text
from aligner.data.tokenizer import render_chat

ASKS_NO_THOUGHT = re.compile(r"(</\w+>|\[/\w+\])\s*$")
"""Matches a generation prompt that has already closed the reasoning (thinking disabled)."""
REASONED = "answers whose reasoning the chat template strips from finished turns, trained with it"
NOT_REASONED = (
    "answers that the chat template starts differently than its generation prompt (without the reasoning that it opens), "
    "trained as the template renders them"
)


@dataclass(frozen=True)
class Turn:
    """A rendered conversation up to the end of one assistant turn."""

    text: str
    """The conversation with this turn as it is trained."""
    begin: int
    """Character index where the answer begins, after the generation prompt."""
    end: int
    """Character index where the answer ends; the template adds the rest only at the end of a conversation."""
    generation_prompt: str | None = None
    """The generation prompt, if it differs from text[:begin]."""


def written_turn(conversation: Conversation, turn: int, place: str, notes: Notes | None) -> Turn:
    """Assistant message `turn` as the model has to generate it: what the template appends to the generation prompt.

    Some templates of reasoning models render a finished turn differently: they strip its reasoning, or open it
    (`<think>`) only in the generation prompt. Then an answer with reasoning is trained after the generation prompt, with
    its reasoning and a single opening tag; one without is trained as the template renders it.

    Args:
        place: where the message is in the row, for errors.
        notes: counter of things to report about how rows were tokenized.

    Raises:
        ValueError: the rendered turn cannot follow the generation prompt.
    """
    before, after = conversation.text(turn, awaits=True), conversation.text(turn + 1, awaits=False)
    content, label = message_text(conversation.messages[turn]), f"{conversation.label}: {place}"
    if after.startswith(before):
        result = Turn(after, len(before), _end(conversation, turn, after))
        rest = None if ASKS_NO_THOUGHT.search(before) else _with_reasoning(content, after[len(before) :])
        if rest is not None:
            result = Turn(before + rest, len(before), len(before + rest))
            _count(notes, REASONED)
    else:
        result = _after_opener(conversation, turn, label, notes)
    for key in REASONING:
        reasoning = conversation.messages[turn].get(key)
        if isinstance(reasoning, str) and reasoning.strip() not in result.text[result.begin :]:
            raise ValueError(
                f"{label}: the chat template does not render {key!r}; put it into 'content' in the model's own format "
                "(such as <think>...</think>), or remove it."
            )
    return result


def _after_opener(conversation: Conversation, turn: int, label: str, notes: Notes | None) -> Turn:
    """A turn whose generation prompt ends with something (such as "<think>\n") that the rendered turn does not have."""
    base, before = conversation.text(turn, awaits=False), conversation.text(turn, awaits=True)
    after = conversation.text(turn + 1, awaits=False)
    common = next(k for k, (left, right) in enumerate(zip(before, after + "\0", strict=False)) if left != right)
    tags = [m for m in re.finditer(r"<[^<>\s]+>|\[[^\[\]\s]+\]", before) if len(base) <= m.start() <= common]
    if not (before.startswith(base) and after.startswith(base) and (tags or common > len(base))):
        raise ValueError(
            f"{label}: the chat template does not render the turns before this one as a prefix of the conversation with "
            "it, so the prompt for generation is undefined; give the row as texts ('prompt' and 'completion'), or use "
            "another chat_template."
        )
    header = tags[-1].start() if tags else common
    opener, rest = before[header:], after[header:]
    match = re.fullmatch(r"(<\w+>|\[\w+\])(\s*)(\S*)\s*", opener)
    tag, closing = (match[1], _closing(match[1])) if match else ("", "")
    if match and not match[3]:
        whole = _with_reasoning(message_text(conversation.messages[turn]), rest, tag)
        _count(notes if whole is not None else None, REASONED)
        if whole is None and (rest.startswith(tag) or closing in rest):
            whole = rest
        if whole is not None:
            thought = whole.removeprefix(tag)
            # the generation prompt is "<think>\n": the reasoning continues after its line break
            thought = thought.removeprefix(match[2]) if thought.startswith(match[2]) else thought.lstrip()
            return Turn(before + thought, len(before), len(before + thought))
    if match and match[3] == closing and closing not in rest:  # thinking is disabled, and the answer has none
        return Turn(before + rest, len(before), len(before + rest))
    _count(notes, NOT_REASONED)
    if not match and tags and tags[-1].end() <= common:  # the tag belongs to the turn header, which both have
        header = common
    return Turn(after, header, _end(conversation, turn, after), before)


def _end(conversation: Conversation, turn: int, text: str) -> int:
    """Where the turn ends if more turns follow: some templates append the end token to the whole conversation, after the
    last turn's own closing token."""
    end = str(conversation.tokenizer.eos_token)
    bare = text.rstrip().removesuffix(end)
    if not (text.rstrip().endswith(end) and bare.rstrip().endswith((">", "]"))):  # no other closing token before it
        return len(text)
    more = [*conversation.messages[: turn + 1], {"role": "user", "content": "-"}]
    try:
        longer = render_chat(conversation.tokenizer, more, conversation.label, False, conversation.options)
    except ValueError:
        return len(text)
    return len(bare) if longer.startswith(bare) and not longer.startswith(text) else len(text)


def _with_reasoning(content: str, rest: str, opened: str | None = None) -> str | None:
    """The turn with the reasoning that the template stripped from it; None: it stripped none.

    Args:
        rest: the turn as rendered by the template.
        opened: the opening tag of the reasoning, which the content may lack; None: the tag that the content begins with.
    """
    begins = re.match(r"\s*(<\w+>|\[\w+\])", content)
    tag = opened or (begins[1] if begins else None)
    if tag is None:
        return None
    closing = _closing(tag)
    thought, closed, visible = content.strip().rpartition(closing)
    if not closed or (closing in rest and thought.removeprefix(tag).strip() in rest):
        return None
    shown = rest.lstrip().removeprefix(closing).lstrip()
    if not shown.startswith(visible.strip()):
        return None
    return content.strip() + (shown[len(visible.strip()) :] if visible.strip() else rest.removeprefix(closing))


def _closing(tag: str) -> str:
    return f"{tag[0]}/{tag[1:]}"


def _count(notes: Notes | None, note: str) -> None:
    if notes is not None:
        notes[note] += 1
