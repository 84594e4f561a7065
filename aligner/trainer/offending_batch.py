"""A batch whose loss or gradient is not finite, saved to disk: every data-parallel rank writes its rows; they can be reloaded."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aligner.data.decoding import decode
from aligner.data.samples import Samples
from aligner.data.tokenizer import load_tokenizer
from aligner.spmd import batch_ops

README = """# A batch whose loss or gradient was not finite

`step_N/rank_R.json` says what was not finite and shows the rows of one data-parallel rank; `rank_R.safetensors` holds their
tensors: the samples, `field.NAME` for each field passed to the loss, `readout` (the model's log-probabilities, values or
scores) and `loss` before its reduction (of every microbatch). To load the rows of all ranks and train on them again:

    from aligner.trainer.offending_batch import load_offending
    samples, fields = load_offending("step_N")
    policy.update(loss, policy.scatter(samples, group_size=1), **fields)  # fields as Refs: policy.scatter_like(placed, value)
"""
SAMPLE_TENSORS = (
    "tokens_BT", "prompt_len_B", "length_B", "mask_BT", "prompt_index_B", "rollout_logp_BT", "truncated_B", "version_BT",
    "turn_BT", "segment_BT", "turn_reward_BT", "episode_reward_B",
)  # fmt: skip


@dataclass(frozen=True)
class MicrobatchOutput:
    """One microbatch: its row indices, its readout and its loss before the reduction, each [rows, T] or [rows]."""

    rows: Sequence[int]
    readout: Tensor
    loss: Tensor


def begin_offending(folder: Path) -> None:
    """Make the folder empty; one rank calls it before the others save. An error is only written to stderr."""
    with _errors_on_stderr(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder.parent / "README.md").write_text(README, encoding="utf-8")


def save_offending(
    folder: Path,
    rank: int,
    samples: Samples,
    fields: Mapping[str, Any],
    outputs: Sequence[MicrobatchOutput],
    description: Mapping[str, Any],
    model: str | Path,
) -> None:
    """Write this data shard's rows as `folder`/rank_R.safetensors and .json. An error (a full disk) is only written to stderr.

    Args:
        fields: the fields passed to the loss: tensors with as many rows as `samples`, or plain values.
        description: JSON values that describe the failure.
        model: folder whose tokenizer decodes the rows.
    """
    with _errors_on_stderr(folder):
        row_fields = {name: value for name, value in fields.items() if isinstance(value, Tensor) and value.dim()}
        tensors = _tensors(samples, row_fields, outputs)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"rank_{rank}.safetensors")
        counts = {name: int((~value.isfinite()).sum()) for name, value in tensors.items() if value.is_floating_point()}
        texts = _texts(samples, model)
        report = {
            **description,
            "not_finite": {name: count for name, count in counts.items() if count},
            "plain_fields": {name: value for name, value in fields.items() if name not in row_fields},
            "rows": [_row(samples, row, tensors.get("loss"), texts) for row in range(samples.rows)],
        }
        text = json.dumps(_strict(report), indent=1, ensure_ascii=False, allow_nan=False, default=str)
        (folder / f"rank_{rank}.json").write_text(text + "\n", encoding="utf-8")


def _tensors(
    samples: Samples, row_fields: Mapping[str, Tensor], outputs: Sequence[MicrobatchOutput]
) -> dict[str, Tensor]:
    """The tensors of rank_R.safetensors, on the host."""
    tensors = {name: value for name in SAMPLE_TENSORS if (value := getattr(samples, name)) is not None}
    tensors |= {f"field.{name}": value for name, value in row_fields.items()}
    for name in ("readout", "loss"):
        joined = _join_rows([(output.rows, getattr(output, name)) for output in outputs], samples.tokens_BT.shape)
        if joined is not None:
            tensors[name] = joined
    return {name: value.detach().cpu() for name, value in tensors.items()}


@contextlib.contextmanager
def _errors_on_stderr(folder: Path) -> Iterator[None]:
    """Report an error without raising it: the job is about to end with the error that matters."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        sys.stderr.write(f"aligner: {folder} could not be written: {error}\n")


def _texts(samples: Samples, model: str | Path) -> list[str] | None:
    try:
        tokenizer = load_tokenizer(model)
    except ValueError:
        return None
    ids = (samples.tokens_BT[row, : samples.length_B[row]].tolist() for row in range(samples.rows))
    return [decode(tokenizer, row, keep_special_tokens=True) for row in ids]


def load_offending(folder: str | Path) -> tuple[Samples, dict[str, Any]]:
    """The rows of all data shards, in the order of their ranks, and the fields passed to the loss.

    Raises:
        ValueError: the folder has no saved rows.
    """
    files = sorted(Path(folder).glob("rank_*.safetensors"), key=lambda file: int(file.stem.removeprefix("rank_")))
    if not files:
        raise ValueError(f"{folder} holds no rank_*.safetensors; give a folder such as run_dir/offending/step_12.")
    parts, row_fields, plain_fields = [], [], dict[str, Any]()
    for file in files:
        tensors, report = load_file(file), json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        rows = [row["fields"] for row in report["rows"]]
        episodes = [row["episode"] for row in report["rows"] if "episode" in row] or None
        parts.append(Samples(**{n: tensors.get(n) for n in SAMPLE_TENSORS}, fields=rows, episodes=episodes))  # type: ignore[arg-type]
        row_fields.append({n.removeprefix("field."): value for n, value in tensors.items() if n.startswith("field.")})
        plain_fields |= report["plain_fields"]
    return batch_ops.join(parts), {**plain_fields, **batch_ops.join(row_fields)}


def _join_rows(parts: Sequence[tuple[Sequence[int], Tensor]], shape: torch.Size) -> Tensor | None:
    """Microbatches' [rows, T] or [rows] joined into one tensor of all rows, 0 where nothing was computed; None if empty."""
    if not parts:
        return None
    first = parts[0][1]
    out = torch.zeros(shape[: first.dim()], dtype=first.dtype)
    for rows, value in parts:
        value = value.detach().cpu()
        (out if value.dim() == 1 else out[:, : value.shape[1]])[torch.as_tensor(rows, dtype=torch.long)] = value
    return out


def _row(samples: Samples, row: int, loss: Tensor | None, texts: Sequence[str] | None) -> dict[str, Any]:
    mask_T = samples.mask_BT[row]
    entry: dict[str, Any] = {
        "prompt_index": int(samples.prompt_index_B[row]),
        "tokens": int(samples.length_B[row]),
        "prompt_tokens": int(samples.prompt_len_B[row]),
        "trained_tokens": int(mask_T.sum()),
        "fields": samples.fields[row],
    }
    if samples.episodes is not None:
        entry["episode"] = samples.episodes[row]
    if loss is not None:
        entry["mean_loss"] = float(loss[row] if loss.dim() == 1 else loss[row][mask_T].mean())
    if texts is not None:
        entry["text"] = texts[row]
    return entry


def _strict(value: Any) -> Any:
    """The value for strict JSON: NaN and infinities as strings, tensors as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Tensor):
        return _strict(value.tolist())
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
