"""Where an assistant's turn stands in its conversation: after what a rollout would be asked, up to where it ends."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aligner.data.chat import REASONING, Conversation, Notes, text_of
from aligner.data.tokenizer import render_chat

ASKS_NO_THOUGHT = re.compile(r"(</\w+>|\[/\w+\])\s*$")
"""A generation prompt that has closed the reasoning already."""
REASONED = "answers whose reasoning the chat template cuts from finished turns, trained with it"
NOT_REASONED = (
    "answers that the chat template begins otherwise than its generation prompt (without the reasoning that it opens), "
    "trained as the template writes them"
)


@dataclass(frozen=True)
class Turn:
    """A conversation up to the end of one assistant's turn."""

    text: str
    """The conversation with this turn as it is trained."""
    begin: int
    """Character of `text` where the answer begins: before it stands what a rollout is asked."""
    end: int
    """Character where the answer ends: what stands behind, the template writes only at the end of a conversation."""
    asked: str | None = None
    """What a rollout is asked, where it is not what stands before `begin`."""


def written_turn(conversation: Conversation, turn: int, place: str, notes: Notes | None) -> Turn:
    """Message `turn`, an assistant's, as the model would have to produce it.

    That is what the template adds to the generation prompt of the turns before. Some templates of reasoning models write
    a finished turn otherwise: they cut what was thought, or open it (`<think>`) in the generation prompt alone. Then an
    answer that has its reasoning is trained after the generation prompt, with the reasoning and without opening it
    twice; one that has none is trained as the template writes it.

    Args:
        place: where the message stands in the row, for the errors.

    Raises:
        ValueError: the template does not write the turn so that it can follow the generation prompt.
    """
    before, after = conversation.text(turn, awaits=True), conversation.text(turn + 1, awaits=False)
    content, label = text_of(conversation.messages[turn]), f"{conversation.label}: {place}"
    if after.startswith(before):
        found = Turn(after, len(before), _end(conversation, turn, after))
        rest = None if ASKS_NO_THOUGHT.search(before) else _with_reasoning(content, after[len(before) :])
        if rest is not None:
            found = Turn(before + rest, len(before), len(before + rest))
            _count(notes, REASONED)
    else:
        found = _after_opener(conversation, turn, label, notes)
    for key in REASONING:
        reasoning = conversation.messages[turn].get(key)
        if isinstance(reasoning, str) and reasoning.strip() not in found.text[found.begin :]:
            raise ValueError(
                f"{label}: the chat template does not write {key!r}; write it into 'content', in the form in which the "
                "model thinks (such as <think>...</think>), or leave it out."
            )
    return found


def _after_opener(conversation: Conversation, turn: int, label: str, notes: Notes | None) -> Turn:
    """The generation prompt ends with something, such as "<think>\n", that the template does not write into the turn."""
    base, before = conversation.text(turn, awaits=False), conversation.text(turn, awaits=True)
    after = conversation.text(turn + 1, awaits=False)
    common = next(k for k, (one, other) in enumerate(zip(before, after + "\0", strict=False)) if one != other)
    tags = [m for m in re.finditer(r"<[^<>\s]+>|\[[^\[\]\s]+\]", before) if len(base) <= m.start() <= common]
    if not (before.startswith(base) and after.startswith(base) and (tags or common > len(base))):
        raise ValueError(
            f"{label}: the chat template does not write the turns up to here as a beginning of the conversation with "
            "this one, so that it is not clear what the model would be asked; give the row as texts ('prompt' and "
            "'completion'), or another chat_template."
        )
    header = tags[-1].start() if tags else common
    opener, rest = before[header:], after[header:]
    match = re.fullmatch(r"(<\w+>|\[\w+\])(\s*)(\S*)\s*", opener)
    tag, closing = (match[1], _closing(match[1])) if match else ("", "")
    if match and not match[3]:
        whole = _with_reasoning(text_of(conversation.messages[turn]), rest, tag)
        _count(notes if whole is not None else None, REASONED)
        if whole is None and (rest.startswith(tag) or closing in rest):
            whole = rest
        if whole is not None:
            thought = whole.removeprefix(tag)
            # "<think>\n" is asked: what follows the tag goes on after its line break
            thought = thought.removeprefix(match[2]) if thought.startswith(match[2]) else thought.lstrip()
            return Turn(before + thought, len(before), len(before + thought))
    if match and match[3] == closing and closing not in rest:  # asked not to think, and has not
        return Turn(before + rest, len(before), len(before + rest))
    _count(notes, NOT_REASONED)
    if not match and tags and tags[-1].end() <= common:  # the tag is the header's, and in both
        header = common
    return Turn(after, header, _end(conversation, turn, after), before)


def _end(conversation: Conversation, turn: int, text: str) -> int:
    """Where the turn ends if more follow: some templates close a whole conversation with the end token, after what
    closes its last turn."""
    end = str(conversation.tokenizer.eos_token)
    bare = text.rstrip().removesuffix(end)
    if not (text.rstrip().endswith(end) and bare.rstrip().endswith((">", "]"))):  # nothing that could close it before
        return len(text)
    more = [*conversation.messages[: turn + 1], {"role": "user", "content": "-"}]
    try:
        longer = render_chat(conversation.tokenizer, more, conversation.label, False, conversation.options)
    except ValueError:
        return len(text)
    return len(bare) if longer.startswith(bare) and not longer.startswith(text) else len(text)


def _with_reasoning(content: str, rest: str, opened: str | None = None) -> str | None:
    """The turn with the reasoning that the template has cut from it; None: it has cut none.

    Args:
        rest: what the template writes of the turn.
        opened: the tag before reasoning, which the content need not have; None: the one that the content begins with.
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
