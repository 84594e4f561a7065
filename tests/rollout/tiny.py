"""Tiny Hugging Face models, and the transformers library's own answers, for the rollout's tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING

from aligner.reshard.plan.region import Piece
from aligner.reshard.weights import WritableWeights
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.requests import Sample
from tests.families import ROWS, Row

CONFIG = RolloutConfig(max_model_len=96, max_num_seqs=32, kv_cache_mib=8)
VOCAB = 100  # the engine rounds it up to 128
EOS = 1
FAMILIES = ("qwen2", "qwen3_tied", "llama")
MORE_FAMILIES = ("qwen3_moe", "mixtral", "gemma", "llama_bias", *ROWS)
EXPERTS = 5  # an odd number: under expert parallelism the first rank holds one more


_MODEL_CLASSES = {row.config: MODEL_MAPPING[row.config] for row in ROWS.values()}
_INITS = {kind: kind.__init__ for kind in _MODEL_CLASSES.values()}


@contextmanager
def _as_imported(row: Row) -> Iterator[None]:
    """The class of the model as transformers has it: where vLLM runs a family through transformers, it wraps the class,
    which can then be made inside the engine alone."""
    kind = _MODEL_CLASSES[row.config]
    now, kind.__init__ = kind.__init__, _INITS[kind]
    try:
        yield
    finally:
        kind.__init__ = now


def config(engine: str) -> RolloutConfig:
    """`CONFIG` for an engine of this kind."""
    return replace(CONFIG, engine=engine)


def make_model(family: str, seed: int) -> Any:
    """A random transformers model in float32: 2 layers, 4 heads, 2 key-value heads of 32."""
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "tie_word_embeddings": family in ("qwen3_tied", "gemma"),
    }
    torch.manual_seed(seed)
    if family in ROWS:
        row = ROWS[family]
        sizes["tie_word_embeddings"] = row.tied
        with _as_imported(row):
            model: Any = hf.AutoModelForCausalLM.from_config(row.config(**{**sizes, **row.settings}))
        model.model.do_not_compile = True  # should the engine wrap its class
    elif family == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes))
    elif family == "qwen3_tied":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=32, **sizes))
    elif family == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    elif family == "llama_bias":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(attention_bias=True, mlp_bias=True, **sizes))
    elif family == "gemma":
        model = hf.GemmaForCausalLM(hf.GemmaConfig(head_dim=32, **sizes))
    elif family == "mixtral":
        more = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": None}
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**more, **sizes))
    else:
        # Experts of width 80 are padded to 96 on a CPU, and over two ranks from 40 to 64; layer 0 is dense.
        more = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "mlp_only_layers": [0]}
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(head_dim=32, norm_topk_prob=True, **more, **sizes))
    randomize(model)
    return model.float().eval()


@torch.no_grad()
def randomize(model: Any) -> None:
    """New weights from torch's random state, large enough that every layer shows in the output."""
    outer = 0.1 if model.config.tie_word_embeddings else 0.3  # tied, the input token would always win
    gemma = model.config.model_type.startswith("gemma")
    outer = 0.02 if gemma else outer  # which multiplies its embeddings by sqrt(128)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name:
            parameter.copy_((0 if gemma else 1) + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise * (outer if "embed" in name or "lm_head" in name else 0.1))


def save(model: Any, folder: Path) -> str:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return str(folder)


def tensors(model: Any) -> dict[str, Tensor]:
    """The checkpoint's tensors: an output layer tied to the embedding is not among them, each expert's own are."""
    from transformers.core_model_loading import revert_weight_conversion

    # transformers fuses experts in memory; this is what it does when it saves them.
    found = revert_weight_conversion(model, {name: value.detach() for name, value in model.state_dict().items()})
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def cut(found: dict[str, Tensor], piece: Piece) -> Tensor:
    return found[piece.name][tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))]


def write(weights: WritableWeights, model: Any, skip: str | None = None) -> None:
    """Write every region from the model's tensors, as a transfer would."""
    found = tensors(model)
    for piece in weights.pieces():
        if piece.name != skip:
            weights.view(piece).copy_(cut(found, piece))
            weights.written([piece])
    weights.finish()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (4 + index % 7,), generator=generator).tolist() for index in range(count)]


@torch.no_grad()
def ask(engine: RolloutEngine) -> list[list[Sample]]:
    """One response of 16 tokens to each of four prompts."""
    return engine.generate(prompts(4), [0, 100, 200, 300], Sampling(1.0, 16, stop_token_ids=()))


def greedy(model: Any, prompt: Sequence[int], length: int) -> list[int]:
    """transformers' own greedy continuation, each token from a whole forward pass."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def log_probabilities(model: Any, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
    """transformers' log_softmax(logits / temperature) of the response's tokens."""
    logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return logp_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def gap(model: Any, prompt: Sequence[int], completion: Sample, temperature: float = 1.0) -> float:
    """Largest |rollout log-probability - transformers'| of the response's tokens."""
    expected = log_probabilities(model, prompt, completion.tokens, temperature)
    return float((expected - torch.tensor(completion.logp)).abs().max())
