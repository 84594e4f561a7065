"""Answers of a model to a file of prompts, by vLLM; a run that was killed goes on where it stopped.

python tools/generate.py --model runs/first/model --input prompts.jsonl --output answers.jsonl
python tools/generate.py --model DIR --input questions.jsonl --output out.jsonl --prompt-field question --chat \\
    --num-samples 4 --temperature 0.7 --top-p 0.95 --max-tokens 1024
torchrun --nproc-per-node 4 tools/generate.py --tensor 2 ...     4 engines of 2 GPUs each

Rows have "prompt" (text) or "messages" (a conversation, with "tools" and "chat_template_kwargs" where its template takes
them). A line of the output: "index" (the row's number), "key",
"prompt" (as the model saw it), "response" (a text for each sample), "finish" (stop or length), "tokens" (counts), "row"
(what the input had). While a run works its lines stand in OUTPUT.part-N; OUTPUT appears, in the rows' order, when it is
whole. The seed of a sample follows from --seed and its row alone, and rows are generated in batches that follow from the
input and --batch alone: a run that was cut off ends with the same file as one that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aligner.config.paths import path_option
from aligner.data.chat import TEMPLATE_FIELDS, Notes, check_template_kwargs
from aligner.data.decoding import decode
from aligner.data.end_tokens import find_ends
from aligner.data.jsonl import LabelledRow, rows
from aligner.data.lines import Line, ResumableOutput, check_same_rows, chunks
from aligner.data.prompts import Prompt, tokenize_prompts
from aligner.data.tokenizer import load_tokenizer
from aligner.models.spec import read_config
from aligner.models.stored import SHARDS
from aligner.report.console import duration
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.rollout.config import Sampling
from aligner.rollout.offline import OfflineEngine, fingerprint, take_devices
from aligner.rollout.requests import Sample
from aligner.rollout.rows import request_seed

DECIDES = (
    "num_samples", "temperature", "top_p", "top_k", "max_tokens", "stop_token_ids", "seed", "batch", "tensor", "dtype",
    "max_num_seqs", "prompt_field", "chat", "raw", "system", "chat_template_kwargs", "logprobs",
)  # fmt: skip
"""Options that decide what is written."""
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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=path_option, required=True, help="a Hugging Face folder, such as run_dir/model or run_dir/best")
    add("--input", type=path_option, required=True, help="JSONL file of rows")
    add("--output", type=path_option, required=True, help="JSONL file to write; beside it OUTPUT.settings.json")
    add("--num-samples", type=int, default=1, help="answers to each row (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)s)")
    add("--top-p", type=float, default=1.0, help="smallest set of tokens with this probability (default: all)")
    add("--top-k", type=int, default=0, help="so many most likely tokens (default 0: all)")
    add("--max-tokens", type=int, default=256, help="most tokens in an answer (default %(default)s)")
    add(
        "--stop-token-ids",
        type=int,
        nargs="+",
        help="tokens that end an answer (default: what the model's files, tokenizer and chat template end turns with)",
    )
    add("--seed", type=int, default=0, help="of all samples (default %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="a text is a user's message, for the chat template")
    form.add_argument("--raw", action="store_true", help="only texts, as they are; rows with messages are refused")
    add("--system", help="a system message before every conversation")
    add("--chat-template-kwargs", type=json_object, help="JSON object: variables of the chat template for every row")
    add("--prompt-field", help='where rows have the text or the messages (default: "prompt" or "messages")')
    add("--logprobs", action="store_true", help="write token_ids, and log p of each (after temperature, top-k, top-p)")
    add(
        "--batch",
        type=int,
        default=4096,
        help="rows written together: the most that a kill loses (default %(default)s)",
    )
    add("--tensor", type=int, default=1, help="tensor-parallel size of an engine (default %(default)s)")
    add("--dtype", choices=list(ELEMENT_BYTES), help="of weights and computation (default: as config.json says)")
    add("--max-model-len", type=int, help="longest prompt with its answer (default: what the rows need)")
    add("--max-num-seqs", type=int, default=256, help="most samples generated at the same time (default %(default)s)")
    add("--kv-cache-mib", type=int, help="KV cache of each device (default: what is left of a GPU; 1024 on a CPU)")
    add("--gpu-memory-utilization", type=float, default=0.9, help="share of a GPU's memory (default %(default)s)")
    return parser


def json_object(text: str) -> dict[str, Any]:
    """The value of an option that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("give a JSON object, such as '{\"enable_thinking\": false}'.")
    return value


