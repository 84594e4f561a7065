"""Data sets of the `datasets` library: folders of `save_to_disk`, and names on a hub where the machine has a way out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.data.digest import digest
from aligner.data.sources.sampled_digest import digest_of_file
from aligner.data.sources.source import LabelledRow

if TYPE_CHECKING:
    from datasets import Dataset

DICT_FILE, DATASET_FILE = "dataset_dict.json", "dataset_info.json"


class DatasetRows:
    """Rows of a `datasets.Dataset`, mapped into memory: any row costs the same."""

    def __init__(self, name: str, place: str, dataset: Dataset) -> None:
        """
        Args:
            place: what rows' labels begin with.

        Raises:
            ValueError: it has no rows.
        """
        self.name, self._place, self._dataset = name, place, dataset
        if not len(dataset):
            raise ValueError(f"{name} has no rows: {place}.")

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int) -> LabelledRow:
        """Row `index`, from 0."""
        row: dict[str, Any] = self._dataset[index]
        return f"{self._place}, row {index + 1}", {name: value for name, value in row.items() if value is not None}

    def blocks(self) -> None:
        """Any row costs the same."""
        return None

    def digest(self) -> str:
        """Of its files' sizes and samples of them."""
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        return digest([len(self), *map(digest_of_file, files)])


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` has written the folder."""
    return (folder / DICT_FILE).is_file() or ((folder / DATASET_FILE).is_file() and (folder / "state.json").is_file())


def saved_rows(name: str, folder: Path, split: str, split_setting: str) -> DatasetRows:
    """A folder of `save_to_disk`.

    Args:
        split: which part of a DatasetDict.
        split_setting: the setting that holds it.

    Raises:
        ValueError: it cannot be loaded, or has no such split.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow's, OSError, ValueError, KeyError ...
        raise ValueError(
            f"{name} is a folder of save_to_disk, which datasets cannot load ({' '.join(str(error).split())})."
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{name} has no split {split}; use {split_setting}={' or '.join(loaded)}.")
        return DatasetRows(name, f"{folder}[{split}]", loaded[split])
    return DatasetRows(name, str(folder), loaded)


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
