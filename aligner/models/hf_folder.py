"""A Hugging Face folder on disk: where its tensors are, and how a new one is written so that it is never half there."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aligner.models.ownership import check_replaceable
from aligner.models.read_spec import read_config
from aligner.models.spec import Head, ModelSpec
from aligner.models.tensors import family_of, logical_tensors
from aligner.reshard.plan.region import whole_tensor

_INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
_COPIED = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def prepare(final: Path, partial: Path, spec: ModelSpec, run: str | None = None) -> None:
    """An empty folder `partial`, beside one that `publish` may replace (see `check_replaceable`)."""
    if final.resolve() == Path(spec.path).resolve():
        raise ValueError(
            f"{final} is the model.path that configuration and tokenizer come from; write to another folder."
        )
    check_replaceable(final, run)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors lets nobody else read it, a server under another account for one
    flush(file)


def write_rest(partial: Path, spec: ModelSpec, dtype: str, weight_map: dict[str, str]) -> None:
    """Everything but the weights: the index, the configuration with its new dtype and head, the source's other files."""
    folder = Path(spec.path)
    if len(set(weight_map.values())) > 1:
        size = sum(whole_tensor(name, shape, dtype).bytes for name, shape in logical_tensors(spec).items())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(partial / _INDEX, index)
    config = read_config(folder)
    config |= {key: dtype for key in ("dtype", "torch_dtype") if config.get(key)} or {"dtype": dtype}
    config["architectures"] = [family_of(spec).architecture]
    if spec.head is Head.SCALAR:
        config["architectures"] = [family_of(spec).classifier]
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config["pad_token_id"] = _pad_token_id(config, spec)
    write_json(partial / "config.json", config)
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial / name)
            flush(partial / name)
    if spec.head is Head.LANGUAGE:
        _write_end_tokens(partial / GENERATION, spec, config)


def _write_end_tokens(file: Path, spec: ModelSpec, config: dict[str, Any]) -> None:
    """Name in generation_config.json every token that ends a turn; what it names already stays, and stays first.

    Servers stop at what this file names, and read config.json only where there is no such file.
    """
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = found.get("eos_token_id") if file.is_file() else config.get("eos_token_id")
    named = ids if isinstance(ids, list) else [] if ids is None else [ids]
    missing = [token for token in spec.eos_token_ids if token not in named]
    if missing:
        if not file.is_file():
            found = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
        write_json(file, found | {"eos_token_id": [*named, *missing]})


def _pad_token_id(config: dict[str, Any], spec: ModelSpec) -> int | None:
    """What the tokenizer pads with, as config.json says where there is no tokenizer.

    Transformers reads a score at the last token that is not this one. Where the end token is also the pad token, rows
    that end with it are scored one token earlier there than here.
    """
    tokenizer = _tokenizer(Path(spec.path))
    pad = tokenizer.pad_token_id if tokenizer else None
    return config.get("pad_token_id") if pad is None else pad


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer  # seconds, which no other export needs

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def publish(partial: Path, final: Path) -> None:
    """Rename the complete folder into place; at no moment does a half-written one stand under the name.

    Where one stood there before, the two change places in one step; on a file system that cannot do that, there is none
    under the name for the moment between two renames.
    """
    flush(partial)
    previous = final.with_name(f".{final.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if final.exists() and _exchange(partial, final):
        partial.rename(previous)
    else:
        if final.exists():
            final.rename(previous)
        partial.rename(final)
    flush(final.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names (Linux); whether that was possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def write_json(file: Path, value: object) -> None:
    """Write a JSON file through to the disk."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    flush(file)


def flush(path: Path) -> None:
    """To the disk: a rename may otherwise survive a power cut that the contents do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if (folder / _INDEX).is_file():
        try:
            weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            found = {name: folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / _INDEX} is not a valid index: {error!r}") from error
        if (folder / SINGLE).is_file() and folder / SINGLE not in found.values():
            raise ValueError(
                f"{folder} holds two checkpoints: {SINGLE}, which transformers reads, and the files that {_INDEX} names; "
                "remove one of them."
            )
        for file in set(found.values()):
            if not file.is_file():
                raise ValueError(
                    f"{folder / _INDEX} names {file.name}, which is not there; the download is incomplete."
                )
        return found
    single = folder / SINGLE
    if not single.is_file():
        raise ValueError(
            f"model.path={folder} has neither {SINGLE} nor {_INDEX}; weights of other formats can be converted with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    with opened(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}; the download may be incomplete.") from error
