"""What turns and environments cost the rollout: python tools/bench/episodes.py [--engine vllm|transformers] [--model DIR]

turns     the same tokens as single responses and as episodes of several turns whose environment answers at once, for several
          lengths of a turn: sampled tokens/s of both and their ratio, by wall and by CPU time; medians of alternated repeats. (A
          turn reads the last, unfilled block of the prefix cache again, so short turns cost more.)
waiting   many episodes at once whose environments take 0.1 to 2 s a turn: the share of the time in which the engine was idle, over
          the whole play and over the part of it in which enough episodes were open

Prints one JSON object. The engine stands alone in this process, with a small model that is written for the purpose, or --model.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from aligner.data.column_addition import ModelShape, write_model
from aligner.data.prompts import Prompt
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.episodes.driver import Episodes
from aligner.rollout.episodes.source import Ask, Ended
from aligner.rollout.kind import Place
from aligner.rollout.requests import Sample
from aligner.rollout.standalone import standalone_engine

SHAPE = ModelShape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768)


class Clockwork:
    """Each episode has `turns` turns; after a turn the environment adds `added` ids, after a wait that is drawn from `delay_s`."""

    def __init__(self, turns: int, added: int, delay_s: tuple[float, float] = (0.0, 0.0)) -> None:
        self.turns, self.added, self.delay_s = turns, added, delay_s
        self._draw = random.Random(0)
        self._due: list[tuple[float, int, Ask | Ended]] = []
        self._context: dict[int, list[int]] = {}

    def start(self, episode: int, task: Prompt, seed: int) -> None:
        self._context[episode] = list(task.tokens)
        self._push(Ask(episode, 1, task.tokens, True))

    def _push(self, event: Ask | Ended) -> None:
        heapq.heappush(self._due, (time.monotonic() + self._draw.uniform(*self.delay_s), event.episode, event))

    def poll(self, wait_s: float) -> list[Ask | Ended]:
        if wait_s and self._due:
            time.sleep(max(0.0, min(wait_s, self._due[0][0] - time.monotonic())))
        events, now = [], time.monotonic()
        while self._due and self._due[0][0] <= now:
            events.append(heapq.heappop(self._due)[2])
        return events

    def answer(self, episode: int, turn: int, sample: Sample) -> None:
        context = self._context[episode]
        context += [*sample.tokens, *[5 + turn] * self.added]
        if turn == self.turns:
            self._push(Ended(episode, 1.0, (0.0,) * turn, "done", {}))
        else:
            self._push(Ask(episode, turn + 1, tuple(context), False))

    def pause(self, episode: int) -> None:
        pass

    def abandon(self, episodes: Collection[int]) -> None:
        return

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        return


def tasks(count: int, length: int, vocab: int) -> list[Prompt]:
    draw = random.Random(1)
    rows = [tuple(draw.randrange(3, vocab) for _ in range(length)) for _ in range(count)]
    return [Prompt(tokens, "", {}, index) for index, tokens in enumerate(rows)]


def single(engine: RolloutEngine, asked: Sequence[Prompt], tokens: int) -> int:
    """Sampled tokens."""
    sampling = Sampling(max_tokens=tokens, stop_token_ids=())
    groups = engine.generate([list(task.tokens) for task in asked], [1000 * task.index for task in asked], sampling)
    return sum(len(one.tokens) for group in groups for one in group)


def played(engine: RolloutEngine, asked: Sequence[Prompt], tokens: int, source: Clockwork) -> tuple[int, Episodes]:
    """(sampled tokens, the driver with its figures)."""
    driver = Episodes(engine, source, lambda: None)
    episodes = [driver.begin(task, Place(0, 1, task.index, 0)) for task in asked]
    done = driver.finish(driver.resume(episodes, Sampling(max_tokens=tokens, stop_token_ids=())))
    return sum(len(turn.sample.tokens) for one in done for turn in one.turns), driver


def timed(run: Callable[[], int]) -> tuple[float, float]:
    """(tokens/s by wall, tokens/s by CPU time)."""
    began, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu)


def turns_case(engine: RolloutEngine, args: argparse.Namespace, length: int) -> dict[str, float]:
    """Turns of `length` tokens; the prompt of a single response has what the environment adds in the episode."""
    asked = tasks(args.episodes, args.prompt, engine.spec.vocab)
    longer = tasks(args.episodes, args.prompt + (args.turns - 1) * args.added, engine.spec.vocab)
    of_single, of_turns = [], []
    for repeat in range(args.repeats + 1):
        engine.new_weights()
        one = timed(lambda: single(engine, longer, args.turns * length))
        engine.new_weights()
        other = timed(lambda: played(engine, asked, length, Clockwork(args.turns, args.added))[0])
        if repeat:  # the first warms up
            of_single.append(one)
            of_turns.append(other)
    single_wall, single_cpu = (median(values) for values in zip(*of_single, strict=True))
    turns_wall, turns_cpu = (median(values) for values in zip(*of_turns, strict=True))
    return {
        "single_tokens_per_second": round(single_wall),
        "turns_tokens_per_second": round(turns_wall),
        "ratio_wall": round(turns_wall / single_wall, 3),
        "ratio_cpu": round(turns_cpu / single_cpu, 3),
    }


def waiting_case(engine: RolloutEngine, args: argparse.Namespace) -> dict[str, float]:
    """The engine is idle at the start, until the first environment has answered, and in the end, when few episodes are open."""
    asked = tasks(args.waiting_episodes, args.prompt, engine.spec.vocab)
    engine.new_weights()
    idle_steps: list[tuple[float, float, int]] = []
    began = time.monotonic()
    source = Clockwork(args.waiting_turns, args.added, (args.fastest, args.slowest))
    tokens, driver = _watched(engine, asked, args.waiting_tokens, source, idle_steps)
    seconds = time.monotonic() - began
    half = len(asked) // 2
    open_enough = [(length, idle) for length, idle, still_open in idle_steps if still_open >= half]
    return {
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "idle_share": round(driver.figures.idle_s / driver.figures.total_s, 4),
        "idle_share_while_half_are_open": round(
            sum(idle for _, idle in open_enough) / max(1e-9, sum(length for length, _ in open_enough)), 4
        ),
        "environment_seconds": round(driver.figures.environment_s / driver.figures.answers, 3),
    }


def _watched(
    engine: RolloutEngine,
    asked: Sequence[Prompt],
    tokens: int,
    source: Clockwork,
    steps: list[tuple[float, float, int]],
) -> tuple[int, Episodes]:
    """As `played`; notes (seconds, idle seconds, open episodes) of each step."""
    driver = Episodes(engine, source, lambda: None)
    ticket = driver.resume(
        [driver.begin(task, Place(0, 1, task.index, 0)) for task in asked],
        Sampling(max_tokens=tokens, stop_token_ids=()),
    )
    last = [0.0, 0.0]

    def note() -> bool:
        figures = driver.figures
        steps.append((figures.total_s - last[0], figures.idle_s - last[1], len(driver._playing)))
        last[:] = figures.total_s, figures.idle_s
        return False

    driver.work_until(note)
    done = driver.finish(ticket)
    return sum(len(turn.sample.tokens) for one in done for turn in one.turns), driver


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--engine", default="vllm")
    for name, default in {
        "episodes": 64, "turns": 8, "added": 8, "prompt": 32, "repeats": 3,
        "waiting-episodes": 256, "waiting-turns": 8, "waiting-tokens": 32,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128], help="sampled in a turn")
    parser.add_argument("--fastest", type=float, default=0.1, help="shortest answer of an environment, in seconds")
    parser.add_argument("--slowest", type=float, default=2.0)
    parser.add_argument("--only", choices=["turns", "waiting"])
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "model"
        if args.model is None:
            write_model(model, SHAPE, 0)
            written = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**written, "max_position_embeddings": 4096}))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        turn, turns = max(*args.tokens, args.waiting_tokens), max(args.turns, args.waiting_turns)
        length = args.prompt + turns * (turn + args.added)
        config = RolloutConfig(engine=args.engine, max_model_len=length, max_num_seqs=256, kv_cache_mib=1024)
        with standalone_engine(model, config, device, ()) as engine:
            found: dict[str, Any] = {"engine": args.engine, "device": device.type}
            if args.only != "waiting":
                found["turns"] = {length: turns_case(engine, args, length) for length in args.tokens}
            if args.only != "turns":
                found["waiting"] = waiting_case(engine, args)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
