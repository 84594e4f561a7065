"""Generate the table of model families in docs/families.md from their declarations.

python tools/families.py            # print it
python tools/families.py --write    # update docs/families.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aligner.models.families import FAMILIES
from aligner.models.family import Family, Window
from aligner.models.spec import QKNorm

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
COLUMNS = (
    "`model_type`",
    "Models (architecture)",
    "Attention (all causal, grouped-query)",
    "RMSNorms",
    "MLP",
    "Embeddings",
    "Rollout engine (vLLM 0.32.0)",
)
_WINDOWS = {
    Window.REFUSED: "",
    Window.SWITCHED: "",
    Window.EVERY_LAYER: "sliding window (`sliding_window`) in every layer",
}
_QK_NORMS = {QKNorm.HEAD: "query/key norm per head", QKNorm.PROJECTION: "query/key norm over all heads"}


def table() -> str:
    """The table as Markdown, one row for each family, ordered by model_type."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(family) for family in FAMILIES.values())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(family: Family) -> tuple[str, ...]:
    return (
        f"`{family.model_type}`",
        f"{family.title} (`{family.architecture}`)",
        _list(
            _biases(family),
            _QK_NORMS[family.qk_norm] if family.qk_norm else "",
            family.attention_note or _WINDOWS[family.window],
        )
        or "full",
        _norms(family),
        _mlp(family),
        _list(
            "scaled by sqrt(hidden size)" if family.scaled_embedding else "",
            "tied unless `tie_word_embeddings=false`"
            if family.defaults.tied
            else "untied unless `tie_word_embeddings=true`",
        ),
        _engine(family),
    )


def _biases(family: Family) -> str:
    if family.qkv_bias:
        return "query, key and value biases"
    return "optional biases (`attention_bias`)" if "attention_bias" in family.optional_biases else ""


def _norms(family: Family) -> str:
    norms = family.norms
    positions = {"before": norms.before_attention, "after": norms.after_attention}
    return _list(
        " and ".join(position for position, name in positions.items() if name) + " attention and MLP",
        "scale 1 + weight" if family.norm_plus_one else "",
    )


def _mlp(family: Family) -> str:
    activation = "GeGLU (tanh)" if "gelu_pytorch_tanh" in family.activations else "SwiGLU"
    if family.experts is None:
        return _list(activation, "optional biases (`mlp_bias`)" if "mlp_bias" in family.optional_biases else "")
    return f"{activation}, mixture of experts in {'some or all' if family.experts.some_dense else 'all'} layers"


def _engine(family: Family) -> str:
    drops_bias = "attention_bias" in family.optional_biases and not family.engine.output_bias
    return _list(
        family.engine.note or "vLLM's own model",
        "`attention_bias=true` is refused: vLLM would drop the output projection's bias" if drops_bias else "",
        "" if family.engine.shared_kv_heads else "tensor-parallel size at most the number of key/value heads",
        "`head_dim` must be hidden size / heads" if family.engine.fixed_head_dim else "",
    )


def _list(*words: str) -> str:
    return ", ".join(filter(None, words))


def updated(text: str) -> str:
    """The page `text` with the current table."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update docs/families.md")
    if parser.parse_args().write:
        DOCS.write_text(updated(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
