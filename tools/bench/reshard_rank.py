"""One rank of tools/bench/reshard.py: CASE FOLDER REPEATS ENGINE OUT."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from megatron.core.resharding import build_centralized_reshard_plan, execute_reshard_plan, get_or_create_service
from torch import Tensor

from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.tensors import logical_tensors, parameter_count
from aligner.reshard.config import ReshardConfig
from aligner.reshard.local import TensorWeights
from aligner.reshard.message.bucket import Buffers
from aligner.reshard.message.storage import allocate, strided_view
from aligner.reshard.plan.region import Piece, contiguous_stride
from aligner.reshard.plan.schedule import Message
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.transfer.executor import execute, schedule_for
from aligner.rollout.config import RolloutConfig
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.layout import EngineLayout
from aligner.rollout.vllm.weights import EngineWeights
from aligner.spmd.mesh import Mesh
from aligner.spmd.shared_memory import connect
from aligner.trainer.megatron.cpu import install as patch_megatron
from aligner.trainer.megatron.groups import make_groups, prepare_megatron
from aligner.trainer.megatron.layout import MegatronLayout
from aligner.trainer.megatron.model import build_model
from tools.bench.reshard import CASES, median_of_slowest

CPU = torch.device("cpu")
BUCKET_BYTES = ReshardConfig().bucket_bytes


class Bench:
    """One case on this rank: both sides, their storages, and every way from one to the other."""

    def __init__(self, case: Any, spec: ModelSpec) -> None:
        self.spec, self.rank, self.world = spec, dist.get_rank(), dist.get_world_size()
        self.shapes = logical_tensors(spec)
        ranks = tuple(range(self.world))
        self.train_mesh = Mesh(ranks, **case.train, name="policy")
        self.infer_mesh = Mesh(ranks, tensor=case.infer, name="rollout")
        self.train = MegatronLayout(spec, self.train_mesh, "float32")
        self.infer = EngineLayout(spec, self.infer_mesh, "float32")
        self.source_layout, self.layout = self.train.layout(self.rank), self.infer.layout(self.rank)
        self.source, self.out = allocate(self.source_layout, CPU), allocate(self.layout, CPU)
        for piece in self.source_layout:
            strided_view(self.source[piece.storage], piece).copy_(truth(piece, self.shapes[piece.name]))
        self.plan = plan_transfer(self.rank, self.train, self.infer)
        self.tensor_group = group_of(self.rank, self.train_mesh.groups("tensor"))
        self.everyone = dist.new_group(list(ranks))
        self.channel = connect(self.everyone, "reshard")
        self.buffers = Buffers(CPU, self.channel)  # kept, as a job keeps them
        self.messages = Buffers(CPU)
        self.shared_schedule = schedule_for(self.plan, BUCKET_BYTES, self.buffers)
        self.schedule = schedule_for(self.plan, BUCKET_BYTES, self.messages)
        self._raw = self._raw_buffers()

    def view(self, piece: Piece) -> Tensor:
        return strided_view(self.source[piece.storage], piece)

    def ours(self, verify: bool, destination: Any = None, shared: bool = True) -> Any:
        target = destination or TensorWeights(self.out, self.layout)
        buffers, schedule = (self.buffers, self.shared_schedule) if shared else (self.messages, self.schedule)
        return execute(
            self.plan, self.view, target, self.everyone, CPU, BUCKET_BYTES, verify, buffers=buffers, schedule=schedule
        )

    def check(self) -> None:
        """Assert that the received weights equal those sent, then zero them."""
        for piece in self.layout:
            received = strided_view(self.out[piece.storage], piece)
            assert torch.equal(received, truth(piece, self.shapes[piece.name])), f"{piece.name}{piece.box}"
        for tensor in self.out.values():
            tensor.zero_()

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint, complete, on every rank: gathered over its tensor ranks, then broadcast."""
        for name, shape in self.shapes.items():
            holders = self.train.holders(name)
            owners = sorted({rank for _, ranks in holders for rank in ranks})
            full = torch.empty(shape)
            if self.rank in owners:
                own_pieces = [piece for piece in self.source_layout if piece.name == name]
                flat = torch.cat([self.view(piece).reshape(-1) for piece in own_pieces])
                peers = dist.get_process_group_ranks(self.tensor_group)
                parts = [flat]
                if flat.numel() < full.numel():
                    parts = [torch.empty_like(flat) for _ in peers]
                    dist.all_gather(parts, flat, group=self.tensor_group)
                for peer, part in zip(peers, parts, strict=False):
                    peer_pieces = [piece for piece in self.train.layout(peer) if piece.name == name]
                    for piece, values in zip(
                        peer_pieces, part.split([piece.elements for piece in peer_pieces]), strict=True
                    ):
                        full[box(piece)] = values.view(piece.size)
            if len(owners) < self.world:
                dist.broadcast(full, owners[0], group=self.everyone)
            yield name, full

    def gather(self) -> None:
        pieces_by_name: dict[str, list[Piece]] = {}
        for piece in self.layout:
            pieces_by_name.setdefault(piece.name, []).append(piece)
        for name, full in self.full_tensors():
            for piece in pieces_by_name.get(name, ()):
                strided_view(self.out[piece.storage], piece).copy_(full[box(piece)])

    def limit(self, wire: bool = True) -> None:
        """The bytes of the plan, and nothing else: pack and unpack are plain copies of whole messages."""
        sends, receives, staged, arrived, local_from, local_to = self._raw
        for to, message in sends.items():
            staged[to].copy_(message)
        posts = [dist.P2POp(dist.irecv, arrived[by], by, self.everyone) for by in sorted(arrived)]
        posts += [dist.P2POp(dist.isend, staged[to], to, self.everyone) for to in sorted(staged)]
        for request in dist.batch_isend_irecv(posts) if wire and posts else ():
            request.wait()
        for by, message in arrived.items():
            receives[by].copy_(message)
        local_to.copy_(local_from)

    def _raw_buffers(self) -> tuple[Any, ...]:
        schedule = self.schedule
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()

        def bytes_of(message: Message) -> int:
            return sum(item.bytes for item in schedule.items(message))

        for step in schedule.steps:
            if step.send:
                sent[step.send.receiver] += bytes_of(step.send)
            if step.receive:
                received[step.receive.sender] += bytes_of(step.receive)

        def bytes_(counts: dict[int, int]) -> dict[int, Tensor]:
            return {peer: torch.ones(count, dtype=torch.uint8) for peer, count in counts.items()}

        local = self.plan.local_bytes
        return (
            bytes_(sent), bytes_(received), bytes_(sent), bytes_(received),
            torch.ones(local, dtype=torch.uint8), torch.ones(local, dtype=torch.uint8),
        )  # fmt: skip


