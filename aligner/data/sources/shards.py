"""Which files of a folder are the rows of one split: a hub checkout of shards, or any folder of data files."""

from __future__ import annotations

import re
from pathlib import Path

from aligner.data.sources.file_kinds import PACKED_SUFFIXES, SUFFIXES

SHARD = re.compile(r"(?P<split>[\w.]+?)-\d{5,}-of-\d{5,}")
"""The name of a shard: train-00000-of-00004, train_sft-00000-of-00001."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words for it in names of files and folders."""
NOT_ROWS = (
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "model.safetensors.index.json",
)  # fmt: skip
"""JSON files of data sets and models that are no rows."""


def files_of_split(folder: Path, split: str, setting: str, split_setting: str) -> list[Path]:
    """The data files of a folder, by name; of those whose names tell a split, the ones of `split`.

    Args:
        setting: the setting that holds the folder, for errors.
        split_setting: the setting that holds the split.

    Raises:
        ValueError: no data files, none of this split, several subsets, or several kinds of files.
    """
    files = sorted(file for file in folder.rglob("*") if _is_data(file.relative_to(folder)) and file.is_file())
    if not files:
        raise ValueError(
            f"{setting}={folder} is a folder without data files ({', '.join(SUFFIXES)}, compressed or not); give a file, or a "
            "folder of them."
        )
    splits = {file: split_of(file.relative_to(folder)) for file in files}
    named = sorted({name for name in splits.values() if name is not None})
    chosen = [file for file in files if splits[file] == split] if named else files
    if not chosen:
        raise ValueError(
            f"{setting}={folder} has no files of the split {split}; use {split_setting}={' or '.join(named)}."
        )
    subsets = sorted({_subset(file.relative_to(folder)) for file in chosen})
    if len(subsets) > 1:
        raise ValueError(
            f"{setting}={folder} holds {len(subsets)} sets ({', '.join(name or '.' for name in subsets)}); give one of these "
            f"folders, such as {setting}={folder / subsets[-1]}, or a glob of the files that are meant."
        )
    kinds = sorted({_kind(file) for file in chosen})
    if len(kinds) > 1:
        raise ValueError(
            f"{setting}={folder} holds files of several kinds ({', '.join(kinds)}), which may be the same rows twice; give one "
            f"kind: {setting}='{folder}/*{kinds[-1]}'."
        )
    return chosen


def split_of(file: Path) -> str | None:
    """The split that a file's name or its folders' tell; None if they tell none."""
    shard = SHARD.match(file.name)
    if shard:
        words = {word: split for split, names in SPLITS.items() for word in names}
        return words.get(shard["split"], shard["split"])
    for part in (file.name, *reversed(file.parent.parts)):
        for split, names in SPLITS.items():
            if re.search(rf"(?<![a-z])({'|'.join(names)})(?![a-z])", part.lower()):
                return split
    return None


def _subset(file: Path) -> str:
    """The folders above a file that tell no split: "main" of main/train-00000-of-00001.parquet."""
    parts = [part for part in file.parent.parts if split_of(Path(part)) is None and part != "data"]
    return "/".join(parts)


def _is_data(file: Path) -> bool:
    if file.name in NOT_ROWS or any(part.startswith((".", "__")) for part in file.parts):
        return False
    return bool(_kind(file))


def _kind(file: Path) -> str:
    """The suffixes of a data file, ".jsonl.gz"; "" of other files."""
    packed = next((suffix for suffix in PACKED_SUFFIXES if file.name.lower().endswith(suffix)), "")
    plain = file.name.lower().removesuffix(packed)
    return next((f"{suffix}{packed}" for suffix in SUFFIXES if plain.endswith(suffix)), "")
