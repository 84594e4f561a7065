"""Tokenize a prompt with its answer (or a conversation) exactly as in generation, and build the loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aligner.data.chat import PLAIN, SWITCHES, ChatOptions, Notes, conversation_of, message_text, template_options
from aligner.data.end_tokens import closing_tokens
from aligner.data.row_tokenizer import RowTooLongError
from aligner.data.spans import Encoded, Spans
from aligner.data.tokenized_answer import TokenizedAnswer
from aligner.data.tokenizer import Message, checked_messages, encode_answered, encode_plain
from aligner.data.turns import Turn, written_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("responses", "all")
TOO_LONG = ("error", "drop")
STOP = "stop"
"""Synonym of data.too_long=error."""
SPLIT = "conversations split into several rows, because the chat template renders earlier turns differently"
UNCLEAN = "answers whose generation prompt tokenizes differently alone than before the answer"


class Encoder:
    """Tokenizes rows of one data set."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: str = "responses",
        chat: ChatOptions = PLAIN,
        notes: Notes | None = None,
    ) -> None:
        """Args:
        train_on: "responses" (the answer's assistant turns) or "all" (every token but the first).
        chat: how conversations are rendered.
        notes: counter of things to report about how rows were tokenized.
        """
        self.tokenizer, self.train_all, self.notes = tokenizer, train_on == "all", notes
        self._train_on, self._chat = train_on, chat
        self._spans = Spans(tokenizer)
        self._closers = closing_tokens(
            tokenizer
        )  # an added token may be marked special in only one of the tokenizer's files

    def answer(self, row: dict[str, Any], keys: tuple[str, str], label: str) -> TokenizedAnswer:
        """As `answers`, for rows that must give exactly one sequence.

        Raises:
            ValueError: as `answers`; or the turns cannot be rendered as one sequence.
        """
        answers = self.answers(row, keys, label)
        if len(answers) > 1:
            raise ValueError(
                f"{label}: the chat template renders earlier turns of {keys[1]!r} differently once more turns follow, so its "
                f"{len(answers)} answers are not one sequence; leave one assistant turn in it (and move the others to "
                f"{keys[0]!r}), or use another chat_template."
            )
        return answers[0]

    def answers(self, row: dict[str, Any], keys: tuple[str, str], label: str) -> list[TokenizedAnswer]:
        """Tokenize a row's prompt and answer, given as two texts or two lists of messages.

        Args:
            keys: their fields in the row, such as ("prompt", "completion").
            label: the row's file and line, for errors.

        Raises:
            ValueError: wrong types, an empty part, or messages that do not form prompt and answer.
        """
        prompt, answer = (row[key] for key in keys)
        if isinstance(prompt, list) and isinstance(answer, list):
            prompt_messages, answer_messages = (checked_messages(row[key], label, key) for key in keys)
            if prompt_messages[-1]["role"] == "assistant":
                raise ValueError(f"{label}: {keys[0]!r} ends with an assistant turn; move it to {keys[1]!r}.")
            if answer_messages[0]["role"] != "assistant" or answer_messages[-1]["role"] != "assistant":
                raise ValueError(f"{label}: {keys[1]!r} must begin and end with an assistant turn.")
            lengths = (len(prompt_messages), len(answer_messages))
            places = [f"{key}[{i}]" for key, length in zip(keys, lengths, strict=True) for i in range(length)]
            return self.turns([*prompt_messages, *answer_messages], places, len(prompt_messages), label, row)
        for key in keys:
            if not isinstance(row[key], str):
                lists = any(isinstance(part, list) for part in (prompt, answer))
                hint = f" (messages: give {keys[0]!r} and {keys[1]!r} as lists of them)" if lists else ""
                raise ValueError(f"{label}: {key!r} must be text, not {type(row[key]).__name__}{hint}.")
            if not row[key].strip():
                raise ValueError(f"{label}: {key!r} is empty.")
        self._chat.check_text(keys[0], label)
        prompt_tokens, answer_tokens = encode_answered(self.tokenizer, prompt, answer)
        if not self._closers.intersection(answer_tokens[-1:]):
            answer_tokens = [*answer_tokens, self._end()]
        mask = [self.train_all] * len(prompt_tokens) + [True] * len(answer_tokens)
        return [_tokenized_answer(prompt_tokens + answer_tokens, mask, len(prompt_tokens), label, row)]

    def turns(
        self, messages: Sequence[Message], places: Sequence[str], first: int, label: str, row: dict[str, Any]
    ) -> list[TokenizedAnswer]:
        """Tokenize a conversation. Each assistant turn from message `first` on is an answer, unless it has "train": false or
        "weight": 0; its tokens are what the template appends to the conversation before it. Messages after the last
        answer are dropped.

        Token ids are those of the whole conversation as rendered by the template. If the template renders earlier turns
        differently once more turns follow (it drops their reasoning, say), the conversation is split into as few
        sequences as needed for each answer to appear as a model generates it; each answer is trained exactly once.

        Args:
            places: where each message is in the row, for errors.
            label: the row's file and line, for errors.

        Raises:
            ValueError: no answer or an empty one, a "train" or "weight" that cannot be followed, or turns that the
                template does not render as a continuation of the generation prompt.
        """
        messages, places, moved = self._chat.with_system_prompt(messages, places, label)
        first = max(0, first + moved)
        trainable = [_switch(m, f"{label}: {place}", self._train_on) for m, place in zip(messages, places, strict=True)]
        assistant_turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [turn for turn in assistant_turns if turn >= first and trainable[turn]]
        if not answers:
            raise ValueError(
                f'{label}: no turn is trained on; remove "train" or "weight" from at least one assistant turn (role '
                f'"assistant").'
            )
        options = template_options(row, label, self._chat.template_kwargs)
        conversation = conversation_of(messages, places, options, label, self.tokenizer, False, self.notes)
        for turn in answers:
            if (
                not message_text(conversation.messages[turn]).strip()
                and "tool_calls" not in conversation.messages[turn]
            ):
                raise ValueError(f"{label}: {places[turn]} is an assistant turn with an empty 'content'.")
        untrained = (
            [turn for turn in assistant_turns if not trainable[turn] and turn < answers[-1]] if self.train_all else []
        )
        written = {turn: written_turn(conversation, turn, places[turn], self.notes) for turn in (*answers, *untrained)}
        groups = _groups(sorted(written), written)
        if len(groups) > 1 and self.train_all:
            raise ValueError(
                f"{label}: the chat template does not render the turns up to {places[groups[0][-1]]} as a prefix of "
                "the whole conversation, so data.train_on=all would train some turns several times; use "
                "data.train_on=responses, give one row for each assistant turn, or use another chat_template."
            )
        if len(groups) > 1 and self.notes is not None:
            self.notes[SPLIT] += 1
        return [self._sequence(group, {turn: written[turn] for turn in group}, answers, label, row) for group in groups]

    def _sequence(
        self, group: list[int], written: dict[int, Turn], answers: list[int], label: str, row: dict[str, Any]
    ) -> TokenizedAnswer:
        """The conversation up to the last turn of `group`, which contains all of them as they are trained."""
        last = written[group[-1]]
        encoded = self._spans.encode(last.text)
        tokens = encoded.tokens
        mask = [self.train_all] * len(tokens)
        prompt_len, asked, closed = 0, None, False
        for turn in group:
            begin, clean = self._spans.border(encoded, written[turn].begin)
            end, _ = self._spans.border(encoded, written[turn].end)
            stop, closed = self._closing(encoded, begin, end)
            mask[begin:stop] = [turn in answers] * (stop - begin)
            if not clean and self.notes is not None and turn in answers:
                self.notes[UNCLEAN] += 1
            if turn == next(turn for turn in group if turn in answers):
                prompt_len = begin
                if not clean or written[turn].generation_prompt:
                    before = written[turn].generation_prompt or last.text[: written[turn].begin]
                    asked = tuple(encode_plain(self.tokenizer, before))
        if (
            not closed
        ):  # the template closes the last turn without a special token; without one the model never learns to stop
            tokens, mask = [*tokens, self._end()], [*mask, True]
        return _tokenized_answer(tokens, mask, prompt_len, label, row, asked)

    def _closing(self, encoded: Encoded, begin: int, end: int) -> tuple[int, bool]:
        """(end of the tokens that the model generates for a turn, whether a special token closes it). The template may add
        whitespace after the closing token."""
        stop = end
        while stop > begin and not (
            self._spans.is_special(encoded, stop - 1) or encoded.tokens[stop - 1] in self._closers
        ):
            if str(self.tokenizer.decode([encoded.tokens[stop - 1]])).strip():
                return end, False
            stop -= 1
        return (stop, True) if stop > begin else (end, False)

    def _end(self) -> int:
        assert isinstance(self.tokenizer.eos_token_id, int), (
            "load_tokenizer raises for a tokenizer without an end token"
        )
        return self.tokenizer.eos_token_id


