"""`RowTokenizer`: from one row to what is trained on, with a count of what is left out; and the rows of a whole set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from aligner.data.left_out import WRONG, LeftOut
from aligner.data.sources.source import LabelledRow, RowSource

Example = TypeVar("Example")
ON_ERROR = ("stop", "skip")
SHOWN_ERRORS = 3
"""Errors of skipped rows that are kept to be shown."""


class RowTooLongError(ValueError):
    """A row that is longer than a setting allows: data.too_long's business, not data.on_error's."""


class RowTokenizer(Protocol[Example]):
    """Tokenizes the rows of one kind (data.kind)."""

    left_out: LeftOut
    """What was left out so far."""

    def __call__(self, label: str, row: dict[str, Any], index: int) -> list[Example]:
        """The examples of one row: usually one; none if it is too long; several of a conversation that is split, or of
        scored answers.

        Args:
            label: the row's file and line, for errors.
            index: what the examples have as their `index`.

        Raises:
            RowTooLongError: it is too long, and data.too_long is not "drop".
            ValueError: it cannot be used; the text begins with the label.
        """
        ...

    def none_left(self) -> str:
        """The error of a set that gives no example at all."""
        ...


class RowErrors:
    """What data.on_error makes of rows that cannot be read or used: stop, or skip and count them."""

    def __init__(self, on_error: str = "stop") -> None:
        self._skips = on_error == "skip"
        self.skipped = 0
        """Rows skipped so far."""
        self.first: list[str] = []
        """The errors of the first of them."""

    def examples(self, source: RowSource, row: int, tokenize: RowTokenizer[Example], index: int) -> list[Example]:
        """The examples of row `row`; none if it is wrong and to be skipped.

        Raises:
            ValueError: it is wrong, and data.on_error=stop.
        """
        try:
            return tokenize(*source.row(row), index)
        except RowTooLongError:
            raise
        except ValueError as error:
            if not self._skips:
                raise
            self.skipped += 1
            tokenize.left_out[WRONG] += 1
            if len(self.first) < SHOWN_ERRORS:
                self.first.append(str(error))
            return []


def tokenize_source(
    source: RowSource, tokenize: RowTokenizer[Example], errors: RowErrors | None = None, first: int = 0
) -> list[Example]:
    """The examples of all rows; their `index` counts those that were kept, from `first` on.

    Raises:
        ValueError: a row that cannot be used (unless `errors` skips it), or no example is left.
    """
    errors = errors or RowErrors()
    examples: list[Example] = []
    for row in range(len(source)):
        examples += errors.examples(source, row, tokenize, first + len(examples))
    if not examples:
        raise ValueError(f"{source.name}: {tokenize.none_left()}{first_errors(errors)}")
    return examples


def tokenize_rows(rows: Iterable[LabelledRow], tokenize: RowTokenizer[Example]) -> list[Example]:
    """As `tokenize_source`, of rows that are at hand."""
    examples: list[Example] = []
    for label, row in rows:
        examples += tokenize(label, row, len(examples))
    if not examples and tokenize.left_out.total():
        raise ValueError(tokenize.none_left())
    return examples


def numbered(examples: list[Any], index: int) -> list[Any]:
    """The examples with indices from `index` on, in place of their own."""
    return [replace(example, index=index + place) for place, example in enumerate(examples)]


def first_errors(errors: RowErrors) -> str:
    """The errors of the first rows that were skipped, as further sentences."""
    return "".join(f" Skipped: {error}" for error in errors.first)
