"""A Hugging Face folder on disk: which file holds a tensor, and writing a new folder atomically."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aligner.models.ownership import check_replaceable
from aligner.models.read_spec import read_config
from aligner.models.remote_code import copy_code
from aligner.models.spec import Head, ModelSpec
from aligner.models.tensors import architecture_of, classifier_of, logical_tensors
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


def prepare_partial(final: Path, partial: Path, spec: ModelSpec, run: str | None = None) -> None:
    """Make an empty folder `partial`, and check that `publish` may replace `final` (see `check_replaceable`)."""
    if final.resolve() == Path(spec.path).resolve():
        raise ValueError(
            f"{final} is the model.path that configuration and tokenizer come from; write to another folder."
        )
    check_replaceable(final, run)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file through to the disk, with the permissions of any new file."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors makes it readable by the owner only, and not by a server under another account
    flush(file)


def write_rest(partial: Path, spec: ModelSpec, dtype: str, weight_map: dict[str, str]) -> None:
    """Write all but the weights: the index, config.json with its new dtype and head, the source's other files."""
    folder = Path(spec.path)
    if len(set(weight_map.values())) > 1:
        size = sum(whole_tensor(name, shape, dtype).bytes for name, shape in logical_tensors(spec).items())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(partial / _INDEX, index)
    config = read_config(folder)
    config |= {key: dtype for key in ("dtype", "torch_dtype") if config.get(key)} or {"dtype": dtype}
    config["architectures"] = [architecture_of(spec)]
    if spec.head is Head.SCALAR:
        config["architectures"] = [classifier_of(spec)]
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config["pad_token_id"] = _pad_token_id(config, spec)
    write_json(partial / "config.json", config)
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial / name)
            flush(partial / name)
    if spec.trust_remote_code:
        for copy in copy_code(folder, partial, config["auto_map"]):
            flush(copy)
    if spec.chat_template is not None:
        _write_chat_template(partial, spec.chat_template)
    if spec.head is Head.LANGUAGE:
        _write_end_tokens(partial / GENERATION, spec, config)


def _write_chat_template(partial: Path, template: str) -> None:
    """As the only one: in the file that has precedence over tokenizer_config.json, which loses its own."""
    file = partial / "chat_template.jinja"
    file.write_text(template, encoding="utf-8")
    flush(file)
    config = partial / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if settings.pop("chat_template", None) is not None:
        write_json(config, settings)


def _write_end_tokens(file: Path, spec: ModelSpec, config: dict[str, Any]) -> None:
    """Add every end token to eos_token_id of generation_config.json, after those that it already has.

    Servers take end tokens from this file, and from config.json only if there is no such file.
    """
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = generation.get("eos_token_id") if file.is_file() else config.get("eos_token_id")
    present = ids if isinstance(ids, list) else [] if ids is None else [ids]
    missing = [token for token in spec.eos_token_ids if token not in present]
    if missing:
        if not file.is_file():
            generation = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
        write_json(file, generation | {"eos_token_id": [*present, *missing]})


def _pad_token_id(config: dict[str, Any], spec: ModelSpec) -> int | None:
    """The tokenizer's pad token; config.json's if there is no tokenizer.

    Transformers reads a score at the last token that is not padding. If the end token is also the pad token, transformers
    scores rows that end with it one token earlier than aligner does.
    """
    tokenizer = _tokenizer(Path(spec.path))
    pad = tokenizer.pad_token_id if tokenizer else None
    return config.get("pad_token_id") if pad is None else pad


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None if it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer  # imported here: it takes seconds, and only this export needs it

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def publish(partial: Path, final: Path) -> None:
    """Rename the complete folder to its final name, which never shows an incomplete folder.

    An existing folder is exchanged with it atomically; on a file system that cannot do that, there is no folder of this
    name for the moment between two renames.
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
    """Exchange the names of two folders atomically (Linux). Returns whether that was possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(cwd, os.fsencode(one), cwd, os.fsencode(other), exchange) == 0


def write_json(file: Path, value: object) -> None:
    """Write a JSON file through to the disk."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    flush(file)


def flush(path: Path) -> None:
    """fsync a file or folder: otherwise a rename may survive a power cut, and the contents not."""
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
            files = {name: folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / _INDEX} is not a valid index: {error!r}") from error
        if (folder / SINGLE).is_file() and folder / SINGLE not in files.values():
            raise ValueError(
                f"{folder} holds two checkpoints: {SINGLE}, which transformers reads, and the files that {_INDEX} names; "
                "remove one of them."
            )
        for file in set(files.values()):
            if not file.is_file():
                raise ValueError(
                    f"{folder / _INDEX} names {file.name}, which is not there; the download is incomplete."
                )
        return files
    single = folder / SINGLE
    if not single.is_file():
        raise ValueError(
            f"model.path={folder} has neither {SINGLE} nor {_INDEX}; weights of other formats can be converted with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    with opened(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def names_in_files(spec: ModelSpec, files: Collection[str]) -> dict[str, str]:
    """For each tensor of `files` the model's name of it -> its name there, which may lack `CheckpointTensors.prefix`."""
    prefix, known = (spec.tensors.prefix if spec.tensors is not None else ""), logical_tensors(spec)
    lacking = {name for name in files if name not in known and prefix + name in known and prefix + name not in files}
    return {prefix + name if name in lacking else name: name for name in files}


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """An open safetensors file. Raises ValueError naming the file if it cannot be read."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}; the download may be incomplete.") from error
