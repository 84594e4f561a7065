"""Packed values come back as they were, whatever kinds of tensors they hold; frames nest and stay aligned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aligner.data.samples import Samples
from aligner.spmd.serialization import ALIGN, deserialize, frame, serialize, unframe

TENSORS = {
    "int64": torch.arange(7),
    "bool": torch.tensor([[True, False], [False, True]]),
    "bfloat16, transposed": torch.arange(15.0).reshape(3, 5).bfloat16().t(),
    "every second": torch.arange(12.0)[::2],
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "no rows": torch.zeros(0, dtype=torch.int8),
    "no width": torch.zeros(3, 0),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    "gradient wanted": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back(name: str) -> None:
    found = deserialize(serialize({"x": [TENSORS[name], name]}))["x"]
    assert found[1] == name and found[0].dtype == TENSORS[name].dtype and found[0].shape == TENSORS[name].shape
    torch.testing.assert_close(found[0], TENSORS[name].detach(), rtol=0, atol=0, equal_nan=True)
    assert not found[0].requires_grad


def test_a_batch_comes_back() -> None:
    one = torch.arange(4)
    samples = Samples(torch.ones(4, 3, dtype=torch.long), one, one, torch.ones(4, 3) > 0, one, [{"row": 1}] * 4)
    found = deserialize(serialize(samples))
    assert found.fields == samples.fields and found.rollout_logp_BT is None
    for name in ("tokens_BT", "prompt_len_B", "length_B", "mask_BT", "prompt_index_B"):
        assert torch.equal(getattr(found, name), getattr(samples, name)), name


def test_what_comes_back_can_be_written_to() -> None:
    """Each value has memory of its own: what is done to one does not show in the other."""
    data = serialize(torch.zeros(3))
    deserialize(data.copy()).add_(1)
    assert deserialize(data).tolist() == [0.0, 0.0, 0.0]


def test_arrays_and_parts_of_storages() -> None:
    """Of a view only its own elements travel: 3 of a million."""
    data = serialize((np.arange(5), torch.zeros(10**6)[3:6]))
    assert data.size < 1000
    array, view = deserialize(data)
    assert array.tolist() == [0, 1, 2, 3, 4] and view.tolist() == [0.0] * 3


def test_frames_by_hand() -> None:
    parts = [np.frombuffer(bytearray(text), np.uint8) for text in (b"abc", b"", b"0123456789")]
    whole = frame(parts)
    # 4 numbers of 8 bytes, then each part at the next multiple of 64
    assert whole.size == 64 + 64 + 10 and ALIGN == 64
    assert whole[:32].view(np.int64).tolist() == [3, 3, 0, 10]
    assert [part.tobytes() for part in unframe(whole)] == [b"abc", b"", b"0123456789"]
    assert [part.tobytes() for part in unframe(unframe(frame([whole, parts[0]]))[0])] == [b"abc", b"", b"0123456789"]
    assert unframe(frame([])) == []