def checked(given: argparse.Namespace) -> Sampling:
    """How to sample; ValueError naming the option that cannot work."""
    for name, least in AT_LEAST.items():
        value = getattr(given, name)
        if value is not None and value < least:
            raise ValueError(f"{option(name)} {value} must be at least {least}.")
    stop = tuple(given.stop_token_ids) if given.stop_token_ids else None
    sampling = Sampling(given.temperature, given.max_tokens, given.top_p, given.top_k, stop)
    try:
        sampling.check()
    except ValueError as error:
        raise ValueError(re.sub(r"sampling\.(\w+)=", lambda m: f"{option(m[1])} ", str(error))) from None
    if sampling.temperature == 0 and given.num_samples > 1:
        raise ValueError(
            "--temperature 0 gives the same answer every time; use --num-samples 1, or a temperature above 0."
        )
    if (given.model / SHARDS).is_file():
        raise ValueError(
            f"--model {given.model} is cut into shards; python tools/convert.py {given.model} OUT joins them."
        )
    return sampling


def option(name: str) -> str:
    """A setting's name on the command line."""
    return f"--{name.replace('_', '-')}"


def asked(row: dict[str, Any], label: str, given: argparse.Namespace) -> dict[str, Any]:
    """The row as `tokenize_prompts` takes it: a text or a conversation."""
    field = given.prompt_field
    beside = {name: row[name] for name in TEMPLATE_FIELDS if name in row}
    if field is not None:
        if field not in row:
            raise ValueError(f"{label}: the row has no {field!r} (--prompt-field); it has {sorted(row)}.")
        row = {**beside, "messages" if isinstance(row[field], list) else "prompt": row[field]}
    if given.chat and isinstance(row.get("prompt"), str) and "messages" not in row:
        row = {**beside, "messages": [{"role": "user", "content": row["prompt"]}]}
    if given.raw and "messages" in row:
        raise ValueError(f"{label}: the row has messages, and --raw sends only texts; leave --raw out.")
    if given.system is not None:
        if not isinstance(row.get("messages"), list):
            raise ValueError(f"{label}: --system needs a conversation; add --chat, or give messages.")
        if any(isinstance(message, dict) and message.get("role") == "system" for message in row["messages"]):
            raise ValueError(f"{label}: the row has a system message already; leave --system out.")
        row = {**beside, "messages": [{"role": "system", "content": given.system}, *row["messages"]]}
    return row


