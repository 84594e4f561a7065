"""Plan a weight transfer between two parallel layouts offline: bytes moved per rank and estimated duration.

python tools/reshard_check.py --model CONFIG.json_or_folder --train tp=8,pp=16,dp=4 --infer tp=16,replicas=32
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.tensors import logical_tensors, parameter_count
from aligner.paths import path_option
from aligner.reshard.config import ReshardConfig
from aligner.reshard.plan.duration import schedule_seconds
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.reshard.plan.schedule import make_schedule
from aligner.reshard.plan.traffic_model import Load, TrafficModel, make_traffic_model
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.rollout.config import RolloutConfig
from aligner.rollout.vllm.layout import EngineLayout
from aligner.rollout.vllm.sizes import check_runs
from aligner.spmd.mesh import Mesh
from aligner.trainer.megatron.layout import MegatronLayout

BUCKET_BYTES = ReshardConfig().bucket_bytes
LATENCY = 20e-6
"""Seconds from a message's start to its first byte."""
SIMULATED_RANKS = 64
SHOWN = 16
TRAIN_KEYS = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert", "etp": "expert_tensor", "dp": "data"}
TRAIN_KEYS |= {"vpp": "virtual_pipeline", "stages": "stage_layers"}
INFER_KEYS = {"tp": "tensor", "pp": "pipeline", "ep": "expert", "replicas": "data"}


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/reshard_check.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=path_option, required=True, help="a config.json, or the folder it is in")
    parser.add_argument("--train", required=True, help=f"{', '.join(TRAIN_KEYS)}; stages=12+13+... if uneven")
    parser.add_argument("--infer", required=True, help=", ".join(INFER_KEYS))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--disjoint", action="store_true", help="inference on separate ranks (the default)")
    where.add_argument("--colocated", action="store_true", help="both roles from rank 0 on")
    parser.add_argument("--gbps", type=float, default=50.0, help="each rank's link, GB/s each way (50: 400 Gb/s)")
    parser.add_argument(
        "--ranks", default="8", help="number of ranks whose planning time is measured one by one, or all"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=list(ELEMENT_BYTES))
    parsed = parser.parse_args(arguments)
    try:
        with ExitStack() as stack:
            check(parsed, stack)
    except ValueError as error:
        sys.stderr.write(f"error: {_with_option_names(str(error))}\n")
        return 2
    return 0


def _with_option_names(error: str) -> str:
    """Replace a job's settings in an error by this tool's options."""
    for role, option, keys in (("train", "train", TRAIN_KEYS), ("infer|rollout", "infer", INFER_KEYS)):
        for key, name in keys.items():
            error = re.sub(rf"placement\.({role})\.{name}\b", f"--{option} {key}", error)
    return re.sub(r"stages=\[([\d, ]+)\]", lambda match: f"stages={match[1].replace(', ', '+')}", error)


def check(parsed: argparse.Namespace, stack: ExitStack) -> None:
    """Plan and print. Raises ValueError for layouts that do not fit."""
    spec = read_spec(_folder(Path(parsed.model), stack))
    if parsed.gbps <= 0:
        raise ValueError(f"--gbps={parsed.gbps} must be above 0.")
    train = _mesh("train", parsed.train, TRAIN_KEYS, 0)
    infer = _mesh("infer", parsed.infer, INFER_KEYS, 0 if parsed.colocated else train.size)
    if infer.expert not in (1, infer.tensor):
        raise ValueError(
            f"--infer ep={infer.expert}: the engine spreads experts over all tensor ranks or none; use 1 or {infer.tensor}."
        )
    check_runs(RolloutConfig(), spec, infer.tensor, False, infer.expert > 1, infer.pipeline)

    def layouts() -> tuple[MegatronLayout, EngineLayout]:
        return MegatronLayout(spec, train, parsed.dtype), EngineLayout(spec, infer, parsed.dtype, infer.expert > 1)

    sample = _sample(parsed.ranks, sorted({*train.ranks, *infer.ranks}))
    model = make_traffic_model(*layouts(), logical_tensors(spec), 2 * BUCKET_BYTES, _progress)
    seconds = _plan_each(layouts, sample)
    parameters, size = parameter_count(spec), _gb(_bytes(spec, parsed.dtype))
    print(f"model: {spec.family}, {parameters:,} parameters, {size} in {parsed.dtype}")
    print(f"train: {_ranks_text(train, parsed.train)}\ninfer: {_ranks_text(infer, parsed.infer)}\n")
    print(_table(model, train, infer))
    print(_summary(model, train, infer, parsed.gbps))
    if len(model.loads) <= SIMULATED_RANKS:
        print(_simulated(*layouts(), parsed.gbps))
    print(
        f"planning:       {max(seconds.values()):.2f} s at most on a rank, of {len(seconds)} ranks planned one by one"
    )


def _simulated(source: MegatronLayout, destination: EngineLayout, speed: float) -> str:
    """The messages in their order, each waiting for its turn at both of its ends."""
    ranks = sorted({*source.ranks, *destination.ranks})
    schedules = {rank: make_schedule(plan_transfer(rank, source, destination), 2 * BUCKET_BYTES) for rank in ranks}
    seconds = schedule_seconds(schedules, speed * 1e9, LATENCY)
    return (
        f"in turn:        {seconds:.3f} s with every message waiting for its turn, {LATENCY * 1e6:.0f} us each to start"
    )


