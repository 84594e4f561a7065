"""Ten minutes on one GPU: whether what was written for CUDA computes what the CPU does, and how fast. Prints a table, writes JSON.

    python tools/bench/gpu_check.py                        all parts on a GPU, at the sizes of a 0.6B model
    python tools/bench/gpu_check.py --device cpu           the same parts at tiny sizes, to know that they work
    python tools/bench/gpu_check.py --parts attention,adam --limit 120 --json runs/gpu.json

Each part is a process of its own with a time limit, so that one that fails or hangs costs the others nothing. A part compares with
a reference and fails beyond a bound; every number that it reports stands in the table. The exit status is that of the parts.

    kernels    weight messages: packed, cast and landed bit for bit, a flipped bit found, GB/s
    fp8        weights cast to FP8 blocks bit for bit as on a CPU, GB/s
    offload    optimizer state to the host and back, bit for bit while the stream is busy, GB/s
    attention  varlen and lower-right attention with shared prefixes against float64, forward and backward, ms
    experts    experts in one kernel against one after the other, forward and backward, ms
    adam       AdamW fused against foreach: the same step, ms, MiB of temporaries
    draws      the engine's seeded draws, one generator for each request, ms a step
    policy     Policy of a random Qwen3: log-probabilities against transformers, updates by recompute, MiB, tokens/s, FLOP/s
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # from a checkout that is not installed too
Numbers = dict[str, Any]


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The fastest of several, once the device is done."""
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def check(name: str, value: float, bound: float) -> float:
    """The value, where it keeps within its bound."""
    if not value <= bound:
        raise AssertionError(f"{name} is {value:.3g}, more than {bound:.3g}")
    return value


def kernels(device: torch.device, tiny: bool) -> Numbers:
    """A bucket of matrices from float32 to bfloat16."""
    from tools.bench.reshard_kernels import _Case

    numbers: Numbers = {}
    for shards, columns in ((1, 4096), (4, 1024)):
        case = _Case(2 if tiny else 256, "bfloat16", shards, columns, device)
        pack = partial(case.bucket.pack, case.view, True)
        land = partial(case.bucket.unpack, case.view, 0, 1, True)
        numbers[f"pack GB/s, {shards} slices"] = case.bytes / seconds(pack, device) / 1e9
        numbers[f"land GB/s, {shards} slices"] = case.bytes / seconds(land, device) / 1e9
        equal = torch.equal(case.tensors["to"], case.tensors["from"].to(torch.bfloat16))
        check("what differs from torch's cast", float(not equal), 0)
        case.bucket.words[-7] ^= 1 << 13
        try:
            land()
        except RuntimeError:
            continue
        raise AssertionError("a flipped bit was not found")
    return numbers


def fp8(device: torch.device, tiny: bool) -> Numbers:
    """The cast of rollout.quantization=fp8, against torch's own operations on the CPU."""
    from aligner.reshard.message.quantize import quantize_blocks, quantize_by_torch

    weight = 0.02 * torch.randn((256, 384) if tiny else (8192, 4096), dtype=torch.bfloat16)
    weight[:, :3] *= 1e-4
    expected, expected_scales = quantize_by_torch(weight)
    held = weight.to(device)
    made, scales = quantize_blocks(held)
    off = int((made.cpu().view(torch.uint8) != expected.view(torch.uint8)).sum())
    check("weights with other bits", off + int((scales.cpu() != expected_scales).sum()), 0)
    cast = seconds(lambda: quantize_blocks(held), device)
    return {"bits off": off, "cast GB/s": weight.nbytes / cast / 1e9}


