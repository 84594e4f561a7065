"""Small tokenizers of the kinds that models have, trained here."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.chat_templates import SPECIAL, TEMPLATES

TEXT = [
    "The capital of France is Paris. What is it? Hello there, I'd like to know!\n\n",
    "user assistant system tool USER: ASSISTANT: [INST] [/INST] <think>\n\n</think>\n\n### Response:\n",
    "naïve café Ωmega ½ ﬁne 日本語のテキスト 한국어 текст на русском\r\n\ttabs  and   spaces \n \n",
    '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}} 1234567890 3.14\n',
    "<tool_call> </tool_call> a b c d e f g h i j k l m n o p q r s t u v w x y z :;.,!?",
    "model Today is helpful call weather: Instruction: ### <<SYS>> <</SYS>>\n",
] * 8
WORDS = Regex(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel.alphabet()
BYTE_PIECES = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]


def _byte_level(split: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    words = pre_tokenizers.Split(WORDS, "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, plain]) if split else plain
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=not split)
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=700, initial_alphabet=BYTES, show_progress=False))
    return made


def _pieces(kind: str) -> Tokenizer:
    """SentencePiece's BPE as transformers converts it: with the prefix space in a normalizer (legacy) or not."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=BYTE_PIECES, show_progress=False, max_token_length=12)
    if kind == "prepend":
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(marks)
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        scheme = "first" if kind == "first" else "always"
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=kind == "words")
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", scheme)])
    made.train_from_iterator(TEXT, trainer)
    kept = json.loads(made.to_str())
    kept["added_tokens"] = []  # the bytes are pieces
    return Tokenizer.from_str(json.dumps(kept))


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    made.decoder = decoders.Metaspace("▁", "always")
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return made


KINDS = {
    "byte_level": lambda: _byte_level(False),
    "byte_level_split": lambda: _byte_level(True),
    "pieces_legacy": lambda: _pieces("prepend"),
    "pieces": lambda: _pieces("first"),
    "metaspace_words": lambda: _pieces("words"),
    "unigram": _unigram,
}


@cache
def trained_tokenizer(kind: str) -> str:
    """tokenizer.json of a tokenizer of that kind."""
    made = KINDS[kind]()
    strips = kind == "metaspace_words"
    tokens = [AddedToken(t, special=True, normalized=False, rstrip=strips and t == "<|assistant|>") for t in SPECIAL]
    made.add_special_tokens(tokens)
    return str(made.to_str())


def tokenizer_of(kind: str, template: str, marked: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of that kind with that chat template."""
    chosen = TEMPLATES[template]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_tokenizer(kind)),
        bos_token=chosen.begin,
        eos_token=chosen.end,
        pad_token=chosen.end,
        chat_template=chosen.marked if marked else chosen.plain,
    )
