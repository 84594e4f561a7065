"""A prompt with its answer as the model would meet and produce them: token ids, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aligner.data.chat import SWITCHES, Notes, conversation_of, template_options, text_of
from aligner.data.end_tokens import closing_tokens
from aligner.data.spans import Encoded, Spans
from aligner.data.tokenizer import Message, checked_messages, encode_answered, encode_plain
from aligner.data.turns import Turn, written_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("responses", "all")
TOO_LONG = ("error", "drop")
STOP = "stop"
"""Another word for data.too_long=error."""
SPLIT = "conversations as several rows, since the chat template writes earlier turns otherwise"
UNCLEAN = "answers whose generation prompt alone has other tokens than before the answer"


@dataclass(frozen=True)
class Answered:
    """One sequence of prompt and answer, perhaps of several turns."""

    tokens: tuple[int, ...]
    """Token ids, special tokens included."""
    mask: tuple[bool, ...]
    """Per token: trained on (an answer and its end token), or only read. Never the first: nothing predicts it."""
    prompt_len: int
    """Tokens before the first answer that is trained on."""
    fields: dict[str, Any]
    """The whole JSON row, and what is known of this answer ('score', 'label')."""
    index: int = 0
    """Position among the rows (or pairs) of its kind that were kept, from 0."""
    asked: tuple[int, ...] | None = None
    """The prompt that a rollout has, where it is not the first prompt_len tokens; None: it is."""


class Encoder:
    """Turns rows of one kind into `Answered`s: a tokenizer, and what is the same for all rows."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: str = "responses",
        template_kwargs: Mapping[str, Any] | None = None,
        notes: Notes | None = None,
    ) -> None:
        """Args:
        train_on: "responses" (the answer's assistant turns) or "all" (every token but the first).
        template_kwargs: what the chat template is given for every row (data.chat_template_kwargs).
        notes: gets what a reader should know of how the rows were tokenized.
        """
        self.tokenizer, self.others, self.notes = tokenizer, train_on == "all", notes
        self._train_on, self._template_kwargs = train_on, template_kwargs
        self._spans = Spans(tokenizer)
        self._closers = closing_tokens(tokenizer)  # an added token may be special in one of the tokenizer's files only

    def answer(self, row: dict[str, Any], keys: tuple[str, str], label: str) -> Answered:
        """As `answers`, for rows of which each side must be one sequence.

        Raises:
            ValueError: as `answers`; also for several turns that cannot be one sequence.
        """
        found = self.answers(row, keys, label)
        if len(found) > 1:
            raise ValueError(
                f"{label}: the chat template writes earlier turns of {keys[1]!r} otherwise once more follow, so that its "
                f"{len(found)} answers are no one sequence; leave one assistant's turn in it (the others as part of "
                f"{keys[0]!r}), or use another chat_template."
            )
        return found[0]

    def answers(self, row: dict[str, Any], keys: tuple[str, str], label: str) -> list[Answered]:
        """The row's prompt and answer: two texts, or two lists of messages.

        Args:
            keys: where they stand in the row, such as ("prompt", "completion").

        Raises:
            ValueError: wrong types, an empty part, or messages that do not form prompt and answer; `label` is named.
        """
        prompt, answer = (row[key] for key in keys)
        if isinstance(prompt, list) and isinstance(answer, list):
            begin, rest = (checked_messages(row[key], label, key) for key in keys)
            if begin[-1]["role"] == "assistant":
                raise ValueError(
                    f"{label}: {keys[0]!r} ends with an assistant's turn; it must leave it to {keys[1]!r}."
                )
            if rest[0]["role"] != "assistant" or rest[-1]["role"] != "assistant":
                raise ValueError(f"{label}: {keys[1]!r} must begin and end with an assistant's turn.")
            places = [f"{keys[0]}[{i}]" for i in range(len(begin))] + [f"{keys[1]}[{i}]" for i in range(len(rest))]
            return self.turns([*begin, *rest], places, len(begin), label, row)
        for key in keys:
            if not isinstance(row[key], str):
                lists = any(isinstance(part, list) for part in (prompt, answer))
                hint = f" (messages: give {keys[0]!r} and {keys[1]!r} as lists of them)" if lists else ""
                raise ValueError(f"{label}: {key!r} must be text, not {type(row[key]).__name__}{hint}.")
            if not row[key].strip():
                raise ValueError(f"{label}: {key!r} is empty.")
        read, trained = encode_answered(self.tokenizer, prompt, answer)
        if not self._closers.intersection(trained[-1:]):
            trained = [*trained, self._end()]
        return [_answered(read + trained, [self.others] * len(read) + [True] * len(trained), len(read), label, row)]

    def turns(
        self, messages: Sequence[Message], places: Sequence[str], first: int, label: str, row: dict[str, Any]
    ) -> list[Answered]:
        """A conversation. Each assistant's turn from message `first` on is an answer unless it has "train": false or
        "weight": 0: what the template adds when that turn is appended to the conversation before it. What follows the
        last answer is left out.

        The ids are those of the whole conversation by the template. Where it writes earlier turns otherwise once more
        follow (it drops what was thought), each answer stands in a sequence in which it is written as a model produces
        it: as few sequences as that takes, in the order of their answers, and each answer is trained once.

        Args:
            places: where each message stands in the row, for the errors.

        Raises:
            ValueError: no answer or an empty one, a switch that cannot be followed, or turns that the template does not
                write as a model would produce them.
        """
        on = [_switch(m, f"{label}: {place}", self._train_on) for m, place in zip(messages, places, strict=True)]
        spoken = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [turn for turn in spoken if turn >= first and on[turn]]
        if not answers:
            raise ValueError(
                f'{label}: no turn is trained on; leave "train" or "weight" out of one assistant\'s turn (role '
                f'"assistant").'
            )
        options = template_options(row, label, self._template_kwargs)
        conversation = conversation_of(messages, places, options, label, self.tokenizer, False, self.notes)
        for turn in answers:
            if not text_of(conversation.messages[turn]).strip() and "tool_calls" not in conversation.messages[turn]:
                raise ValueError(f"{label}: {places[turn]} is an assistant's turn with an empty 'content'.")
        off = [turn for turn in spoken if not on[turn] and turn < answers[-1]] if self.others else []
        written = {turn: written_turn(conversation, turn, places[turn], self.notes) for turn in (*answers, *off)}
        groups = _groups(sorted(written), written)
        if len(groups) > 1 and self.others:
            raise ValueError(
                f"{label}: the chat template does not write the turns up to {places[groups[0][-1]]} as a beginning of "
                "the whole conversation, so data.train_on=all would train its turns several times; use "
                "data.train_on=responses, give one row for each assistant's turn, or use another chat_template."
            )
        if len(groups) > 1 and self.notes is not None:
            self.notes[SPLIT] += 1
        return [self._sequence(group, {turn: written[turn] for turn in group}, answers, label, row) for group in groups]

    def _sequence(
        self, group: list[int], written: dict[int, Turn], answers: list[int], label: str, row: dict[str, Any]
    ) -> Answered:
        """The conversation up to the last turn of `group`, in which all of them are written as they are trained."""
        last = written[group[-1]]
        encoded = self._spans.encode(last.text)
        tokens = encoded.tokens
        mask = [self.others] * len(tokens)
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
                if not clean or written[turn].asked:
                    before = written[turn].asked or last.text[: written[turn].begin]
                    asked = tuple(encode_plain(self.tokenizer, before))
        if not closed:  # the template ends the last turn with no special token: else nothing teaches to stop
            tokens, mask = [*tokens, self._end()], [*mask, True]
        return _answered(tokens, mask, prompt_len, label, row, asked)

    def _closing(self, encoded: Encoded, begin: int, end: int) -> tuple[int, bool]:
        """(where what the model produces of a turn ends, whether a special token closes it): the template may add
        blanks after the closing token."""
        stop = end
        while stop > begin and not (
            self._spans.is_special(encoded, stop - 1) or encoded.tokens[stop - 1] in self._closers
        ):
            if str(self.tokenizer.decode([encoded.tokens[stop - 1]])).strip():
                return end, False
            stop -= 1
        return (stop, True) if stop > begin else (end, False)

    def _end(self) -> int:
        assert isinstance(self.tokenizer.eos_token_id, int), "load_tokenizer refuses a tokenizer without one"
        return self.tokenizer.eos_token_id