def fits(sequence: TokenizedAnswer, row_kind: str, label: str, max_tokens: int, too_long: str) -> bool:
    """Whether the sequence has at most `max_tokens` tokens.

    Args:
        row_kind: what the row is called in the error.

    Raises:
        RowTooLongError: it has more, and `too_long` (data.too_long) is not "drop".
    """
    length = len(sequence.tokens)
    if length > max_tokens and too_long != "drop":
        raise RowTooLongError(
            f"{label}: {row_kind} has {length} tokens, more than data.max_tokens={max_tokens}; "
            f"raise it to {length} or more, or set data.too_long=drop."
        )
    return length <= max_tokens


def check_choices(too_long: str, train_on: str = "responses") -> None:
    """Raises ValueError for an unknown value of data.too_long or data.train_on."""
    for name, value, choices in (("too_long", too_long, TOO_LONG), ("train_on", train_on, TRAIN_ON)):
        if value not in choices and (name, value) != ("too_long", STOP):
            raise ValueError(f"data.{name}={value} is unknown; use {' or '.join(choices)}.")


def _tokenized_answer(
    tokens: list[int],
    mask: list[bool],
    prompt_len: int,
    label: str,
    fields: dict[str, Any],
    asked: tuple[int, ...] | None = None,
) -> TokenizedAnswer:
    if prompt_len == 0:
        raise ValueError(f"{label}: the prompt has no tokens.")
    return TokenizedAnswer(tuple(tokens), (False, *mask[1:]), prompt_len, fields, asked=asked)