def truth(piece: Piece, shape: tuple[int, ...]) -> Tensor:
    """What the region of the tensor holds: as large as weights are, and neighbours in no order that repeats soon."""
    indices = torch.full(piece.size, sum(piece.name.encode()), dtype=torch.int64)
    for dim, step in enumerate(contiguous_stride(shape)):
        view = [1] * len(shape)
        view[dim] = piece.size[dim]
        indices += step * (torch.arange(piece.size[dim]) + piece.lo[dim]).view(view)
    return (indices * 48271 % 8191).float() / 81910 - 0.05


def box(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))


def group_of(rank: int, groups: Any) -> Any:
    """The group of `groups` that holds `rank`; collective."""
    groups_by_ranks = [(ranks, dist.new_group(list(ranks))) for ranks in groups]
    return next(group for ranks, group in groups_by_ranks if rank in ranks)


def extra_bytes(run: Callable[[], object]) -> int:
    """Most memory that `run` had resident beyond what there was before, sampled each millisecond."""
    page = 4096
    statm = Path("/proc/self/statm")
    resident = lambda: int(statm.read_text().split()[1]) * page  # noqa: E731
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return max(0, most[0] - before)


def megatron_way(bench: Bench) -> Callable[[], object]:
    """megatron.core.resharding between two Megatron models of the two layouts; checks its result once."""
    models = []
    world = SimpleNamespace(rank=bench.rank, my_group=lambda groups: group_of_any(bench.rank, groups))
    for mesh in (bench.train_mesh, Mesh(bench.infer_mesh.ranks, tensor=bench.infer_mesh.tensor, name="policy")):
        groups = make_groups(world, mesh)
        models.append(build_model(bench.spec, mesh, bench.rank, groups, CPU, "float32", False))
    source, target = models
    for piece in source.pieces():
        source.view(piece).copy_(truth(piece, bench.shapes[piece.name]))
    service = get_or_create_service("gloo")
    plan = build_centralized_reshard_plan(source.chunks[0], target.chunks[0], num_experts=None)

    def run() -> None:
        execute_reshard_plan(plan, source.chunks[0], target.chunks[0], service)

    run()
    for piece in target.pieces():
        assert torch.equal(target.view(piece), truth(piece, bench.shapes[piece.name])), f"megatron: {piece.name}"
    return run


