"""Data sets of the `datasets` library: folders of `save_to_disk`, and names on a hub where the machine has a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.data.digest import digest
from aligner.data.sources.plain_values import plain
from aligner.data.sources.sampled_digest import digest_of_file
from aligner.data.sources.source import LabelledRow, NoRowsError

if TYPE_CHECKING:
    from datasets import Dataset

DICT_FILE, DATASET_FILE, STATE_FILE = "dataset_dict.json", "dataset_info.json", "state.json"


class NoSplitError(ValueError):
    """A set that does not have the split."""


class DatasetRows:
    """Rows of a `datasets.Dataset`, mapped into memory: any row costs the same."""

    def __init__(self, name: str, place: str, dataset: Dataset) -> None:
        """
        Args:
            place: what rows' labels begin with.

        Raises:
            NoRowsError: it has no rows.
        """
        # a format that was set before it was saved would give arrays, of some columns alone
        self.name, self._place, self._dataset = name, place, dataset.with_format(None)
        if not len(dataset):
            raise NoRowsError(f"{name} has no rows: {place}.")

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int) -> LabelledRow:
        """Row `index`, from 0."""
        row: dict[str, Any] = self._dataset[index]
        return f"{self._place}, row {index + 1}", {name: plain(value) for name, value in row.items()}

    def blocks(self) -> None:
        """Any row costs the same."""
        return None

    def digest(self) -> str:
        """Of its files' sizes and samples of them."""
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        return digest([len(self), *map(digest_of_file, files)])


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` has written the folder."""
    return (folder / DICT_FILE).is_file() or ((folder / DATASET_FILE).is_file() and (folder / STATE_FILE).is_file())


def saved_rows(name: str, folder: Path, split: str, split_setting: str) -> DatasetRows:
    """A folder of `save_to_disk`.

    Args:
        split: which part of a DatasetDict.
        split_setting: the setting that holds it.

    Raises:
        ValueError: it cannot be loaded, or has no such split.
    """
    from datasets import Dataset

    place, part = str(folder), folder
    try:
        if (folder / DICT_FILE).is_file():
            splits = json.loads((folder / DICT_FILE).read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise NoSplitError(f"{name} has no split {split}; use {split_setting}={' or '.join(splits)}.")
            place, part = f"{folder}[{split}]", folder / split
        if not json.loads((part / STATE_FILE).read_text(encoding="utf-8"))["_data_files"]:
            raise NoRowsError(f"{name} has no rows: {place}.")  # which datasets saves, and cannot load
        return DatasetRows(name, place, Dataset.load_from_disk(str(part)))
    except (NoRowsError, NoSplitError):
        raise
    except Exception as error:  # pyarrow's, OSError, ValueError, KeyError ...
        raise ValueError(
            f"{name} is a folder of save_to_disk, which datasets cannot load ({' '.join(str(error).split())})."
        ) from None


def hub_rows(name: str, repository: str, split: str, split_setting: str) -> DatasetRows:
    """A data set on a hub, "owner/name" or "owner/name/subset", downloaded into the cache of `datasets`.

    Raises:
        ValueError: HF_HUB_OFFLINE forbids it, or it cannot be loaded.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{name} does not exist here. If it is a data set on a hub: this machine is set to stay offline; where it has a way "
            f"out, set HF_HUB_OFFLINE=0, or download it first: hf download --repo-type dataset {repository} --local-dir DIR."
        )
    owner, _, rest = repository.partition("/")
    dataset, _, subset = rest.partition("/")
    try:
        loaded = datasets.load_dataset(f"{owner}/{dataset}", subset or None, split=split)
    except Exception as error:
        raise ValueError(
            f"{name} does not exist here, and cannot be loaded from the hub ({' '.join(str(error).split())[:400]}); the split is "
            f"{split_setting}={split}, a subset is given as owner/name/subset."
        ) from None
    return DatasetRows(name, f"{repository}[{split}]", loaded)
