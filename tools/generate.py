"""Offline batch generation for a file of prompts; a killed run resumes where it stopped.

python tools/generate.py --model runs/first/model --input prompts.jsonl --output answers.jsonl
python tools/generate.py --model DIR --input questions.jsonl --output out.jsonl --prompt-field question --chat \\
    --num-samples 4 --temperature 0.7 --top-p 0.95 --max-tokens 1024
torchrun --nproc-per-node 4 tools/generate.py --tensor 2 ...     4 engines of 2 GPUs each
python tools/generate.py ... --environment target=my_game.py:Game max_turns=8       whole episodes (settings: conf section environment)

Input rows have "prompt" (text) or "messages" (a conversation, optionally with "tools" and "chat_template_kwargs"). Output
lines have "index" (the row's number), "key", "prompt" (as the model sees it), "response" (one text per sample), "finish"
(stop or length), "tokens" (counts) and "row" (the input row). With --environment a sample is an episode: "response" is what its last
turn said, "finish" how it ended (done, max_turns, ..., or the kind of its failure), "reward" its reward (null where it failed), and
"episodes" has turns, metrics and messages of each. During a run lines are appended to OUTPUT.part-N; OUTPUT is
written in row order when all are done. A sample's seed depends only on --seed and its row, and batches only on the input
and --batch, so an interrupted run produces the same file as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aligner.bounds import check_settings
from aligner.config.schema import Config, compose_config, to_config
from aligner.data.chat import ChatOptions, Notes, check_template_kwargs
from aligner.data.decoding import decode
from aligner.data.end_tokens import find_ends
from aligner.data.lines import Line, ResumableOutput, check_same_rows, chunks
from aligner.data.mapped import MappedRows
from aligner.data.prompts import Prompt, tokenize_prompts
from aligner.data.sources.open import open_source
from aligner.data.sources.source import LabelledRow, all_rows
from aligner.data.tokenizer import load_tokenizer, use_chat_template
from aligner.models.read_spec import read_config
from aligner.models.stored import SHARDS
from aligner.paths import path_option
from aligner.report.console import format_duration
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.engines import BACKENDS
from aligner.rollout.episodes.driver import Episodes
from aligner.rollout.episodes.episode import Episode
from aligner.rollout.episodes.rows import episode_samples
from aligner.rollout.kind import Place
from aligner.rollout.offline import OfflineEngine, fingerprint, take_devices
from aligner.rollout.requests import Sample
from aligner.rollout.rows import request_seed

OUTPUT_OPTIONS = (
    "num_samples", "temperature", "top_p", "top_k", "max_tokens", "stop_token_ids", "seed", "batch", "tensor", "engine",
    "dtype", "max_num_seqs", "prompt_field", "chat", "raw", "system", "chat_template_kwargs", "logprobs", "environment",
)  # fmt: skip
"""Options that determine the output."""
AT_LEAST = {
    "num_samples": 1,
    "batch": 1,
    "tensor": 1,
    "max_num_seqs": 1,
    "max_model_len": 2,
    "kv_cache_mib": 1,
    "seed": 0,
}


def options() -> argparse.ArgumentParser:
    """The command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=path_option, required=True, help="a Hugging Face folder, such as run_dir/model or run_dir/best")
    add("--input", type=path_option, required=True, help="JSONL file of rows")
    add("--output", type=path_option, required=True, help="JSONL file to write; beside it OUTPUT.settings.json")
    add("--num-samples", type=int, default=1, help="samples per row (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)s)")
    add("--top-p", type=float, default=1.0, help="smallest set of tokens with this probability (default: all)")
    add("--top-k", type=int, default=0, help="sample from this many most likely tokens (default 0: all)")
    add("--max-tokens", type=int, default=256, help="most tokens in an answer (default %(default)s)")
    add(
        "--stop-token-ids",
        type=int,
        nargs="+",
        help="stop tokens (default: the end-of-turn tokens of the model's files, tokenizer and chat template)",
    )
    add("--seed", type=int, default=0, help="random seed (default %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="treat a text as a user message, for the chat template")
    form.add_argument("--raw", action="store_true", help="use texts as they are; rows with messages are an error")
    add("--system", help="system prompt of every conversation, in place of the row's own ('' for none)")
    add("--chat-template", type=path_option, help="file of a chat template (jinja), in place of the tokenizer's")
    add("--chat-template-kwargs", type=json_object, help="JSON object: variables of the chat template for every row")
    add("--prompt-field", help='field of the text or the messages (default: "prompt" or "messages")')
    add("--environment", nargs="+", metavar="KEY=VALUE", help="play episodes: settings of the section environment")
    add("--logprobs", action="store_true", help="write token_ids, and log p of each (after temperature, top-k, top-p)")
    add(
        "--batch",
        type=int,
        default=4096,
        help="rows generated and written together; a kill loses at most one batch (default %(default)s)",
    )
    add(
        "--engine", choices=list(BACKENDS), default="vllm", help="vllm, or transformers, which is slower (default vllm)"
    )
    add("--tensor", type=int, default=1, help="tensor-parallel size of an engine (default %(default)s)")
    add(
        "--dtype",
        choices=list(ELEMENT_BYTES),
        help="data type of weights and computation (default: that of config.json)",
    )
    add("--max-model-len", type=int, help="longest prompt plus response (default: what the rows need)")
    add("--max-num-seqs", type=int, default=256, help="maximum number of concurrent samples (default %(default)s)")
    add(
        "--kv-cache-mib",
        type=int,
        help="vLLM's KV cache per device (default: the rest of a GPU's memory; 1024 on a CPU)",
    )
    add("--gpu-memory-utilization", type=float, default=0.9, help="fraction of a GPU's memory (default %(default)s)")
    add("--trust-remote-code", action="store_true", help="run the model class in the folder's Python files (auto_map)")
    return parser


def json_object(text: str) -> dict[str, Any]:
    """Parse an option whose value is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("give a JSON object, such as '{\"enable_thinking\": false}'.")
    return value


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling settings. Raises ValueError naming an invalid option."""
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{option(name)} {value} must be at least {least}.")
    stop = tuple(args.stop_token_ids) if args.stop_token_ids else None
    sampling = Sampling(args.temperature, args.max_tokens, args.top_p, args.top_k, stop)
    try:
        check_settings(sampling, "sampling")
    except ValueError as error:
        raise ValueError(re.sub(r"sampling\.(\w+)=", lambda m: f"{option(m[1])} ", str(error))) from None
    if sampling.temperature == 0 and args.num_samples > 1:
        raise ValueError(
            "--temperature 0 gives the same answer every time; use --num-samples 1, or a temperature above 0."
        )
    if (args.model / SHARDS).is_file():
        raise ValueError(
            f"--model {args.model} is a sharded checkpoint; python tools/convert.py {args.model} OUT merges it."
        )
    return sampling


def option(name: str) -> str:
    """A setting's name as a command-line option."""
    return f"--{name.replace('_', '-')}"


def to_prompt_row(row: dict[str, Any], label: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row in the form of `tokenize_prompts`, a text or a conversation, with its other fields: environments get them."""
    field = args.prompt_field
    others = {name: value for name, value in row.items() if name not in ("prompt", "messages", field)}
    if field is not None:
        if field not in row:
            raise ValueError(f"{label}: the row has no {field!r} (--prompt-field); it has {sorted(row)}.")
        row = {**others, "messages" if isinstance(row[field], list) else "prompt": row[field]}
    if args.chat and isinstance(row.get("prompt"), str) and "messages" not in row:
        row = {**others, "messages": [{"role": "user", "content": row["prompt"]}]}
    if args.raw and "messages" in row:
        raise ValueError(f"{label}: the row has messages, but --raw accepts only texts; remove --raw.")
    if args.system is not None and not isinstance(row.get("messages"), list):
        raise ValueError(f"{label}: --system needs a conversation; add --chat, or give messages.")
    return row


def read_prompts(source: Sequence[LabelledRow], tokenizer: Any, args: argparse.Namespace) -> tuple[list[Prompt], int]:
    """(the prompts of all rows, the engine's max_model_len)."""
    if not isinstance(args.chat_template_kwargs or {}, dict):
        raise ValueError("--chat-template-kwargs must be a JSON object, such as '{\"enable_thinking\": false}'.")
    check_template_kwargs(tokenizer, args.chat_template_kwargs or {}, "--chat-template-kwargs: ")
    notes: Notes = Counter()
    prompts = tokenize_prompts(
        ((label, to_prompt_row(row, label, args)) for label, row in source),
        tokenizer,
        1 << 62,
        chat=ChatOptions(args.chat_template_kwargs or {}, args.system),
        notes=notes,
    )
    for note, count in notes.items():
        print(f"{args.input}: {note}: {count}", file=sys.stderr, flush=True)
    positions = read_config(args.model).get("max_position_embeddings")
    limit = args.max_model_len or positions or 1 << 62
    for prompt, (label, _) in zip(prompts, source, strict=True):
        if len(prompt.tokens) + args.max_tokens > limit:
            limit_name = (
                f"--max-model-len {args.max_model_len}" if args.max_model_len else f"the model's {positions} positions"
            )
            raise ValueError(
                f"{label}: the prompt has {len(prompt.tokens)} tokens, which with --max-tokens {args.max_tokens} is more "
                f"than {limit_name}; use a smaller --max-tokens, or remove the row."
            )
    turns = 1 if args.environment is None else environment_config(args, 0).environment.max_turns
    needed = max(len(prompt.tokens) for prompt in prompts) + turns * args.max_tokens
    return prompts, args.max_model_len or min(-(-needed // 64) * 64, positions or needed + 63)


def environment_config(args: argparse.Namespace, length: int) -> Config:
    """The configuration of a job that plays in this environment. Raises ValueError naming an invalid setting."""
    plain = [
        setting.lstrip("+") for setting in args.environment
    ]  # +options.size=3: a new key, as on a job's command line
    settings = [f"{given[: -len(name)]}environment.{name}" for given, name in zip(args.environment, plain, strict=True)]
    rollout = [f"rollout.max_model_len={length}"] if length else []
    config = to_config(compose_config([f"model.path='{args.model}'", *settings, *rollout]))
    check_settings(config.environment, "environment")
    if not config.environment.enabled:
        raise ValueError("--environment needs target=..., such as target=my_game.py:Game.")
    rendered = {
        "system_prompt": args.system,
        "chat_template_kwargs": args.chat_template_kwargs or {},
    }  # as the prompts are
    return replace(config, data=replace(config.data, **rendered))


def line_of(
    prompt: Prompt, key: str, row: dict[str, Any], samples: Sequence[Sample], tokenizer: Any, logp: bool
) -> Line:
    """The output line of one row."""
    token_fields = (
        {"token_ids": [sample.tokens for sample in samples], "logprobs": [sample.logp for sample in samples]}
        if logp
        else {}
    )
    return {
        "index": prompt.index,
        "key": key,
        "prompt": prompt.text,
        "response": [decode(tokenizer, sample.tokens) for sample in samples],
        "finish": ["length" if sample.truncated else "stop" for sample in samples],
        "tokens": [len(sample.tokens) for sample in samples],
        **token_fields,
        "row": row,
    }


def make_engine(args: argparse.Namespace, stop: Sequence[int], length: int) -> OfflineEngine:
    """The engine of --engine."""
    return BACKENDS[args.engine].offline_type()(
        args.model, stop=stop, tensor=args.tensor, dtype=args.dtype,
        max_model_len=length, max_num_seqs=args.max_num_seqs, kv_cache_mib=args.kv_cache_mib,
        gpu_memory_utilization=args.gpu_memory_utilization, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


Batch = Callable[[Sequence[Prompt], Sequence[int]], list[list[Any]]]
"""(prompts, their numbers) -> what was generated for each: samples or episodes."""


def responder(args: argparse.Namespace, sampling: Sampling, stop: Sequence[int], length: int) -> Batch:
    """Answers prompts."""
    engine = make_engine(args, stop, length)

    def answer(prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[list[Any]]:
        seeds = [request_seed(args.seed, -1 - args.seed, index) for index in numbers]  # as in a job's evaluations
        return list(engine.answers([one.tokens for one in prompts], seeds, sampling, args.num_samples))

    return answer


def player(
    args: argparse.Namespace, sampling: Sampling, stop: Sequence[int], length: int, tokenizer: Any, stack: ExitStack
) -> Batch:
    """Plays episodes; engine and environments are closed with `stack`."""
    import torch

    from aligner.roles.episode_source import make_source
    from aligner.rollout.standalone import standalone_engine

    if args.tensor > 1:
        raise ValueError(
            f"--tensor {args.tensor}: episodes are played by engines of one device; start more with torchrun."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = RolloutConfig(
        args.engine, args.dtype, length, args.max_num_seqs, None, args.kv_cache_mib, args.gpu_memory_utilization
    )
    engine = stack.enter_context(standalone_engine(args.model, config, device, stop, args.trust_remote_code))
    driver = Episodes(engine, make_source(environment_config(args, length), tokenizer, engine.spec), lambda: None)
    stack.callback(driver.close)

    def play(prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[list[Any]]:
        engine.new_weights()  # a batch's rounding depends on nothing before it
        size, call = args.num_samples, -1 - args.seed
        episodes = [
            driver.begin(prompt, Place(args.seed, call, number, sample))
            for prompt, number in zip(prompts, numbers, strict=True)
            for sample in range(size)
        ]
        done = driver.finish(driver.resume(episodes, sampling))
        return [list(done[first : first + size]) for first in range(0, len(done), size)]

    return play


def sampled_tokens(one: Sample | Episode) -> int:
    """Tokens that were sampled."""
    turns = [one] if isinstance(one, Sample) else [turn.sample for turn in one.turns]
    return sum(len(turn.tokens) for turn in turns)


def episode_line(
    prompt: Prompt, key: str, row: dict[str, Any], episodes: Sequence[Episode], tokenizer: Any, logp: bool
) -> Line:
    """The output line of one row that was played."""
    samples = episode_samples(episodes)
    assert samples.episode_reward_B is not None and samples.turn_BT is not None and samples.rollout_logp_BT is not None
    token_fields = (
        {
            "token_ids": [samples.tokens_BT[i, : samples.length_B[i]].tolist() for i in range(samples.rows)],
            "turn_of_token": [samples.turn_BT[i, : samples.length_B[i]].tolist() for i in range(samples.rows)],
            "logprobs": [samples.rollout_logp_BT[i, : samples.length_B[i]].tolist() for i in range(samples.rows)],
        }
        if logp
        else {}
    )
    records = samples.episodes or []
    return {
        "index": prompt.index,
        "key": key,
        "prompt": prompt.text,
        "response": [decode(tokenizer, samples.last_turn_tokens(i)) for i in range(samples.rows)],
        "finish": [record["ended"] for record in records],
        "reward": [None if math.isnan(reward) else reward for reward in samples.episode_reward_B.tolist()],
        "tokens": [record["sampled_tokens"] for record in records],
        "episodes": records,
        **token_fields,
        "row": row,
    }


def generate(args: argparse.Namespace, rank: int, count: int) -> None:
    """Generate the missing rows of this process's batches: batch k belongs to process k mod `count`."""
    sampling = sampling_of(args)
    config = read_config(args.model)
    # vLLM would choose half precision for float32 weights
    args.dtype = args.dtype or config.get("dtype") or config.get("torch_dtype") or "auto"
    tokenizer = load_tokenizer(args.model, "--model")
    if args.chat_template is not None:
        use_chat_template(tokenizer, args.chat_template, "--chat-template")
    ends = find_ends(args.model, tokenizer)
    if ends.disagreement and rank == 0 and sampling.stop_token_ids is None:
        print(ends.disagreement, file=sys.stderr, flush=True)
    source = list(all_rows(MappedRows(open_source(args.input, "--input"), None, None, "prompts", None)))
    prompts, length = read_prompts(source, tokenizer, args)
    settings = {"the model": fingerprint(args.model), **{option(name): getattr(args, name) for name in OUTPUT_OPTIONS}}
    if args.chat_template is not None:
        settings["--chat-template"] = hashlib.blake2b(args.chat_template.read_bytes(), digest_size=8).hexdigest()
    settings_json = json.dumps(settings, sort_keys=True)
    keys = [hashlib.blake2b(f"{settings_json}{p.tokens}".encode(), digest_size=8).hexdigest() for p in prompts]
    with ResumableOutput(args.output, settings, rank) as lines, ExitStack() as stack:
        check_same_rows(lines.done, keys, lambda index: source[index][0], args.output)
        own_chunks = [chunk for k, chunk in enumerate(chunks(len(prompts), args.batch)) if k % count == rank]
        pending = [chunk for chunk in own_chunks if any(index not in lines.done for index in chunk)]
        progress = Progress(sum(len(chunk) for chunk in own_chunks), sum(len(chunk) for chunk in pending), rank, count)
        to_line: Callable[..., Line] = line_of
        if pending and args.environment is not None:
            batch, to_line = player(args, sampling, ends.ids, length, tokenizer, stack), episode_line
        elif pending:
            batch = responder(args, sampling, ends.ids, length)
        for chunk in pending:
            start = time.perf_counter()
            # the whole batch, even if some of its lines exist: rounding depends on the batch's composition
            batch_answers = batch([prompts[i] for i in chunk], chunk)
            new_lines = [
                to_line(prompts[i], keys[i], source[i][1], answers, tokenizer, args.logprobs)
                for i, answers in zip(chunk, batch_answers, strict=True)
                if i not in lines.done
            ]
            lines.append(new_lines)
            progress.batch(
                len(chunk),
                sum(sampled_tokens(one) for answers in batch_answers for one in answers),
                time.perf_counter() - start,
            )
        if lines.merge(len(prompts)):
            print(f"{args.output}: {len(prompts):,} rows", flush=True)


class Progress:
    """Prints rows done, tokens per second and the remaining time to stderr."""

    def __init__(self, rows: int, left: int, rank: int, count: int) -> None:
        self.rows, self.left = rows, left
        self.answered, self.tokens, self.seconds = 0, 0, 0.0
        self.name = f"[{rank}] " if count > 1 else ""
        if left < rows:
            self._say(f"{rows - left:,} of {rows:,} rows were answered before")

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        """Count a batch that has been written."""
        self.left, self.tokens, self.seconds = self.left - rows, self.tokens + tokens, self.seconds + seconds
        self.answered += rows
        done, speed = self.rows - self.left, self.tokens / self.seconds
        left = f", {format_duration(self.seconds / self.answered * self.left)} left" if self.left else ""
        self._say(f"{done:,} of {self.rows:,} rows, {done / self.rows:.0%}; {speed:,.0f} tokens/s{left}")

    def _say(self, text: str) -> None:
        print(f"{self.name}{text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    args = options().parse_args(arguments)
    try:
        rank, count = take_devices(os.environ, args.tensor)
        generate(args, rank, count)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command resumes where this one stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