def offload(device: torch.device, tiny: bool) -> Numbers:
    """Moments of an optimizer, with kernels ahead of the copies."""
    from aligner.trainer.offload import Offloaded

    tensors = [torch.randn(1 << (12 if tiny else 24), device=device) for _ in range(16)]
    kept, size = [tensor.cpu() for tensor in tensors], sum(tensor.nbytes for tensor in tensors)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    part, best = Offloaded(lambda: tensors, stream), {"out": float("inf"), "in": float("inf")}
    for turn in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            if turn == 3:  # the copies must wait for what computes
                torch.cuda._sleep(100_000_000)
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.add_(1.0)
            value.add_(1.0)
        part.changed()
        for name, move in (("out", part.evict), ("in", part.bring)):
            started = time.perf_counter()
            move()
            if stream is not None:
                stream.synchronize()
            best[name] = min(best[name], time.perf_counter() - started)
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
        same = all(torch.equal(tensor.cpu(), value) for tensor, value in zip(tensors, kept, strict=True))
        check("tensors that differ after they came back", float(not same), 0)
    return {f"{name} GB/s": size / taken / 1e9 for name, taken in best.items()}


def attention(device: torch.device, tiny: bool) -> Numbers:
    """Groups of rows that share a prompt, in the layout of a 0.6B model."""
    from aligner.trainer import packed_attention
    from aligner.trainer.prefix_attention import prefix_attention

    prompt, response, groups = (16, 8, 2) if tiny else (512, 384, 4)
    lengths, parents = [], []
    for _ in range(groups):
        root = len(lengths)
        lengths += [prompt, *(response + 3 * n for n in range(8))]
        parents += [-1, *[root] * 8]
    tokens, dtype = sum(lengths), torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    exact = [torch.randn(tokens, heads, 128, dtype=torch.float64) for heads in (16, 8, 8)]
    given = [x.to(device, dtype).requires_grad_() for x in exact]
    weight = torch.randn(tokens, 2048)

    def outcome(tensors: list[Tensor], where: Tensor) -> list[Tensor]:
        out = prefix_attention(*tensors, tuple(lengths), tuple(parents), 128**-0.5, None)
        return [out, *torch.autograd.grad((out * where.to(out)).sum(), tensors)]

    reference = outcome([x.requires_grad_() for x in exact], weight)
    bound, numbers = (3e-2 if dtype == torch.bfloat16 else 1e-5), {"tokens": tokens}
    inner = packed_attention.has_varlen
    for name in ("varlen", "padded"):
        if name == "padded":
            packed_attention.has_varlen = lambda query: False
            sys.modules["aligner.trainer.prefix_attention"].has_varlen = lambda query: False
        elif not inner(given[0]):
            continue
        found = outcome(given, weight)
        for label, one, other in zip(("out", "dq", "dk", "dv"), found, reference, strict=True):
            off = float((one.double().cpu() - other).abs().max() / other.abs().max())
            numbers[f"{name} {label} off"] = check(f"{name} {label}", off, bound)
        numbers[f"{name} ms"] = 1e3 * seconds(lambda: outcome(given, weight), device, 3)
    return numbers


def experts(device: torch.device, tiny: bool) -> Numbers:
    """The two weights of each expert, as `GroupedExperts` has them, beside a loop over experts."""
    from types import SimpleNamespace

    from aligner.trainer.fused import gated
    from aligner.trainer.megatron.grouped_experts import GroupedExperts

    count, hidden, width, rows = (4, 32, 48, 50) if tiny else (32, 2048, 768, 16384)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config: Any = SimpleNamespace(
        moe_ffn_hidden_size=width, hidden_size=hidden, params_dtype=dtype, expert_model_parallel_size=1,
    )  # fmt: skip
    group = SimpleNamespace(expt_tp=SimpleNamespace(size=lambda: 1))
    module = GroupedExperts(count, config, pg_collection=group, activation="silu").to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=hidden**-0.5)
    counts = torch.bincount(torch.randint(count, (rows,)), minlength=count)
    x, prob = torch.randn(rows, hidden, device=device, dtype=dtype), torch.rand(rows, device=device)
    where = torch.randn(rows, hidden, device=device, dtype=dtype)

    def loop() -> Tensor:
        outs = []
        for slot, (part, p) in enumerate(zip(x.split(counts.tolist()), prob.split(counts.tolist()), strict=True)):
            inner = gated(part @ module.weight1[slot].T, "silu")
            outs.append((inner * p[:, None]).to(dtype) @ module.weight2[slot].T)
        return torch.cat(outs)

    def outcome(forward: Callable[[], Tensor]) -> list[Tensor]:
        out = forward()
        return [out, *torch.autograd.grad((out * where).sum(), list(module.parameters()))]

    grouped: Callable[[], Tensor] = lambda: module(x, counts, prob)[0]  # noqa: E731
    numbers: Numbers = {"rows": rows}
    for label, one, other in zip(("out", "dw1", "dw2"), outcome(grouped), outcome(loop), strict=True):
        off = float((one - other).abs().max().float() / other.abs().max().float())
        numbers[f"{label} off"] = check(label, off, 2e-2 if dtype == torch.bfloat16 else 1e-6)
    numbers |= {
        f"{name} ms": 1e3 * seconds(lambda f=f: outcome(f), device, 3)
        for name, f in (("grouped", grouped), ("one by one", loop))
    }  # type: ignore[misc]
    return numbers


