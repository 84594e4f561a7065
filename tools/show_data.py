"""Show rows of a job's data as the model sees them: which tokens are read, trained, ends of turns, or beyond a limit.

python tools/show_data.py --config-name quickstart_sft model.path=DIR data.path=rows.jsonl
python tools/show_data.py --rows 20 --html rows.html data=preferences model.path=DIR data.path=pairs.jsonl

The overrides are those of a training job; nothing but model.path's tokenizer and the rows is read. In a terminal the parts are
coloured; elsewhere trained text stands in [+...+], the end of a trained turn in [=...=], what is beyond a limit in [-...-].
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aligner.bounds import check_settings
from aligner.config.schema import CONF, Config, compose_config, to_config
from aligner.data.chat import Notes, check_template_kwargs
from aligner.data.config import DataConfig
from aligner.data.named_sources import ALONE, named_sources
from aligner.data.preferences import Pair
from aligner.data.prompts import Prompt
from aligner.data.sets import open_heldout, open_training, row_tokenizer
from aligner.data.sources.source import RowSource
from aligner.data.token_view import Part, Piece, pieces_of, spans_of
from aligner.data.tokenizer import load_tokenizer, shortened, use_chat_template
from aligner.paths import path_option
from aligner.run.prepare import with_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANY_LENGTH = 1 << 62
SHOWN_FIELDS = ("prompt", "messages", "tools", "chat_template_kwargs")
"""Fields of a prompt that are in its text."""
MARKS = {Part.READ: ("", ""), Part.TRAINED: ("[+", "+]"), Part.END: ("[=", "=]"), Part.CUT: ("[-", "-]")}
COLORS = {
    Part.READ: ("\x1b[2m", "\x1b[0m"),
    Part.TRAINED: ("\x1b[32m", "\x1b[0m"),
    Part.END: ("\x1b[1;30;42m", "\x1b[0m"),
    Part.CUT: ("\x1b[9;31m", "\x1b[0m"),
}
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222 }
h2 { font-size: 1rem; margin: 2rem 0 .2rem } p { margin: .2rem 0 } .error { color: #b00020 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem; border: 1px solid #ddd; border-radius: 6px; margin: .3rem 0 1rem }
pre span { box-shadow: inset 1px 0 #0002 } .read { color: #777 } .trained { background: #d5f0d5; color: #063 }
.end { background: #2a8a4a; color: #fff } .cut { background: #fadada; color: #a00; text-decoration: line-through }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } pre { border-color: #444 } .read { color: #999 }
  .trained { background: #143d1f; color: #bfe8c8 } .cut { background: #4a1a1a; color: #f4a9a9 } .error { color: #ff8a80 } }
"""


@dataclass(frozen=True)
class Shown:
    """One sequence of tokens to be shown."""

    title: str
    """What it is: "prompt", "chosen", "part 1 of 2"; "" if there is nothing to say."""
    pieces: list[Piece]
    remarks: list[str]
    too_long: bool = False

    @property
    def counts(self) -> Counter[Part]:
        """Tokens of each part."""
        counts: Counter[Part] = Counter()
        for piece in self.pieces:
            counts[piece.part] += len(piece.ids)
        return counts

    def line(self) -> str:
        """Its lengths, in one line."""
        counts = self.counts
        trained, tokens = counts[Part.TRAINED] + counts[Part.END], counts.total()
        lengths = f"{tokens:,} tokens"
        if self.title != "prompt":
            lengths += f": {trained:,} trained ({trained / tokens:.0%}), {counts[Part.END]} of them ends"
        if counts[Part.CUT]:
            lengths += f"; {counts[Part.CUT]:,} beyond the limit"
        return f"{self.title}: {lengths}" if self.title else lengths


@dataclass(frozen=True)
class Row:
    """One row of the data."""

    label: str
    sequences: list[Shown] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    error: str | None = None
    """Why it cannot be used."""
    stops: bool = False
    """Whether it would stop the job, by data.on_error and data.too_long."""


