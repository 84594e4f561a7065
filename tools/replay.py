"""Show a saved episode turn by turn; play it again; compare its log-probabilities with a model's.

python tools/replay.py RUN STEP EPISODE                      its turns, tool calls and rewards
python tools/replay.py RUN STEP EPISODE --again              also plays it again in a fresh environment, and says what differs
python tools/replay.py RUN STEP EPISODE --model RUN/exports/step_40 [--version 40]
                                                             also compares log-probabilities over the exact token ids

RUN is a run's folder, STEP a step whose samples it keeps (logging.samples_every), EPISODE a row of that step's samples, from 0.
Sampled text is green in a terminal, and stands in [+...+] elsewhere. --again feeds the recorded turns to the environment that the
run's configuration names; nothing is sampled. --model loads a Hugging Face folder with transformers in float32 and computes each
segment by itself; of a run whose weights changed between tokens, --version says which ones the folder holds (default: those of
the episode's last token). Exit status: 0; 1 if something differs; 2 for an error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import OmegaConf

from aligner.config.schema import Config, to_config
from aligner.data.end_tokens import find_ends
from aligner.data.token_view import Part, pieces_of
from aligner.data.tokenizer import load_tokenizer, use_chat_template
from aligner.paths import path_option
from aligner.report.metrics import CONFIG_FILE
from aligner.report.sample_records import RecordedTurn, SampleRecord, read_records
from aligner.rollout.config import Sampling
from tools.show_data import COLORS, MARKS, marked, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOLERANCE = 1e-4
"""Largest difference of log-probabilities between float32 engines, in nats."""


def read_run(run: Path) -> Config:
    """The run's configuration. Raises ValueError if RUN is no run's folder."""
    path = run / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run} has no {CONFIG_FILE}; give the run_dir of a job.")
    return to_config(OmegaConf.load(path))  # type: ignore[arg-type]


def read_episode(run: Path, step: int, row: int) -> SampleRecord:
    """A saved row. Raises ValueError naming those that there are."""
    records = list(read_records(run, step))
    if not 0 <= row < len(records):
        raise ValueError(
            f"step {step} of {run} keeps rows 0 to {len(records) - 1}, not {row} (logging.samples_count sets how many)."
        )
    return records[row]


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, with the run's chat template."""
    tokenizer = load_tokenizer(config.model.path)
    if config.data.chat_template is not None:
        use_chat_template(tokenizer, config.data.chat_template)
    return tokenizer


def shown(record: SampleRecord, tokenizer: PreTrainedTokenizerBase, color: bool) -> Iterator[str]:
    """The episode as lines: a heading, then each segment's texts in order, sampled ones marked, with what is known of each."""
    sampled = sum(turn.stop - turn.start for turn in record.turns)
    yield _bold(
        f"row {record.row}: {_reward(record.reward)} ({record.status}), {len(record.turns)} turns, {sampled} sampled of "
        f"{len(record.tokens)} tokens" + (f", {len(record.segments)} segments" if len(record.segments) > 1 else ""),
        color,
    )
    if record.episode is not None:
        detail = record.episode.get("detail")
        yield f"ended: {visible(str(record.episode['ended']))}" + (f" ({visible(str(detail))})" if detail else "")
        metrics = {**record.components, **(record.episode.get("metrics") or {})}
    else:
        metrics = dict(record.components)
    if metrics:
        yield ", ".join(f"{name} {_number(value)}" for name, value in metrics.items())
    marks, calls = COLORS if color else MARKS, tool_calls(record)
    ends = [*record.segments[1:], len(record.tokens)]
    for number, (start, stop) in enumerate(zip(record.segments, ends, strict=True), 1):
        if len(ends) > 1:
            yield _bold(f"--- segment {number}", color)
        place = start
        for turn in (turn for turn in record.turns if start <= turn.start < stop):
            yield from _text(record, tokenizer, place, turn.start, False, marks)
            yield _bold(f"--- turn {turn.number}: {_of_turn(turn)}", color)
            yield from _text(record, tokenizer, turn.start, turn.stop, True, marks)
            yield from (f"    calls {visible(call)}" for call in calls.get(turn.number, ()))
            place = turn.stop
        yield from _text(record, tokenizer, place, stop, False, marks)


def tool_calls(record: SampleRecord) -> dict[int, list[str]]:
    """Tool calls by turn, as "name(arguments)", of the record's messages; what has none is not there."""
    messages = (record.episode or {}).get("messages") or []
    answers = [message for message in messages if message.get("role") == "assistant"][-len(record.turns) or None :]
    if len(answers) != len(record.turns):
        return {}
    calls: dict[int, list[str]] = {}
    for turn, message in zip(record.turns, answers, strict=True):
        for call in message.get("tool_calls") or ():
            function: Mapping[str, Any] = call.get("function", call)
            calls.setdefault(turn.number, []).append(f"{function.get('name')}({function.get('arguments')})")
    return calls


def _text(
    record: SampleRecord,
    tokenizer: PreTrainedTokenizerBase,
    start: int,
    stop: int,
    sampled: bool,
    marks: Mapping[Part, tuple[str, str]],
) -> Iterator[str]:
    if start < stop:
        yield marked(pieces_of(tokenizer, record.tokens[start:stop], [sampled] * (stop - start)), marks)


def _of_turn(turn: RecordedTurn) -> str:
    parts = [f"{turn.stop - turn.start} tokens"]
    if turn.reward is not None:
        parts.append(_reward(turn.reward))
    known = [value for value in turn.logp if value is not None]
    if known:
        parts.append(f"log p {sum(known):.3f}")
    if turn.versions:
        low, high = min(turn.versions), max(turn.versions)
        parts.append(f"weights {low}" if low == high else f"weights {low} to {high}")
    return ", ".join(parts)