def adam(device: torch.device, tiny: bool) -> Numbers:
    """One step from the same state."""
    from tools.bench.live_tensors import peak_bytes

    shapes, numbers, results = [(1 << (8 if tiny else 13), 1 << (6 if tiny else 12))] * 8, {}, {}
    for name, choice in (("fused", {"fused": True}), ("foreach", {"foreach": True})):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, **choice)
        optimizer.step()
        results[name] = [parameter.detach().clone() for parameter in parameters]
        numbers[f"{name} MiB"] = peak_bytes(optimizer.step, device) / 2**20
        numbers[f"{name} ms"] = 1e3 * seconds(optimizer.step, device)
    off = max(float((a - b).abs().max()) for a, b in zip(results["fused"], results["foreach"], strict=True))
    return {**numbers, "off": check("fused against foreach", off, 1e-5)}


def draws(device: torch.device, tiny: bool) -> Numbers:
    """Exponential noise from a generator of each row, as vLLM's first runner draws it, beside one call for all rows."""
    rows, vocabulary = (8, 512) if tiny else (256, 152_064)
    noise = torch.empty(rows, vocabulary, device=device)
    generators = [torch.Generator(device=device).manual_seed(n) for n in range(rows)]

    def each() -> None:
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)

    return {
        "rows": rows,
        "by generator ms": 1e3 * seconds(each, device),
        "at once ms": 1e3 * seconds(noise.exponential_, device),
    }


def policy(device: torch.device, tiny: bool) -> Numbers:
    """One rank, as a job builds it."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from aligner.data.samples import Samples
    from aligner.models.read_spec import read_spec
    from aligner.models.tensors import parameter_count
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.world import World
    from aligner.trainer.config import OptimizerConfig, PolicyConfig
    from aligner.trainer.policy import Policy
    from tools.bench.live_tensors import peak_bytes

    if tiny:
        sizes: Numbers = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 512,
        }
    else:
        sizes = {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
        }
    rows, width = (4, 32) if tiny else (8, 2048)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    numbers: Numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=True), dtype=dtype).eval()
        model.save_pretrained(folder)
        tokens_BT = torch.randint(3, sizes["vocab_size"], (rows, width))
        mask_BT = (torch.arange(width) >= width // 4).expand(rows, width)
        samples = Samples(
            tokens_BT,
            torch.full((rows,), width // 4),
            torch.full((rows,), width),
            mask_BT,
            torch.arange(rows),
            [{}] * rows,
        )
        with torch.no_grad():
            logits = model.to(device)(tokens_BT[:1].to(device)).logits[0, :-1].float()
            expected = logits.log_softmax(-1).gather(1, tokens_BT[0, 1:, None].to(device))[:, 0].cpu()
        del model, logits
        world, spec = World(120), read_spec(folder)
        flops = 6 * parameter_count(spec) * rows * width
        for recompute in ("none", "mlp", "full"):
            config = PolicyConfig(
                dtype=str(dtype).split(".")[1], micro_tokens=rows * width, recompute=recompute, share_prefix="off",
                optimizer=OptimizerConfig(lr=1e-5),
            )  # fmt: skip
            role = Policy(recompute, world, Mesh((0,), name="policy"), spec, config)
            batch = role.scatter(samples)
            if recompute == "none":
                off = (role.logprobs(batch).gather()[0, 1:] - expected)[mask_BT[0, 1:]].abs()
                numbers["logp off, mean"] = check(
                    "mean |logp - transformers'|", float(off.mean()), 3e-2 if dtype == torch.bfloat16 else 1e-5
                )
            before = role.logprobs(batch).gather()[mask_BT].mean()
            update = lambda role=role, batch=batch: role.update(likelihood, batch)  # noqa: E731
            update()
            numbers[f"{recompute} MiB"] = peak_bytes(update, device) / 2**20
            taken = seconds(update, device, 2)
            numbers[f"{recompute} tokens/s"] = rows * width / taken
            numbers[f"{recompute} TFLOP/s"] = flops / taken / 1e12
            check("log p after updates on it, less", float(before - role.logprobs(batch).gather()[mask_BT].mean()), 0)
            if device.type == "cuda" and recompute == "none":
                numbers["flash kernels"] = flash_kernels(update)
            del role
    return numbers


def likelihood(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the trained tokens."""
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}


