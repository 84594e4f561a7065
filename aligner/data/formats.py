"""Files that hold rows in other forms than JSONL: what they are, and the command that makes JSONL of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 1024
"""How much of a file's beginning tells its form."""


@dataclass(frozen=True)
class MessageLayout:
    """A form of file that is not read here."""

    what: str
    """What it is, after "is"."""
    command: str
    """What turns {file} into {out}, both quoted for a shell; {python} is {file} quoted for Python inside "..."."""
    beginnings: tuple[bytes, ...] = ()
    suffixes: tuple[str, ...] = ()


CSV = (
    "python -c \"import csv, json; [print(json.dumps(row)) for row in csv.DictReader(open({python}, newline='', encoding='utf-8-sig'){tab})]\" "
    "> {out}"
)
LFS = MessageLayout("a pointer of Git LFS, not the file itself", "git lfs pull", (b"version https://git-lfs",))
FORMS = (
    LFS,
    MessageLayout("compressed (gzip)", "gzip -dc {file} > {out}", (b"\x1f\x8b",)),
    MessageLayout("compressed (zstd)", "zstd -dc {file} > {out}", (b"\x28\xb5\x2f\xfd",)),
    MessageLayout("compressed (xz)", "xz -dc {file} > {out}", (b"\xfd7zXZ\x00",)),
    MessageLayout("compressed (bzip2)", "bzip2 -dc {file} > {out}", (b"BZh",)),
    MessageLayout("compressed (lz4)", "lz4 -dc {file} > {out}", (b"\x04\x22\x4d\x18",)),
    MessageLayout("a zip archive", "unzip -p {file} > {out}", (b"PK\x03\x04",)),
    MessageLayout(
        "a Parquet file",
        'python -c "from datasets import Dataset; Dataset.from_parquet({python}).to_json({pythonout})" (pip install datasets)',
        (b"PAR1",),
    ),
    MessageLayout(
        "an Arrow file",
        "python -c \"import pandas; pandas.read_feather({python}).to_json({pythonout}, orient='records', lines=True)\" "
        "(pip install pandas pyarrow)",
        (b"ARROW1",),
    ),
    MessageLayout(
        "an Arrow stream, as datasets keeps them",
        'python -c "from datasets import Dataset; Dataset.from_file({python}).to_json({pythonout})" (pip install datasets)',
        (b"\xff\xff\xff\xff",),
    ),
    MessageLayout("UTF-16 text", "iconv -f UTF-16 -t UTF-8 {file} > {out}", (b"\xff\xfe", b"\xfe\xff")),
    MessageLayout("a table of comma-separated values", CSV.replace("{tab}", ""), suffixes=(".csv",)),
    MessageLayout("a table of tab-separated values", CSV.replace("{tab}", ", delimiter='\\t'"), suffixes=(".tsv",)),
    MessageLayout(
        "one JSON array",
        'python -c "import json; [print(json.dumps(row)) for row in json.load(open({python}))]" > {out}',
        (b"[",),
    ),
)
TAR = MessageLayout("a tar archive", "tar -xf {file}")
SPREAD = MessageLayout(
    "JSON of which one object stands on several lines",
    "jq -c . {file} > {out} (with '.data[]' in place of . where the rows are a list under \"data\")",
)


def other_form(file: Path, head: bytes) -> str | None:
    """What to do with a file that is no JSONL, as the end of a message; None where nothing speaks against JSONL.

    Args:
        head: its first HEAD_BYTES.
    """
    form = _form(file, head)
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
    out = str(file.with_name(f"{Path(name).stem if name.endswith('.jsonl') else name}.jsonl"))
    if out == str(file):
        out = str(file.with_name(f"{file.stem}.rows.jsonl"))
    command = form.command
    for key, value in {
        "{file}": shlex.quote(str(file)),
        "{out}": shlex.quote(out),
        "{python}": _python(str(file)),
        "{pythonout}": _python(out),
    }.items():
        command = command.replace(key, value)
    return f"is {form.what}, and rows are read from JSONL, one JSON object a line; first run: {command}"


def missing_hint(path: str) -> str:
    """What a path that is not there may have been meant as, as a further sentence; "" where nothing suggests itself."""
    if "://" in path:
        return " Addresses are not opened: download the file first."
    if any(letter in path for letter in "*?[,"):
        return " One file is read: cat FILES > rows.jsonl joins several."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).suffix:
        command = f"from datasets import load_dataset; load_dataset('{path}', split='train').to_json('rows.jsonl')"
        return f' If it is a data set of a hub: python -c "{command}" (pip install datasets).'
    return ""


def folder_hint(folder: Path) -> str:
    """What a folder may have been meant as."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        command = f"from datasets import load_from_disk; load_from_disk({_python(str(folder))}).to_json('rows.jsonl')"
        return f' It holds a data set of datasets: python -c "{command}".'
    found = sorted(file.name for file in folder.glob("*.jsonl"))[:3]
    return f" It holds {', '.join(found)}." if found else ""


def _form(file: Path, head: bytes) -> MessageLayout | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[257:262] == b"ustar":
        return TAR
    if text.startswith(b"{"):
        first = text.split(b"\n", 1)
        return SPREAD if len(first) > 1 and first[0].strip() == b"{" else None
    for form in FORMS:
        if head.startswith(form.beginnings) or (text.startswith(b"[") and b"[" in form.beginnings):
            return form
        if file.name.lower().endswith(form.suffixes) and form.suffixes:
            return form
    return None


def _python(text: str) -> str:
    """A Python literal that may stand inside double quotes of a shell."""
    return re.sub(r'([\\"$`])', r"\\\1", repr(text))