def group_of_any(rank: int, groups: Any) -> Any:
    groups_by_ranks = [(ranks, dist.new_group(list(ranks))) for ranks in groups]
    return next((group for ranks, group in groups_by_ranks if rank in ranks), None)


class Unread:
    """An engine whose storages are verified, but not the kernels that it packs from them."""

    def __init__(self, weights: EngineWeights) -> None:
        self._weights, self.view, self.finish = weights, weights.view, weights.finish
        self.writing = weights.writing

    def written(self, pieces: Sequence[Piece], proof: bool) -> None:
        self._weights.written(pieces, proof=False)


def engine_ways(bench: Bench, folder: str) -> dict[str, Callable[[], object]]:
    """A real engine as the destination: ours, and full tensors through the engine's own loader."""
    group = group_of(bench.rank, bench.infer_mesh.groups("tensor"))
    engine = VllmEngine(folder, group, f"bench-{bench.rank}", RolloutConfig(max_model_len=256, kv_cache_mib=16), CPU)
    weights = EngineWeights(engine)
    weights.pieces()
    runner = engine._worker.model_runner

    def reload() -> None:
        with engine.inside():
            runner.reload_weights(weights_iterator=((name, whole) for name, whole in bench.full_tensors()))

    return {
        "ours": lambda: bench.ours(True, weights),
        "ours, kernels not read": lambda: bench.ours(True, Unread(weights)),
        "ours without proof": lambda: bench.ours(False, weights),
        "gather + reload_weights": reload,
    }


def main(name: str, folder: str, repeats: str, engine: str, out: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    patch_megatron()
    prepare_megatron()
    bench = Bench(CASES[name], read_spec(folder))
    if int(engine):
        ways = engine_ways(bench, folder)
    else:
        bench.ours(True)
        bench.check()
        bench.gather()
        bench.check()
        ways = {
            "ours": lambda: bench.ours(True),
            "ours without proof": lambda: bench.ours(False),
            "ours over gloo": lambda: bench.ours(True, shared=False),
            "limit": bench.limit,
            "copies alone": lambda: bench.limit(wire=False),
            "gather": bench.gather,
        }
        if not CASES[name].experts:
            ways["megatron"] = megatron_way(bench)
    bench.buffers = Buffers(CPU, connect(bench.everyone, "reshard"))  # what they take is extra memory
    extra = extra_bytes(ways["ours"])
    seconds = median_of_slowest(ways, int(repeats))
    counts = torch.tensor([bench.schedule.sent_bytes, bench.plan.minimum_bytes, bench.plan.local_bytes])
    dist.all_reduce(counts)
    most = torch.tensor(extra)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if bench.rank == 0:
        moved, minimum, local = counts.tolist()
        figures = {
            "parameters": parameter_count(bench.spec), "moved": moved, "minimum": minimum, "local": local,
            "extra": int(most), "bucket": BUCKET_BYTES, "seconds": seconds,
        }  # fmt: skip
        Path(out).write_text(json.dumps(figures))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo may abort in its destructors


if __name__ == "__main__":
    main(*sys.argv[1:])