def flash_kernels(work: Callable[[], Any]) -> int:
    """Launches of a kernel of that name; none means that attention took the slow path."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    launches = sum(event.count for event in profile.key_averages() if "flash" in event.key.lower())
    check("updates without a flash kernel", float(not launches), 0)
    return launches


PARTS = {part.__name__: part for part in (kernels, fp8, offload, attention, experts, adam, draws, policy)}


def run_part(name: str, device: str) -> None:
    """In the part's own process: the numbers as the last line."""
    chosen = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(chosen)
    numbers = PARTS[name](chosen, device == "cpu")
    print(
        json.dumps(
            {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in numbers.items()}
        )
    )
    sys.stdout.flush()
    os._exit(0)  # after backward passes beside process groups the interpreter's own end can abort


def outcome_of(name: str, device: str, limit: float) -> dict[str, Any]:
    """A part in a process of its own."""
    environment = {**os.environ, "ALIGNER_DEVICE": device, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--part", name, "--device", device]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        status = "ok" if done.returncode == 0 else "failed"
        lines = (done.stdout if status == "ok" else done.stderr).strip().splitlines() or [""]
    except subprocess.TimeoutExpired:
        status, lines = f"no end within {limit:.0f} s", [""]
    row: dict[str, Any] = {"part": name, "status": status, "seconds": round(time.perf_counter() - started, 1)}
    return row | ({"numbers": json.loads(lines[-1])} if status == "ok" else {"error": "\n".join(lines[-15:])})


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| part | | s | numbers |", "| --- | --- | --- | --- |"]
    for row in rows:
        shown = ", ".join(f"{key} {value:.4g}" for key, value in row.get("numbers", {}).items())
        lines.append(
            f"| {row['part']} | {row['status']} | {row['seconds']} | {shown or row.get('error', '').splitlines()[-1:]} |"
        )
    return "\n".join(lines)


def main() -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--limit", type=float, default=120, help="seconds of each part")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        run_part(chosen.part, chosen.device)
    names = chosen.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]}; use {', '.join(PARTS)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu runs the same parts at tiny sizes")
    rows = []
    for name in names:
        rows.append(outcome_of(name, chosen.device, chosen.limit))
        print(f"{name}: {rows[-1]['status']} in {rows[-1]['seconds']} s", file=sys.stderr, flush=True)
    where = torch.cuda.get_device_name(0) if chosen.device == "cuda" else "CPU, tiny sizes"
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"device": where, "torch": torch.__version__, "rows": rows}, indent=1))
    print(f"{where}, torch {torch.__version__}\n\n{table(rows)}")
    for row in rows:
        if row.get("error"):
            print(f"\n{row['part']}:\n{row['error']}")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