def _reward(value: float | None) -> str:
    return "no reward" if value is None else f"reward {value:.3f}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{float(value):g}"


def _bold(text: str, color: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if color else text


@dataclass(frozen=True)
class LogpComparison:
    """Recorded log-probabilities beside a model's."""

    version: int | None
    """Of the weights whose tokens were compared; None: it is not known, and all were."""
    compared: int
    left_out: int
    """Tokens that other weights sampled."""
    largest: float
    """Largest absolute difference, in nats."""

    def __str__(self) -> str:
        of = "" if self.version is None else f" of weights {self.version}"
        rest = f" ({self.left_out} of other weights left out)" if self.left_out else ""
        return f"log-probabilities of {self.compared} tokens{of} differ by at most {self.largest:.2e} nats{rest}"


def compare_logprobs(record: SampleRecord, model: Path, sampling: Sampling, version: int | None) -> LogpComparison:
    """Each segment by itself through transformers, in float32.

    Raises:
        ValueError: the run sampled from a cut distribution, or no token is of this version.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if sampling.top_p < 1 or sampling.top_k > 0:
        raise ValueError(
            f"the run sampled with top_p={sampling.top_p} and top_k={sampling.top_k}: its log-probabilities are those of "
            "the cut distribution; only runs with top_p=1 and top_k=0 are compared."
        )
    versions = sorted({one for turn in record.turns for one in turn.versions})
    version = versions[-1] if version is None and versions else version
    if version is not None and version not in versions:
        raise ValueError(f"no token was sampled by weights {version}; use one of {', '.join(map(str, versions))}.")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    compared, left_out, largest = 0, 0, 0.0
    for start, stop in zip(record.segments, [*record.segments[1:], len(record.tokens)], strict=True):
        turns = [turn for turn in record.turns if start <= turn.start < stop]
        if not turns:
            continue
        tokens = torch.tensor(record.tokens[start:stop])
        with torch.no_grad():
            logits = network(tokens[None], use_cache=False).logits[0, :-1].float()
        logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1).gather(-1, tokens[1:, None])[:, 0].tolist()
        for turn in turns:
            for place, recorded in enumerate(turn.logp):
                if version is not None and turn.versions[place] != version:
                    left_out += 1
                elif recorded is not None:
                    compared += 1
                    largest = max(largest, abs(recorded - logp[turn.start + place - start - 1]))
    return LogpComparison(version, compared, left_out, largest)


def play_again(config: Config, record: SampleRecord, tokenizer: PreTrainedTokenizerBase, wait_s: float) -> list[str]:
    """What differs when the run's environment is given the recorded turns, in words."""
    from aligner.models.read_spec import read_spec
    from aligner.roles.episode_source import make_source
    from aligner.rollout.episodes.replay import Difference, replay

    if not config.environment.enabled:
        raise ValueError("the run has no environment (environment.target).")
    spec = read_spec(config.model.path, config.model.trust_remote_code)
    ends = dict.fromkeys([*spec.eos_token_ids, *find_ends(config.model.path, tokenizer).ids])  # as the job has them
    source = make_source(config, tokenizer, replace(spec, eos_token_ids=tuple(ends)))
    stop = {*(config.sampling.stop_token_ids or ()), *ends}

    def in_words(difference: Difference) -> str:
        if difference.what != "the context":
            return visible(str(difference))
        recorded, now = difference.recorded, difference.now
        shared = next((i for i, (a, b) in enumerate(zip(recorded, now, strict=False)) if a != b), None)
        shared = min(len(recorded), len(now)) if shared is None else shared
        texts = (visible(tokenizer.decode(ids[shared:])) for ids in (recorded, now))
        return f"{difference.where}: the context differs from token {shared} on:\n  recorded: {next(texts)}\n  now:      {next(texts)}"

    try:
        return [in_words(one) for one in replay(source, record, stop, wait_s)]
    finally:
        source.close()


def options() -> argparse.ArgumentParser:
    """The command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=path_option, help="a run's folder")
    add("step", type=int, help="a step whose samples it keeps")
    add("episode", type=int, help="a row of these samples, from 0")
    add("--again", action="store_true", help="play it again in a fresh environment")
    add("--wait", type=float, default=120.0, help="seconds for one answer of the environment (default %(default)s)")
    add("--model", type=path_option, help="a Hugging Face folder to compare log-probabilities with")
    add("--version", type=int, help="number of updates of that folder's weights")
    add("--tolerance", type=float, default=TOLERANCE, help="largest difference in nats (default %(default)s)")
    add("--color", choices=["auto", "always", "never"], default="auto", help="default: in a terminal, without NO_COLOR")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit status."""
    args = options().parse_args(arguments)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    status = 0
    try:
        config, record = read_run(args.run), read_episode(args.run, args.step, args.episode)
        tokenizer = tokenizer_of(config)
        print("\n".join(shown(record, tokenizer, color)))
        if args.model is not None:
            comparison = compare_logprobs(record, args.model, config.sampling, args.version)
            print(f"\n{comparison}")
            status = max(status, int(not comparison.largest <= args.tolerance))
        if args.again:
            differences = play_again(config, record, tokenizer, args.wait)
            print(
                "\nplayed again: " + ("\n".join(["it differs", *differences]) if differences else "all is as recorded")
            )
            status = max(status, int(bool(differences)))
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
