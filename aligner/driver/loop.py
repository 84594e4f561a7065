"""Drive a loop: evaluate, log, write samples, save and report. What is not the algorithm stands here."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import yaml

from aligner.algorithms.step import Step
from aligner.data.preferences import told
from aligner.driver.batches import batches
from aligner.driver.evaluate import Evaluation
from aligner.driver.metrics import CONFIG_FILE, METRICS_FILE, MetricsWriter
from aligner.driver.report import write_report
from aligner.driver.samples import write_samples
from aligner.reshard.ledger import total
from aligner.reward.pool import Status
from aligner.roles import Roles, build_roles
from aligner.spmd.ref import Ref
from aligner.spmd.timeline import FOLDER
from aligner.spmd.world import World

if TYPE_CHECKING:
    from aligner.driver.job import Job

PHASES = {
    "generate": "generate",
    "score": "score",
    "logprobs": "logprobs",
    "values": "values",
    "scores": "scores",
    "update": "update",
    "reshard_to": "reshard",
}
"""Role call -> name of its seconds, and of its memory in GiB, in a row."""
PEAK = {"peak": "peak"}


def run_job(job: Job, world: World) -> None:
    """Build the roles and drive the loop to its end."""
    roles = build_roles(job.config, job.roles, world, job.checked.meshes, job.checked.spec, job.checked.tokenizer)
    driver = Driver(job, world, roles)
    try:
        driver.run()
    finally:
        if driver.writer:
            driver.writer.close()


class Driver:
    """The same object on every rank; only rank 0 writes."""

    def __init__(self, job: Job, world: World, roles: Roles) -> None:
        self.job, self.config, self.world, self.roles = job, job.config, world, roles
        self.run_dir = Path(job.config.run_dir)
        self.writer: MetricsWriter | None = None
        if world.rank == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / METRICS_FILE).unlink(missing_ok=True)  # checked: overwrite=true where it is there
            (self.run_dir / CONFIG_FILE).write_text(yaml.safe_dump(_plain(job.config), sort_keys=False))
            logging = job.config.logging
            self.writer = MetricsWriter(
                self.run_dir, logging.console, logging.wandb_run(), job.config.train.steps, logging.every
            )

    def run(self) -> None:
        """The loop with everything around it."""
        train = self.config.train
        evaluation = Evaluation(self.roles, self.job.checked, self.config)
        evaluates = bool(train.eval_every and evaluation.able)
        left_out = self.job.checked.data.left_out
        if self.writer and left_out.total():
            self.writer.note(f"rows of data.path left out: {told(left_out)}")
        if evaluates:
            self._log(0, evaluation.run())
        stream = batches(self.config, self.job.checked)
        self._trace()
        start = time.perf_counter()
        self._accounts()
        self._at(1)
        for step, result in enumerate(self.job.loop(self.roles, stream, self.job.settings), start=1):
            row = self._row(result, time.perf_counter() - start)
            if evaluates and (step % train.eval_every == 0 or step == train.steps):
                row |= evaluation.run()
                peak = self._accounts()["memory_peak"]  # an evaluation's calls are no part of the next step's
                row["memory_peak"] = max(row["memory_peak"], peak)
            self._log(step, row)
            self._write_samples(step, result)
            if step == train.steps:
                return self._finish()
            self._at(step + 1)
            start = time.perf_counter()
        raise ValueError(
            f"the loop yielded {self.world.journal.step - 1} steps of train.steps={train.steps} and ended; it must yield "
            "one per batch, and batches never run out."
        )

    def _trace(self) -> None:
        """Start this rank's timeline."""
        world, steps = self.world, self.config.logging.timeline_steps
        if self.writer:
            shutil.rmtree(self.run_dir / FOLDER, ignore_errors=True)  # of a run that is overwritten
        if steps:
            roles = [role.name for role in self.roles.built if role.member]
            dist.barrier()
            world.timeline.open(self.run_dir, f"rank {world.rank}: {', '.join(roles)}", steps)

    def _at(self, step: int) -> None:
        self.world.journal.step = step
        self.world.timeline.at(step)

    def _row(self, result: Step, seconds: float) -> dict[str, float]:
        """Everything known of one iteration, on every rank."""
        row: dict[str, float] = dict(result.metrics.get()) if result.metrics is not None else {}
        for name, value in result.more.items():
            row |= {f"{name}_{key}": n for key, n in value.get().items()} if isinstance(value, Ref) else {name: value}
        if result.scores is not None:
            row |= result.scores.get().row()
        if result.samples is not None:
            row |= self._sample_row(result)
        row |= self._accounts()
        row["seconds"] = seconds
        if "tokens" in row:
            row["tokens_per_second"] = row["tokens"] / seconds
        return row

    def _sample_row(self, result: Step) -> dict[str, float]:
        assert result.samples is not None
        length_B = result.samples["length_B"].get() - result.samples["prompt_len_B"].get()
        return {
            "length": length_B.float().mean().item(),
            "truncated": result.samples["truncated_B"].get().float().mean().item(),
        }

    def _accounts(self) -> dict[str, float]:
        """Seconds and memory by phase since the last time (the most of any rank) and the last sync's ledger over all."""
        mine: Counter[str] = Counter()
        roles = self.roles
        for role in roles.built:
            mine.update(role.seconds)
            role.seconds.clear()
        syncs = roles.policy.syncs.values() if "rollout" in self.job.roles else ()
        rows = [sync.ledger[-1] for sync in syncs if sync.ledger]
        found: list[Any] = [None] * self.world.size
        with self.world.timeline.span("wait", "end of the step", range(self.world.size)):
            dist.all_gather_object(found, (dict(mine), rows, self.world.residency.meter.take()))
        ledger = total([row for _, rows, _ in found for row in rows]).metrics() if "rollout" in self.job.roles else {}
        slowest, largest = _over_ranks([mine for mine, _, _ in found]), _over_ranks([memory for _, _, memory in found])
        ledger |= {f"seconds_{name}": slowest[call] for call, name in PHASES.items() if call in slowest}
        return ledger | {f"memory_{name}": largest[call] for call, name in (PHASES | PEAK).items() if call in largest}

    def _log(self, step: int, row: dict[str, float]) -> None:
        if self.writer:
            self.writer.log(step, row)

    def _write_samples(self, step: int, result: Step) -> None:
        logging = self.config.logging
        wanted = logging.samples_every and (step % logging.samples_every == 0 or step in (1, self.config.train.steps))
        if not wanted or result.scores is None or result.samples is None:
            return
        scores = [result.scores[name].get() for name in ("response", "reward_B", "status_B")]
        fields = result.samples["fields"].get()
        if self.world.rank == 0:
            items = [
                {"prompt": row.get("prompt", ""), "response": text, "reward": reward.item(), "status": Status(int(status)),
                 "fields": {k: v for k, v in row.items() if k != "prompt"}}
                for row, text, reward, status in zip(fields, *scores, strict=True)
            ]  # fmt: skip
            write_samples(self.run_dir, step, items[: logging.samples_count])

    def _finish(self) -> None:
        self.world.timeline.close()
        dist.barrier()  # the report reads every rank's
        saved = (
            {role.name: self.run_dir / ("model" if role.name == "policy" else role.name) for role in self.roles.trained}
            if self.config.train.save
            else {}
        )
        for role in self.roles.trained:
            if role.name in saved:
                role.save_checkpoint(saved[role.name])
        if self.writer:
            self.writer.close()
            for name, folder in saved.items():
                print(f"{name}: {folder}")
            if self.config.train.report:
                png, html = write_report(self.run_dir)
                print(f"curve:  {png}\nreport: {html}")


def _over_ranks(found: list[dict[str, float]]) -> dict[str, float]:
    """The largest value of any rank."""
    return {name: max(one.get(name, 0.0) for one in found) for name in {name for one in found for name in one}}


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as YAML can hold it (no tuples, no objects)."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return values
