"""A loss of one's own is tried before the job starts: whatever it raises, or returns that no update can take, is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aligner.check.loop_settings import settings_of

LOSSES = """
import torch

def fine(policy_logp_BT, *, mask_BT, advantage_B):
    return -policy_logp_BT * advantage_B[:, None], {"gain": policy_logp_BT.detach()}

def of_rows(score_B, *, mask_BT, **more):
    return -score_B, {}

def in_fours(policy_logp_BT, *, mask_BT):
    return -policy_logp_BT.view(-1, 4, policy_logp_BT.shape[1]).sum(0).repeat(2, 1), {}
in_fours.rows_together = 4

def typing_error(policy_logp_BT, *, mask_BT):
    return policy_logp_BT.man(), {}

def wrong_shape(policy_logp_BT, *, mask_BT, advantage_B):
    return policy_logp_BT * advantage_B, {}

def undefined(policy_logp_BT, *, mask_BT):
    return logp_BT, {}

def unpacks(policy_logp_BT, *, mask_BT):
    first, second, third = policy_logp_BT.shape
    return policy_logp_BT, {}

def exits(policy_logp_BT, *, mask_BT):
    assert policy_logp_BT.is_cuda, "made for a GPU"

def no_metrics(policy_logp_BT, *, mask_BT):
    return -policy_logp_BT

def reduced(policy_logp_BT, *, mask_BT):
    return -policy_logp_BT.mean(), {}

def metric_of_no_row(policy_logp_BT, *, mask_BT):
    return -policy_logp_BT, {"kl": policy_logp_BT.mean()}

def metric_that_is_a_number(policy_logp_BT, *, mask_BT):
    return -policy_logp_BT, {"kl": 0.5}

def without_gradient(policy_logp_BT, *, mask_BT):
    return -policy_logp_BT.detach(), {}

def of_its_loop(policy_logp_BT, *, mask_BT, schedule):
    return schedule(policy_logp_BT), {}

def on_a_gpu(policy_logp_BT, *, mask_BT):
    raise RuntimeError("no GPU")
on_a_gpu.tried = False
"""


def loop(roles: Any, batches: Any, cfg: Any) -> Any:
    """One without a dataclass of settings."""
    yield


def built(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (folder / "own_losses.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(str(folder))
    return settings_of(loop, {"loss": {"_target_": f"own_losses.{name}", "_partial_": True}}).loss


@pytest.mark.parametrize("name", ["fine", "of_rows", "in_fours", "of_its_loop", "on_a_gpu"])
def test_a_loss_that_an_update_can_take_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(built(name, tmp_path, monkeypatch))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "typing_error",
            r"algorithm\.loss, tried on 2 rows of 3 tokens, raised AttributeError at .*own_losses.py:\d+: .*man",
        ),
        ("wrong_shape", r"raised RuntimeError at .*own_losses.py:\d+: The size of tensor"),
        ("undefined", r"raised NameError at .*own_losses.py:\d+: name 'logp_BT'"),
        ("unpacks", r"algorithm\.loss, tried on .* raised ValueError at .*own_losses.py:\d+: not enough values"),
        ("exits", r"raised AssertionError .*made for a GPU .*tried = False"),
        ("no_metrics", r"algorithm\.loss returned Tensor; it must return \(loss, metrics\)"),
        ("reduced", r"the loss is of shape \[\] for \[2, 3\] inputs; it must return .*not reduced"),
        ("metric_of_no_row", r"kl is of shape \[\] for \[2, 3\]"),
        ("metric_that_is_a_number", r"kl is a float for \[2, 3\]"),
        ("without_gradient", r"the loss has no gradient"),
    ],
)
def test_a_loss_that_cannot_train_is_named(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=said):
        built(name, tmp_path, monkeypatch)
