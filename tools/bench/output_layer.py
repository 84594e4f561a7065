"""Peak memory and time of log-probabilities and of their gradients, in blocks of the vocabulary and with whole logits: prints a table.

    python tools/bench/output_layer.py [--tokens 4096] [--hidden 512] [--vocabularies 32000 151936] [--dtype float32]

Each measurement is a process of its own, whose peak resident memory (on CUDA: allocated) is taken beyond what it was with inputs and the
weight's gradient already there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

PASSES = ("log-probabilities", "update")
WAYS = ("blocks", "whole")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """MiB beyond the inputs, and CPU seconds, of one pass."""
    import torch

    from aligner.trainer.output_layer import output_logprobs

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), getattr(torch, args.dtype)
    hidden = (torch.randn(args.tokens, args.hidden, device=device) / 8).to(dtype)
    weight = torch.randn(args.vocab, args.hidden, device=device).to(dtype)
    grad = torch.ones(weight.shape, device=device)
    target = torch.randint(0, args.vocab, (args.tokens,), device=device)
    learns = args.step == "update"
    for tensor in (hidden, weight):
        tensor.requires_grad_(learns)

    def peak() -> float:
        if cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    torch.mm(torch.ones(64, 64, device=device), torch.ones(64, 64, device=device))  # libraries take their own
    before, start = peak(), time.process_time()
    with torch.set_grad_enabled(learns):
        if args.way == "blocks":
            given = {"vocab": args.vocab, "with_entropy": learns, "weight_grad_VH": grad if learns else None}
            logp, _ = output_logprobs(hidden, weight, target, **given)
        else:
            logits = (hidden @ weight.T).float()
            logp = logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)
            if learns:  # the entropy, for the metric
                with torch.no_grad():
                    log_p = logits.log_softmax(-1)
                    (log_p.exp() * log_p).sum(-1)
                    del log_p
    if learns:
        logp.sum().backward()
        if args.way == "whole":
            assert weight.grad is not None
            grad += weight.grad
    if cuda:
        torch.cuda.synchronize()
    return {"MiB": peak() - before, "seconds": time.process_time() - start}


def main() -> None:
    """Print the table, or with --way one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=PASSES, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    print(f"{args.tokens} tokens, hidden {args.hidden}, {args.dtype}: MiB beyond weights and inputs, CPU seconds\n")
    print("| vocabulary | pass | whole logits | in blocks |\n| --- | --- | --- | --- |")
    for vocab in args.vocabularies:
        for step in PASSES:
            cells = []
            for way in reversed(WAYS):
                given = ["--way", way, "--step", step, "--vocab", str(vocab)]
                given += ["--tokens", str(args.tokens), "--hidden", str(args.hidden), "--dtype", args.dtype]
                done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=False)
                if done.returncode:
                    cells.append("out of memory" if done.returncode < 0 else f"failed: {done.stderr.splitlines()[-1]}")
                    continue
                row = json.loads(done.stdout.splitlines()[-1])
                cells.append(f"{row['MiB']:,.0f} MiB, {row['seconds']:.2f} s")
            print(f"| {vocab:,} | {step} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
