"""A batch whose loss or gradient is not finite, on disk: every data shard writes its rows; they can be loaded and run again."""

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

README = """# A batch that could not be trained on

`step_N/rank_R.json` says what was not finite and shows the rows of one data shard; `rank_R.safetensors` holds their tensors:
the samples, `field.NAME` what the loss was given by name, `readout` what the model made of them (log-probabilities, values
or scores) and `loss` before its reduction (where several microbatches were packed, as each gave it). All shards together,
ready to be trained on again:

    from aligner.trainer.offending_batch import load_offending
    samples, fields = load_offending("step_N")
    policy.update(loss, policy.scatter(samples, group_size=1), **fields)  # fields as Refs: policy.scatter_like(placed, value)
"""
OF_SAMPLES = (
    "tokens_BT", "prompt_len_B", "length_B", "mask_BT", "prompt_index_B", "rollout_logp_BT", "truncated_B", "version_BT",
)  # fmt: skip


@dataclass(frozen=True)
class MicrobatchOutput:
    """One microbatch: its rows, its readout and its loss before the reduction, each [rows, T] or [rows]."""

    rows: Sequence[int]
    readout: Tensor
    loss: Tensor


def begin_offending(folder: Path) -> None:
    """Make the folder, without another run's rows; one rank calls it before others save. A failure goes to stderr only."""
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
    about: Mapping[str, Any],
    model: str | Path,
) -> None:
    """Write this shard's rows as `folder`/rank_R.safetensors and .json. A failure (a full disk) goes to stderr only.

    Args:
        fields: what the loss was given by name; tensors of as many rows as `samples`, or plain values.
        about: what happened, for the JSON.
        model: the folder whose tokenizer shows the rows as text.
    """
    with _errors_on_stderr(folder):
        _save(folder, rank, samples, fields, outputs, about, _texts(samples, model))


@contextlib.contextmanager
def _errors_on_stderr(folder: Path) -> Iterator[None]:
    """The job is ending for another reason, which must be heard."""
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


def _save(
    folder: Path,
    rank: int,
    samples: Samples,
    fields: Mapping[str, Any],
    outputs: Sequence[MicrobatchOutput],
    about: Mapping[str, Any],
    texts: Sequence[str] | None,
) -> None:
    tensors = {name: value for name in OF_SAMPLES if (value := getattr(samples, name)) is not None}
    by_row = {name: value for name, value in fields.items() if isinstance(value, Tensor) and value.dim()}
    tensors |= {f"field.{name}": value for name, value in by_row.items()}
    for name in ("readout", "loss"):
        whole = _whole([(one.rows, getattr(one, name)) for one in outputs], samples.tokens_BT.shape)
        if whole is not None:
            tensors[name] = whole
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(held, folder / f"rank_{rank}.safetensors")
    bad = {name: int((~value.isfinite()).sum()) for name, value in tensors.items() if value.is_floating_point()}
    report = {
        **about,
        "not_finite": {name: count for name, count in bad.items() if count},
        "plain_fields": {name: value for name, value in fields.items() if name not in by_row},
        "rows": [_row(samples, row, tensors.get("loss"), texts) for row in range(samples.rows)],
    }
    text = json.dumps(_strict(report), indent=1, ensure_ascii=False, allow_nan=False, default=str)
    (folder / f"rank_{rank}.json").write_text(text + "\n", encoding="utf-8")


def load_offending(folder: str | Path) -> tuple[Samples, dict[str, Any]]:
    """The rows of all shards, in the order of their ranks, and what the loss was given by name.

    Raises:
        ValueError: there are none.
    """
    files = sorted(Path(folder).glob("rank_*.safetensors"), key=lambda file: int(file.stem.removeprefix("rank_")))
    if not files:
        raise ValueError(f"{folder} holds no rank_*.safetensors; give a folder such as run_dir/offending/step_12.")
    parts, given, plain = [], [], dict[str, Any]()
    for file in files:
        tensors, report = load_file(file), json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        rows = [row["fields"] for row in report["rows"]]
        parts.append(Samples(**{name: tensors.get(name) for name in OF_SAMPLES}, fields=rows))  # type: ignore[arg-type]
        given.append({n.removeprefix("field."): value for n, value in tensors.items() if n.startswith("field.")})
        plain |= report["plain_fields"]
    return batch_ops.join(parts), {**plain, **batch_ops.join(given)}


def _whole(parts: Sequence[tuple[Sequence[int], Tensor]], shape: torch.Size) -> Tensor | None:
    """Microbatches' [rows, T] or [rows] as one tensor of all rows, 0 where nothing was computed; None without any."""
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
    shown: dict[str, Any] = {
        "prompt_index": int(samples.prompt_index_B[row]),
        "tokens": int(samples.length_B[row]),
        "prompt_tokens": int(samples.prompt_len_B[row]),
        "trained_tokens": int(mask_T.sum()),
        "fields": samples.fields[row],
    }
    if loss is not None:
        shown["mean_loss"] = float(loss[row] if loss.dim() == 1 else loss[row][mask_T].mean())
    if texts is not None:
        shown["text"] = texts[row]
    return shown


def _strict(value: Any) -> Any:
    """What strict JSON cannot hold, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Tensor):
        return _strict(value.tolist())
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