def fits(answered: Answered, what: str, label: str, max_tokens: int, too_long: str) -> bool:
    """Whether it has at most `max_tokens` tokens.

    Raises:
        ValueError: it has more, and `too_long` (data.too_long) is not "drop".
    """
    length = len(answered.tokens)
    if length > max_tokens and too_long != "drop":
        raise ValueError(
            f"{label}: {what} has {length} tokens, more than data.max_tokens={max_tokens}; "
            f"raise it to {length} or more, or set data.too_long=drop."
        )
    return length <= max_tokens


def check_choices(too_long: str, train_on: str = "responses") -> None:
    """Raises ValueError for a value of data.too_long or data.train_on that is unknown."""
    for name, value, known in (("too_long", too_long, TOO_LONG), ("train_on", train_on, TRAIN_ON)):
        if value not in known and (name, value) != ("too_long", STOP):
            raise ValueError(f"data.{name}={value} is unknown; use {' or '.join(known)}.")


def _answered(
    tokens: list[int],
    mask: list[bool],
    prompt_len: int,
    label: str,
    fields: dict[str, Any],
    asked: tuple[int, ...] | None = None,
) -> Answered:
    if prompt_len == 0:
        raise ValueError(f"{label}: the prompt has no tokens.")
    return Answered(tuple(tokens), (False, *mask[1:]), prompt_len, fields, asked=asked)


def _groups(turns: list[int], written: dict[int, Turn]) -> list[list[int]]:
    """Turns whose conversations are beginnings of the last one's: together they can be one sequence."""
    groups: list[list[int]] = []
    for turn in reversed(turns):
        if groups and written[groups[0][-1]].text.startswith(written[turn].text[: written[turn].end]):
            groups[0].insert(0, turn)
        else:
            groups.insert(0, [turn])
    return groups


def _switch(message: Message, place: str, train_on: str) -> bool:
    """Whether the message may be trained on.

    Raises:
        ValueError: not one of true, false, 1, 0, two switches that differ, or one that `train_on` cannot follow.
    """
    given = {key: message[key] for key in SWITCHES if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{place}: {key!r} must be true or false (or 1 or 0), not {value!r}.")
    if len(set(map(bool, given.values()))) == 2:
        raise ValueError(f"{place}: 'train' and 'weight' say different things; give one of them.")
    on = all(given.values())
    if given and message["role"] != "assistant" and on != (train_on == "all"):
        raise ValueError(
            f"{place} is no assistant's turn and has {given}, but with data.train_on={train_on} such turns are "
            f"{'never' if on else 'always'} trained on; use data.train_on={'all' if on else 'responses'}, or leave it "
            "out."
        )
    return on