class Viewer:
    """Rows of one source as they would be trained."""

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, heldout: bool) -> None:
        self.data, self.tokenizer, self.notes = data, tokenizer, Counter[str]()
        unlimited = replace(data, max_prompt_tokens=ANY_LENGTH, max_tokens=ANY_LENGTH)
        self._tokenize = row_tokenizer(unlimited, tokenizer, self.notes, heldout)

    def row(self, source: RowSource, number: int) -> Row:
        """Row `number` of the source."""
        before: Notes = Counter(self.notes)
        label = f"{source.name}, row {number + 1}"
        try:
            label, fields = source.row(number)
            examples = self._tokenize(label, fields, number)
        except ValueError as error:
            return Row(label, error=str(error), stops=self.data.on_error != "skip")
        remarks = [f"1 of the {note}" for note in self.notes - before]
        if not examples:
            remarks.append("left out: its answers have equal scores")
        sequences = list(self._sequences(examples))
        stops = self.data.too_long != "drop" and any(sequence.too_long for sequence in sequences)
        return Row(label, sequences, remarks, stops=stops)

    def _sequences(self, examples: Sequence[Any]) -> Iterator[Shown]:
        for number, example in enumerate(examples, start=1):
            part = f"part {number} of {len(examples)}" if len(examples) > 1 else ""
            if isinstance(example, Prompt):
                yield self._prompt(example)
            elif isinstance(example, Pair):
                for side in ("chosen", "rejected"):
                    yield self._answer(getattr(example, side), " ".join(filter(None, (part, side))))
            else:
                label = example.fields.get("label") if self.data.kind == "feedback" else None
                good = "" if label is None else "good answer" if label else "bad answer"
                yield self._answer(example, " ".join(filter(None, (good, "" if good else part))))

    def _prompt(self, prompt: Prompt) -> Shown:
        limit, count = self.data.max_prompt_tokens, len(prompt.tokens)
        pieces = pieces_of(self.tokenizer, prompt.tokens, [False] * count, limit)
        given = ", ".join(
            f"{name}={shortened(value)}" for name, value in prompt.fields.items() if name not in SHOWN_FIELDS
        )
        remarks = [f"a reward is given {given}"] if given else []
        return Shown(
            "prompt", pieces, [*remarks, *self._too_long(count, limit, "data.max_prompt_tokens")], count > limit
        )

    def _answer(self, answer: Any, title: str) -> Shown:
        limit, count = self.data.max_tokens, len(answer.tokens)
        remarks = self._too_long(count, limit, "data.max_tokens")
        beyond = count > limit
        if answer.asked is not None:
            asked = self.tokenizer.decode(list(answer.asked[-12:]))
            remarks.append(f"a rollout's prompt is not the beginning of this: it ends with {asked!r}")
        return Shown(title, pieces_of(self.tokenizer, answer.tokens, answer.mask, limit), remarks, beyond)

    def _too_long(self, count: int, limit: int, setting: str) -> list[str]:
        if count <= limit:
            return []
        happens = "left out" if self.data.too_long == "drop" else "an error"
        return [f"{count:,} tokens are more than {setting}={limit}: {happens} (data.too_long={self.data.too_long})"]


def marked(pieces: Sequence[Piece], marks: Mapping[Part, tuple[str, str]]) -> str:
    """The text with marks around the parts that are not read only; line breaks are shown, control characters escaped."""
    text = ""
    for part, run in spans_of(pieces):
        begin, end = marks[part]
        text += begin + visible("".join(piece.text for piece in run)) + end
    return text


def visible(text: str) -> str:
    """Line breaks and tabs beside a sign for them; other control characters (which a terminal would follow) escaped."""
    shown = (
        {"\n": "↵\n", "\t": "⇥\t"}.get(letter) or (letter if letter.isprintable() else repr(letter)[1:-1])
        for letter in text
    )
    return "".join(shown)


def as_text(row: Row, color: bool) -> str:
    """A row for a terminal or a file."""
    marks = COLORS if color else MARKS
    lines = [f"\x1b[1m{row.label}\x1b[0m" if color else f"--- {row.label}"]
    if row.error is not None:
        lines.append(f"\x1b[31merror: {visible(row.error)}\x1b[0m" if color else f"error: {visible(row.error)}")
    lines += [f"({remark})" for remark in row.remarks]
    for sequence in row.sequences:
        lines.append(f"({sequence.line()})")
        lines += [f"({remark})" for remark in sequence.remarks]
        lines.append(marked(sequence.pieces, marks))
    return "\n".join(lines) + "\n"


