"""The job of test_replicas.py: rank 0 holds the weights and makes no engine; ranks 1 and 2 are the replicas.

First one TP2 replica, then, in the same processes, two TP1 replicas, then a tied model over TP2. The weights travel by
the real plan and executor.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from aligner.reshard.plan.region import Piece, whole_tensor
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.transfer.executor import execute
from aligner.rollout.config import Sampling
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.weights import EngineWeights
from tests.rollout import tiny

SOURCE, WORLD = 0, 3
SAMPLINGS = (
    Sampling(temperature=0.0, max_tokens=20, stop_token_ids=()),
    Sampling(temperature=1.0, max_tokens=20, stop_token_ids=()),
)


def main() -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == WORLD
    untied, tied = (_read(path) for path in sys.argv[1:])
    together = _phase(sys.argv[1], untied, [[1, 2]])
    apart = _phase(sys.argv[1], untied, [[1], [2]])
    assert apart == together, "samples depend on the layout of the replicas"
    sampled = (together, _phase(sys.argv[2], tied, [[1, 2]]))
    everywhere: list[Any] = [None] * WORLD
    dist.all_gather_object(everywhere, sampled)
    assert everywhere[1] == everywhere[2], "ranks of a replica disagree"
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"test-{os.getppid()}")]
    print("replicas: ok", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def _read(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _phase(path: str, model: Any, layout: Sequence[Sequence[int]]) -> list[list[list[int]]] | None:
    """Start the replicas, move weights twice, check against transformers; the sampled tokens."""
    rank = dist.get_rank()
    groups = {ranks[0]: dist.new_group(list(ranks)) for ranks in layout}
    mine = next((ranks for ranks in layout if rank in ranks), None)
    engine = weights = None
    if mine is not None:
        first = mine[0]
        engine = RolloutEngine(path, groups[first], f"test-{os.getppid()}", tiny.CONFIG, torch.device("cpu"))
        weights = EngineWeights(engine)
    torch.manual_seed(5)
    tiny.randomize(model)
    _move(model, weights)
    torch.manual_seed(6)
    tiny.randomize(model)
    _move(model, weights)
    _world_still_works()
    tokens = _check(engine, model) if engine is not None else None
    if engine is not None:
        engine.close()
    _world_still_works()
    return tokens


def _move(model: Any, weights: EngineWeights | None) -> None:
    found = tiny.tensors(model)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    wanted: list[Piece] = weights.pieces() if weights is not None else []
    gathered: list[Any] = [None] * WORLD
    dist.all_gather_object(gathered, wanted)
    held = [whole_tensor(name, shape, "float32") for name, shape in shapes.items()]
    plan = plan_transfer(
        dist.get_rank(), {SOURCE: held}, {rank: pieces for rank, pieces in enumerate(gathered) if pieces}
    )
    row = execute(plan, lambda piece: tiny.cut(found, piece), weights, dist.group.WORLD, torch.device("cpu"), 1 << 16)
    assert row.received_bytes == row.minimum_bytes
    assert (row.checksummed > 0) == (weights is not None)


def _check(engine: RolloutEngine, model: Any) -> list[list[list[int]]]:
    asked = tiny.prompts(5)
    found = []
    for sampling in SAMPLINGS:
        groups = engine.generate(asked, [100 * index for index in range(5)], sampling, 2)
        for prompt, group in zip(asked, groups, strict=True):
            assert max(tiny.gap(model, prompt, one) for one in group) < 1e-4
            if sampling.temperature == 0:
                assert group[0].tokens == tiny.greedy(model, prompt, 20)
        found.append([one.tokens for group in groups for one in group])
    return found


def _world_still_works() -> None:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    assert total.item() == sum(range(WORLD))
    pair = dist.new_group([0, 2])  # names of later groups agree on all ranks
    if dist.get_rank() in (0, 2):
        dist.all_reduce(total, group=pair)
        assert total.item() == 2 * sum(range(WORLD))
    dist.barrier()


if __name__ == "__main__":
    main()
