"""Detect data files that are not JSONL (Parquet, CSV, compressed, ...) and suggest the command that converts them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 1024
"""Bytes at the start of a file that are inspected."""


@dataclass(frozen=True)
class FileFormat:
    """A file format that is not supported directly."""

    description: str
    """Description; completes "the file is ..."."""
    command: str
    """Command that converts {file} to {out}, both shell-quoted; {python} is {file} as a Python literal inside "..."."""
    beginnings: tuple[bytes, ...] = ()
    suffixes: tuple[str, ...] = ()


CSV = (
    "python -c \"import csv, json; [print(json.dumps(row)) for row in csv.DictReader(open({python}, newline='', encoding='utf-8-sig'){tab})]\" "
    "> {out}"
)
LFS = FileFormat("a pointer of Git LFS, not the file itself", "git lfs pull", (b"version https://git-lfs",))
FORMATS = (
    LFS,
    FileFormat("compressed (gzip)", "gzip -dc {file} > {out}", (b"\x1f\x8b",)),
    FileFormat("compressed (zstd)", "zstd -dc {file} > {out}", (b"\x28\xb5\x2f\xfd",)),
    FileFormat("compressed (xz)", "xz -dc {file} > {out}", (b"\xfd7zXZ\x00",)),
    FileFormat("compressed (bzip2)", "bzip2 -dc {file} > {out}", (b"BZh",)),
    FileFormat("compressed (lz4)", "lz4 -dc {file} > {out}", (b"\x04\x22\x4d\x18",)),
    FileFormat("a zip archive", "unzip -p {file} > {out}", (b"PK\x03\x04",)),
    FileFormat(
        "a Parquet file",
        'python -c "from datasets import Dataset; Dataset.from_parquet({python}).to_json({pythonout})" (pip install datasets)',
        (b"PAR1",),
    ),
    FileFormat(
        "an Arrow file",
        "python -c \"import pandas; pandas.read_feather({python}).to_json({pythonout}, orient='records', lines=True)\" "
        "(pip install pandas pyarrow)",
        (b"ARROW1",),
    ),
    FileFormat(
        "an Arrow stream, as datasets keeps them",
        'python -c "from datasets import Dataset; Dataset.from_file({python}).to_json({pythonout})" (pip install datasets)',
        (b"\xff\xff\xff\xff",),
    ),
    FileFormat("UTF-16 text", "iconv -f UTF-16 -t UTF-8 {file} > {out}", (b"\xff\xfe", b"\xfe\xff")),
    FileFormat("a table of comma-separated values", CSV.replace("{tab}", ""), suffixes=(".csv",)),
    FileFormat("a table of tab-separated values", CSV.replace("{tab}", ", delimiter='\\t'"), suffixes=(".tsv",)),
    FileFormat(
        "one JSON array",
        'python -c "import json; [print(json.dumps(row)) for row in json.load(open({python}))]" > {out}',
        (b"[",),
    ),
)
TAR = FileFormat("a tar archive", "tar -xf {file}")
MULTILINE = FileFormat(
    "JSON with objects that span several lines",
    "jq -c . {file} > {out} (with '.data[]' in place of . where the rows are a list under \"data\")",
)


def conversion_hint(file: Path, head: bytes) -> str | None:
    """The end of an error message for a file that is not JSONL, with the command that converts it; None for JSONL.

    Args:
        head: the first HEAD_BYTES of the file.
    """
    form = _detect(file, head)
    if form is None:
        return None
    name = file.name
    for suffix in (
        ".gz",
        ".zst",
        ".xz",
        ".bz2",
        ".lz4",
        ".zip",
        ".parquet",
        ".arrow",
        ".feather",
        ".csv",
        ".tsv",
        ".json",
    ):
        name = name.removesuffix(suffix)
    target = str(file.with_name(f"{Path(name).stem if name.endswith('.jsonl') else name}.jsonl"))
    if target == str(file):
        target = str(file.with_name(f"{file.stem}.rows.jsonl"))
    command = form.command
    for key, value in {
        "{file}": shlex.quote(str(file)),
        "{out}": shlex.quote(target),
        "{python}": _python(str(file)),
        "{pythonout}": _python(target),
    }.items():
        command = command.replace(key, value)
    return f"is {form.description}, and rows are read from JSONL, one JSON object a line; first run: {command}"


def missing_hint(path: str) -> str:
    """A hint for a path that does not exist (URL, glob, hub data set), as a further sentence; "" if there is none."""
    if "://" in path:
        return " URLs are not opened: download the file first."
    if any(letter in path for letter in "*?[,"):
        return " Only one file is read: join several with cat FILES > rows.jsonl."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).suffix:
        command = f"from datasets import load_dataset; load_dataset('{path}', split='train').to_json('rows.jsonl')"
        return f' If it is a data set on a hub: python -c "{command}" (pip install datasets).'
    return ""


def folder_hint(folder: Path) -> str:
    """A hint for a path that is a folder, as a further sentence; "" if there is none."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        command = f"from datasets import load_from_disk; load_from_disk({_python(str(folder))}).to_json('rows.jsonl')"
        return f' It is a data set saved by datasets: python -c "{command}".'
    names = sorted(file.name for file in folder.glob("*.jsonl"))[:3]
    return f" It holds {', '.join(names)}." if names else ""


def _detect(file: Path, head: bytes) -> FileFormat | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[257:262] == b"ustar":
        return TAR
    if text.startswith(b"{"):
        first = text.split(b"\n", 1)
        return MULTILINE if len(first) > 1 and first[0].strip() == b"{" else None
    for form in FORMATS:
        if head.startswith(form.beginnings) or (text.startswith(b"[") and b"[" in form.beginnings):
            return form
        if file.name.lower().endswith(form.suffixes) and form.suffixes:
            return form
    return None


def _python(text: str) -> str:
    """A Python string literal, escaped for use inside double quotes of a shell."""
    return re.sub(r'([\\"$`])', r"\\\1", repr(text))