def _folder(model: Path, stack: ExitStack) -> Path:
    """The folder of the model; a JSON file of another name is taken as the config.json of one."""
    if model.is_file() and model.name != "config.json":
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shutil.copy(model, folder / "config.json")
        return folder
    return model.parent if model.is_file() else model


def _mesh(role: str, text: str, keys: Mapping[str, str], first: int) -> Mesh:
    """The role's ranks from `first` on."""
    sizes: dict[str, int] = dict.fromkeys(("tensor", "pipeline", "context", "data"), 1)
    stages: tuple[int, ...] = ()
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        numbers = value.split("+") if key == "stages" else [value]
        if key not in keys or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(
                f"--{role} has {part.strip()!r}; use key=number, separated by commas, of {', '.join(keys)}."
            )
        if key == "stages":
            stages = tuple(map(int, numbers))
        else:
            sizes[keys[key]] = int(value)
    ranks = sizes["tensor"] * sizes["pipeline"] * sizes["context"] * sizes.pop("data")
    return Mesh(tuple(range(first, first + ranks)), name=role, stage_layers=stages, **sizes)  # type: ignore[arg-type]


def _sample(text: str, ranks: list[int]) -> list[int]:
    """Which ranks to plan: spread over all, the first and the last included."""
    if text == "all":
        return ranks
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--ranks={text!r} must be a number above 0, or all.")
    count = min(int(text), len(ranks))
    return sorted({ranks[number * (len(ranks) - 1) // max(1, count - 1)] for number in range(count)})


def _plan_each(layouts: Callable[[], tuple[MegatronLayout, EngineLayout]], ranks: list[int]) -> dict[int, float]:
    """Seconds of each rank that starts with nothing, as in a job."""
    seconds = {}
    for number, rank in enumerate(ranks):
        _progress(number, len(ranks))
        started = time.perf_counter()
        plan_transfer(rank, *layouts())
        seconds[rank] = time.perf_counter() - started
    return seconds


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\rplanning {done + 1} of {of} ranks ...\x1b[K" + ("\r\x1b[K" if done + 1 == of else ""))


def _table(model: TrafficModel, train: Mesh, infer: Mesh) -> str:
    """All ranks where there are few, else the least, mean and most of each role."""
    rows = [["rank", "sends", "passes on", "receives", "copies"]]
    loads = model.loads
    if len(loads) <= SHOWN:
        rows += [[str(rank), *_cells(load)] for rank, load in loads.items()]
    else:
        for role, ranks in {"train": train.ranks, "infer": infer.ranks}.items():
            values = [_numbers(loads[rank]) for rank in ranks]
            for name, of in {"min": min, "mean": mean, "max": max}.items():
                rows.append([f"{role} {name}", *(_gb(of(column)) for column in zip(*values, strict=True))])  # type: ignore[operator]
            heaviest = max(ranks, key=lambda rank: max(loads[rank].out, loads[rank].received))
            rows.append([f"{role}: rank {heaviest}", *_cells(loads[heaviest])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _summary(model: TrafficModel, train: Mesh, infer: Mesh, speed: float) -> str:
    loads = model.loads
    moved, least = sum(load.out for load in loads.values()), sum(load.received for load in loads.values())
    seconds = max(max(load.out, load.received) for load in loads.values()) / speed / 1e9
    bound = max(max(load.received for load in loads.values()), model.heaviest_lower_bound) / speed / 1e9
    return "\n".join(
        [
            f"moved:          {_gb(moved)}, the least possible {_gb(least)}",
            f"heaviest train: {_heaviest({rank: loads[rank].sent for rank in train.ranks}, model.heaviest_lower_bound)}",
            f"heaviest infer: {_heaviest({rank: loads[rank].relayed for rank in infer.ranks}, 0)}",
            f"time:           {seconds:.3f} s at {speed:g} GB/s each way (no plan takes less than {bound:.3f} s)",
        ]
    )


def _heaviest(sent: Mapping[int, int], least: float) -> str:
    busy = [amount for amount in sent.values() if amount]
    if not busy:
        return "nothing to send"
    rank = max(sent, key=lambda rank: sent[rank])
    average = mean(busy)
    text = f"rank {rank} sends {_gb(sent[rank])}, {sent[rank] / average:.3f} x the mean of the {len(busy)} that send"
    return text + (f" (the layout allows no less than {max(1.0, least / average):.3f})" if least else "")


def _numbers(load: Load) -> tuple[int, ...]:
    return load.sent, load.relayed, load.received, load.local


def _cells(load: Load) -> list[str]:
    return [_gb(number) for number in _numbers(load)]


def _gb(count: float) -> str:
    """Bytes as people read them; small numbers exactly."""
    return f"{count / 1e9:,.3f} GB" if count >= 1e6 else f"{count:,.0f} B"


def _bytes(spec: ModelSpec, dtype: str) -> int:
    return parameter_count(spec) * ELEMENT_BYTES[dtype]


def _ranks_text(mesh: Mesh, text: str) -> str:
    return f"{mesh.size} ranks ({mesh.ranks[0]}-{mesh.ranks[-1]}), {text}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