def as_html(titled: Sequence[tuple[str, list[Row]]], overrides: Sequence[str]) -> str:
    """A page of its own; the ids of a token show when it is pointed at."""
    legend = " ".join(f'<span class="{part.name.lower()}">{part.value}</span>' for part in Part)
    body = [f"<h1>Rows as they are trained</h1><p>{html.escape(' '.join(overrides))}</p><p>{legend}</p>"]
    for title, rows in titled:
        body.append(f"<h1>{html.escape(title)}</h1>")
        body += [_section(row) for row in rows]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Rows</title><style>{STYLE}</style>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _section(row: Row) -> str:
    texts = [f"<h2>{html.escape(row.label)}</h2>"]
    if row.error is not None:
        texts.append(f'<p class="error">{html.escape(row.error)}</p>')
    texts += [f"<p>{html.escape(remark)}</p>" for remark in row.remarks]
    for sequence in row.sequences:
        texts += [f"<p>{html.escape(line)}</p>" for line in (sequence.line(), *sequence.remarks)]
        spans = (
            f'<span class="{piece.part.name.lower()}" title="{" ".join(map(str, piece.ids))}">'
            f"{html.escape(visible(piece.text))}</span>"
            for piece in sequence.pieces
        )
        texts.append(f"<pre>{''.join(spans)}</pre>")
    return "".join(texts)


def summary(rows: Sequence[Row], notes: Notes) -> str:
    """What was shown, in one line."""
    sequences = [sequence for row in rows for sequence in row.sequences]
    counts = sum((sequence.counts for sequence in sequences), Counter[Part]())
    trained = counts[Part.TRAINED] + counts[Part.END]
    text = f"{len(rows)} rows, {len(sequences)} sequences, {counts.total():,} tokens, {trained:,} trained"
    text += f" ({trained / counts.total():.0%})" if counts.total() else ""
    errors = sum(row.error is not None for row in rows)
    text += f", {errors} errors" if errors else ""
    return "; ".join([text, *(f"{note}: {count}" for note, count in notes.items())])


def read_rows(config: Config, heldout: bool, skip: int, count: int) -> list[tuple[str, list[Row], Notes]]:
    """(source, its rows, remarks on how they were tokenized) of each source.

    Raises:
        ValueError: a setting, a tokenizer, a template or a file that cannot be used.
    """
    check_settings(config.data, "data")
    tokenizer = load_tokenizer(config.model.path)
    if config.data.chat_template is not None:
        use_chat_template(tokenizer, config.data.chat_template)
    config = with_task(config)
    opened: list[tuple[str, DataConfig, RowSource]] = []
    if heldout:
        held = open_heldout(config.data, tokenizer)
        if held is None:
            raise ValueError("--heldout needs held-out rows; set data.eval_path.")
        opened.append(("held out", config.data, held))
    else:
        for source in named_sources(config.data):
            name = "training" if source.name == ALONE else f"data.sources.{source.name}"
            opened.append((name, source.data, open_training(source, tokenizer)))
    shown = []
    for name, data, rows in opened:
        section = name if name.startswith("data.sources.") else "data"
        check_template_kwargs(tokenizer, data.chat_template_kwargs, f"{section}.chat_template_kwargs.")
        viewer = Viewer(data, tokenizer, heldout)
        numbers = range(skip, min(skip + count, len(rows)))
        shown.append((f"{name}: {rows.name}, {len(rows):,} rows", [viewer.row(rows, n) for n in numbers], viewer.notes))
    return shown


def options() -> argparse.ArgumentParser:
    """The command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=3, help="rows to show of each source (default %(default)s)")
    add("--skip", type=int, default=0, help="rows to skip at the beginning (default %(default)s)")
    add("--heldout", action="store_true", help="show the rows of data.eval_path")
    add("--html", type=path_option, metavar="FILE", help="also write a page to this file")
    add("--color", choices=["auto", "always", "never"], default="auto", help="default: in a terminal, without NO_COLOR")
    add("--config-name", default="train", help="as of a training job (default %(default)s)")
    add("--config-dir", type=path_option, default=CONF, help="as of a training job")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="a training job's settings")
    return parser


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status: 1 if a row that was shown would stop the job."""
    args = options().parse_intermixed_args(arguments)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    try:
        if args.rows < 1 or args.skip < 0:
            raise ValueError(f"--rows {args.rows} --skip {args.skip}: give --rows of at least 1, --skip of at least 0.")
        config = to_config(compose_config(args.overrides, args.config_name, args.config_dir.resolve()))
        shown = read_rows(config, args.heldout, args.skip, args.rows)
        if args.html is not None:
            args.html.write_text(as_html([(title, rows) for title, rows, _ in shown], args.overrides), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    begin_end = COLORS if color else MARKS
    print("  ".join(f"{begin}{part.value}{end}" for part, (begin, end) in begin_end.items()) + "\n")
    for title, rows, notes in shown:
        print(f"=== {title}\n")
        for row in rows:
            print(as_text(row, color))
        print(f"{summary(rows, notes)}\n")
    return int(any(row.stops for _, rows, _ in shown for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
