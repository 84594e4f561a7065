"""A rank of a world as a job on GPUs makes it, host and device apart: trains small policies, and writes what it did as JSON.

    torchrun ... -m tests.standins.mixed_world CASES device

CASES: JSON, a list of {model, layout} and settings of the policy. With `host` for `device`, the same on the host alone. A last argument puts
one of `MISTAKES` in.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.attention.bias import CausalBias

from aligner.reshard.local import WritableLocalWeights
from aligner.trainer.output_blocks import BLOCK_LOGITS
from tests.standins import device as standin


class Destination(WritableLocalWeights):
    """A model's weights, to be written."""

    def __init__(self, weights: Any) -> None:
        super().__init__(weights.pieces(), weights.view)
        self._whole = weights.layout

    @property
    def layout(self) -> Any:
        return self._whole


def world_of_devices() -> Any:
    """`World` as it is made for CUDA, with the stand-in for the GPU and gloo for NCCL."""
    from aligner.spmd import world as module

    start = dist.init_process_group

    def with_gloo(backend: str, **settings: Any) -> None:
        assert backend == "cpu:gloo,cuda:nccl", backend
        start(f"cpu:gloo,{standin.NAME}:gloo", **settings)

    torch_of_world = types.SimpleNamespace(
        device=lambda kind, index=0: torch.device(standin.NAME if kind == "cuda" else kind, 0),
        cuda=types.SimpleNamespace(set_device=lambda device: None),
    )
    with (
        patch.object(module, "check_device", lambda: "cuda"), patch.object(module, "torch", torch_of_world),
        patch.object(module, "DeviceClock", lambda device: None), patch.object(dist, "init_process_group", with_gloo),
    ):  # fmt: skip
        return module.World(100)


def train(world: Any, name: str, case: dict[str, Any], waits: Mapping[str, int]) -> dict[str, Any]:
    """Log-probabilities; two updates, each of several microbatches; the weights into another layout; log-probabilities of that."""
    from aligner.models.read_spec import read_spec
    from aligner.reshard.config import ReshardConfig
    from aligner.reshard.sync import WeightSync
    from aligner.spmd.mesh import Mesh
    from aligner.trainer.config import OptimizerConfig, PolicyConfig
    from aligner.trainer.policy import Policy
    from tests.trainer.megatron.optimizer_on_ranks import batch, imitate

    config = PolicyConfig(
        micro_tokens=18,
        recompute="full",
        experts=case.get("experts", "sequential"),
        overlap_grad_reduce=case.get("overlap_grad_reduce", False),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    ranks, spec = tuple(range(world.size)), read_spec(case["model"])
    policy = Policy(name, world, Mesh(ranks, name="policy", **case["layout"]), spec, config)
    rows = policy.scatter(batch())
    before = policy.logprobs(rows).gather()
    reports = [policy.update(imitate, rows).gather()]
    waited = -sum(waits.values())
    reports.append(policy.update(imitate, rows).gather())
    waited += sum(waits.values())
    numbers = [float(before.sum()), *[report[key] for report in reports for key in ("loss", "grad_norm")]]
    other = Policy(f"{name}, other", world, Mesh(ranks, name="policy", pipeline=2), spec, config)
    WeightSync(world, policy.weights, Destination(other.weights), ReshardConfig()).run()
    moved = [role.logprobs(role.scatter(batch())).gather() for role in (policy, other)]
    numbers.append(float((moved[0] - moved[1]).abs().max()))
    weight = policy.weights.view(policy.weights.pieces()[0])
    return {"numbers": [*numbers, float(moved[0].sum())], "device": weight.device.type, "waits": waited}


def tokens_on_the_host() -> Any:
    from aligner.trainer.megatron import engine

    plain = engine.pack
    return patch.object(engine, "pack", lambda *given: plain(*given[:3], torch.device("cpu"), *given[4:]))


MISTAKES = {"tokens on the host": tokens_on_the_host}


def main() -> None:
    cases, ranks_of = json.loads(sys.argv[1]), {}
    done = []
    mistake = MISTAKES[sys.argv[3]]() if sys.argv[3:] else contextlib.nullcontext()
    if sys.argv[2] == "host":
        from aligner.spmd.world import World

        world = World(100)
        done = [train(world, str(number), case, {}) for number, case in enumerate(cases)]
    else:
        standin.install()
        BLOCK_LOGITS[standin.NAME] = BLOCK_LOGITS["cuda"]
        device = standin.Device()
        world = world_of_devices()
        causal_bias = patch.object(CausalBias, "__new__", standin.without(CausalBias))
        with device, standin.cuda_in_megatron(), causal_bias, mistake:
            for number, case in enumerate(cases):
                device.log = standin.Log()
                one = train(world, str(number), case, device.log.waits)
                ranks_of = {group.group_name: ranks for ranks, group in world._groups.items() if world.rank in ranks}
                ranks_of[dist.group.WORLD.group_name] = tuple(range(world.size))
                used = sorted({(name, ranks_of[group], kind) for name, group, kind in device.log.collectives})
                done.append({**one, "collectives": used})
    Path(f"{world.rank}.json").write_text(json.dumps(done))
    world.leave()


if __name__ == "__main__":
    main()
