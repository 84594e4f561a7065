"""The table of families in the documentation is the one that their declarations make."""

from __future__ import annotations

from aligner.models.families import FAMILIES
from tools.families import DOCS, table, updated


def test_the_page_holds_the_table_of_the_declarations() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert updated(text) == text, "run python tools/families.py --write"
    assert table().count("\n") == len(FAMILIES) + 1


def test_a_stale_table_is_replaced_and_nothing_else() -> None:
    before, _, rest = DOCS.read_text(encoding="utf-8").partition("| `llama` |")
    assert updated(f"{before}| `alpaca` |{rest}") == DOCS.read_text(encoding="utf-8")