def read_prompts(source: Sequence[LabelledRow], tokenizer: Any, given: argparse.Namespace) -> tuple[list[Prompt], int]:
    """Every row's prompt, and the length that the engine must be built for."""
    if not isinstance(given.chat_template_kwargs or {}, dict):
        raise ValueError("--chat-template-kwargs must be a JSON object, such as '{\"enable_thinking\": false}'.")
    check_template_kwargs(tokenizer, given.chat_template_kwargs or {}, "--chat-template-kwargs: ")
    notes: Notes = Counter()
    prompts = tokenize_prompts(
        ((label, asked(row, label, given)) for label, row in source),
        tokenizer,
        1 << 62,
        template_kwargs=given.chat_template_kwargs,
        notes=notes,
    )
    for note, count in notes.items():
        print(f"{given.input}: {note}: {count}", file=sys.stderr, flush=True)
    positions = read_config(given.model).get("max_position_embeddings")
    limit = given.max_model_len or positions or 1 << 62
    for prompt, (label, _) in zip(prompts, source, strict=True):
        if len(prompt.tokens) + given.max_tokens > limit:
            whose = (
                f"--max-model-len {given.max_model_len}"
                if given.max_model_len
                else f"the model's {positions} positions"
            )
            raise ValueError(
                f"{label}: the prompt has {len(prompt.tokens)} tokens, which with --max-tokens {given.max_tokens} is more "
                f"than {whose}; use a smaller --max-tokens, or leave the row out."
            )
    needed = max(len(prompt.tokens) for prompt in prompts) + given.max_tokens
    return prompts, given.max_model_len or min(-(-needed // 64) * 64, positions or needed + 63)


def line_of(prompt: Prompt, key: str, row: dict[str, Any], found: Sequence[Sample], tokenizer: Any, logp: bool) -> Line:
    """What is written for one row."""
    more = {"token_ids": [one.tokens for one in found], "logprobs": [one.logp for one in found]} if logp else {}
    return {
        "index": prompt.index,
        "key": key,
        "prompt": prompt.text,
        "response": [decode(tokenizer, one.tokens) for one in found],
        "finish": ["length" if one.truncated else "stop" for one in found],
        "tokens": [len(one.tokens) for one in found],
        **more,
        "row": row,
    }


def generate(given: argparse.Namespace, rank: int, count: int) -> None:
    """Answer what is not answered yet of this process's batches: batch k is that of process k mod `count`."""
    sampling = checked(given)
    config = read_config(given.model)
    # vLLM's own choice would be half precision for weights in float32
    given.dtype = given.dtype or config.get("dtype") or config.get("torch_dtype") or "auto"
    tokenizer = load_tokenizer(given.model, "--model")
    ends = find_ends(given.model, tokenizer)
    if ends.disagreement and rank == 0 and sampling.stop_token_ids is None:
        print(ends.disagreement, file=sys.stderr, flush=True)
    source = list(rows(given.input, "--input"))
    prompts, length = read_prompts(source, tokenizer, given)
    settings = {"the model": fingerprint(given.model), **{option(name): getattr(given, name) for name in DECIDES}}
    told = json.dumps(settings, sort_keys=True)
    keys = [hashlib.blake2b(f"{told}{p.tokens}".encode(), digest_size=8).hexdigest() for p in prompts]
    with ResumableOutput(given.output, settings, rank) as lines:
        check_same_rows(lines.done, keys, lambda index: source[index][0], given.output)
        mine = [chunk for k, chunk in enumerate(chunks(len(prompts), given.batch)) if k % count == rank]
        open_ = [chunk for chunk in mine if any(index not in lines.done for index in chunk)]
        said = Progress(sum(len(chunk) for chunk in mine), sum(len(chunk) for chunk in open_), rank, count)
        if open_:
            engine = OfflineEngine(
                given.model, stop=ends.ids, tensor=given.tensor, dtype=given.dtype,
                max_model_len=length, max_num_seqs=given.max_num_seqs, kv_cache_mib=given.kv_cache_mib,
                gpu_memory_utilization=given.gpu_memory_utilization,
            )  # fmt: skip
        for chunk in open_:
            start = time.perf_counter()
            # the whole batch, though some of its lines may be there: its company has a part in an answer's rounding
            seeds = [
                request_seed(given.seed, -1 - given.seed, index) for index in chunk
            ]  # those of a job's evaluations
            found = engine.answers([prompts[i].tokens for i in chunk], seeds, sampling, given.num_samples)
            made = [
                line_of(prompts[i], keys[i], source[i][1], answers, tokenizer, given.logprobs)
                for i, answers in zip(chunk, found, strict=True)
                if i not in lines.done
            ]
            lines.append(made)
            said.batch(
                len(chunk), sum(len(one.tokens) for answers in found for one in answers), time.perf_counter() - start
            )
        if lines.merge(len(prompts)):
            print(f"{given.output}: {len(prompts):,} rows", flush=True)


class Progress:
    """Rows, tokens a second and the time that is left, on stderr."""

    def __init__(self, rows: int, left: int, rank: int, count: int) -> None:
        self.rows, self.left = rows, left
        self.answered, self.tokens, self.seconds = 0, 0, 0.0
        self.name = f"[{rank}] " if count > 1 else ""
        if left < rows:
            self._say(f"{rows - left:,} of {rows:,} rows were answered before")

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        """A batch is on the disk."""
        self.left, self.tokens, self.seconds = self.left - rows, self.tokens + tokens, self.seconds + seconds
        self.answered += rows
        done, speed = self.rows - self.left, self.tokens / self.seconds
        left = f", {duration(self.seconds / self.answered * self.left)} left" if self.left else ""
        self._say(f"{done:,} of {self.rows:,} rows, {done / self.rows:.0%}; {speed:,.0f} tokens/s{left}")

    def _say(self, text: str) -> None:
        print(f"{self.name}{text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = options().parse_args(arguments)
    try:
        rank, count = take_devices(os.environ, given.tensor)
        generate(given, rank, count)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where this one stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