def _groups(turns: list[int], written: dict[int, Turn]) -> list[list[int]]:
    """Group turns whose rendered conversations are prefixes of that of the last turn: each group can be one sequence."""
    groups: list[list[int]] = []
    for turn in reversed(turns):
        if groups and written[groups[0][-1]].text.startswith(written[turn].text[: written[turn].end]):
            groups[0].insert(0, turn)
        else:
            groups.insert(0, [turn])
    return groups


def _switch(message: Message, place: str, train_on: str) -> bool:
    """Whether the message's "train" and "weight" allow training on it.

    Raises:
        ValueError: not one of true, false, 1, 0; the two differ; or `train_on` cannot follow them.
    """
    switches = {key: message[key] for key in SWITCHES if message.get(key) is not None}
    for key, value in switches.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{place}: {key!r} must be true or false (or 1 or 0), not {value!r}.")
    if len(set(map(bool, switches.values()))) == 2:
        raise ValueError(f"{place}: 'train' and 'weight' contradict each other; give only one of them.")
    enabled = all(switches.values())
    if switches and message["role"] != "assistant" and enabled != (train_on == "all"):
        raise ValueError(
            f"{place} is not an assistant turn and has {switches}, but with data.train_on={train_on} such turns are "
            f"{'never' if enabled else 'always'} trained on; use data.train_on={'all' if enabled else 'responses'}, or remove it."
        )
    return enabled
