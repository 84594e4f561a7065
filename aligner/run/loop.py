"""Drive a loop: evaluate, log, write samples, save and report. What is not the algorithm stands here."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
import yaml

from aligner.algorithms.step import Step, checked_step
from aligner.check.rollout import shown_ends
from aligner.check.run_folder import models_of
from aligner.config.as_json import config_as_json
from aligner.data.left_out import left_out_text
from aligner.health.timeline import FOLDER, STEP_END
from aligner.models.checkpoint import PeerFailedError
from aligner.report.metrics import CONFIG_FILE, MetricsWriter
from aligner.report.sample_records import write_records
from aligner.report.samples import write_samples
from aligner.report.write import write_report
from aligner.reward.role import Reward
from aligner.reward.signals import start_tracker
from aligner.roles.build import Roles, build_roles
from aligner.run.batches import batches, training_rows
from aligner.run.best import Best
from aligner.run.checkpointing import RunCheckpointer
from aligner.run.evaluate import Evaluation
from aligner.run.exports import Exports, line_of
from aligner.run.guards import Guards
from aligner.run.input_digests import rows_of
from aligner.run.job import Job
from aligner.run.memory import open_account
from aligner.run.random_states import seed_all
from aligner.run.saved_samples import collect_samples
from aligner.run.signals import Signals
from aligner.run.step_row import step_row
from aligner.run.step_stats import StepStats
from aligner.spmd.memory_account import MemoryFigures
from aligner.spmd.messages import all_gather, broadcast
from aligner.spmd.world import World


def run_job(job: Job) -> NoReturn:
    """Start the world, drive the loop on this rank, leave. The process ends here."""
    start_tracker()  # before a library does, whose would die of Slurm's SIGUSR1
    world = World(job.config.timeout_seconds, job.config.hang, job.config.run_dir)
    job.startup.mark("process groups")
    world.watch.hide = job.mask.text
    if job.lease:
        world.on_leave(job.lease.release)
    try:
        drive(job, world)
    except BaseException as error:
        world.fail(error)
    world.leave()


def _collect_from_now() -> None:
    """Have garbage collected again, which `aligner.main` has turned off for the start; what stands now stays to the end of the
    job, and no collection looks through it (0.6 s each)."""
    if gc.isenabled():
        return
    gc.collect()
    gc.freeze()
    gc.enable()


def drive(job: Job, world: World) -> None:
    """Build the roles and drive the loop to its end."""
    seed_all(job.config.seed)
    open_account(world, job.config.residency)
    roles = build_roles(
        job.config, job.roles, world, job.checked.meshes, job.checked.spec, job.checked.tokenizer, job.startup
    )
    driver = Driver(job, world, roles)
    try:
        driver.run()
    finally:
        if driver.writer:
            driver.writer.close()


@dataclass(frozen=True)
class Verdict:
    """What rank 0 has decided at the end of a step; every rank does it."""

    stop: str | None = None
    """Why the job ends."""
    leave: str = ""
    """The signal that asks it to save and leave."""
    memory: MemoryFigures = field(default_factory=MemoryFigures)
    """The most that any rank has measured in the step."""
    rewards: Mapping[int, list[float]] = field(default_factory=dict)
    """Of a curriculum by success: a prompt's index -> rewards of its samples."""


class Driver:
    """The same object on every rank; only rank 0 writes."""

    def __init__(self, job: Job, world: World, roles: Roles) -> None:
        self.job, self.config, self.world, self.roles = job, job.config, world, roles
        self.run_dir = Path(job.config.run_dir)
        self.guards, self.signals = Guards(job.config.guards), Signals()
        metric = job.checked.best_metric
        best = Best(metric) if metric else None
        digests = {name: job.inputs[rows_of(name)] for name in job.checked.data.parts if rows_of(name) in job.inputs}
        self.rows = training_rows(job.config, job.checked, digests)
        for role in roles.built:
            if isinstance(role, Reward):
                role.keeps_scored = self.rows.mixed or self.rows.measures
        self.durable = RunCheckpointer(job, world, roles, self.rows)
        self.before = self.durable.restore()
        """Steps that an earlier start of this run has made."""
        self.exports = Exports(roles.main, self.run_dir, self.config.train, best, self._note, self.durable.run)
        self._recall(self.durable.driver)
        self.writer: MetricsWriter | None = None
        if world.rank == 0:
            (self.run_dir / CONFIG_FILE).write_text(
                yaml.safe_dump(config_as_json(job.config, job.mask), sort_keys=False)
            )
            logging, steps = job.config.logging, job.config.train.steps
            self.writer = MetricsWriter(
                self.run_dir, logging.console, logging.wandb_run(), steps, logging.every, job.mask.text, self.before
            )

    def run(self) -> None:
        """The loop with everything around it."""
        train = self.config.train
        evaluation = Evaluation(self.roles, self.job.checked, self.config)
        evaluates = bool(train.eval_every and evaluation.able)
        _collect_from_now()
        self._greet()
        if self.writer:
            self.writer.note(self.job.startup.text())
        if evaluates and not self.before:
            row = evaluation.run()
            self._log(0, row)
            self.exports.after(0, row, True)
        if self.before >= train.steps:
            return self._finish()
        stream = batches(self.config, self.rows)
        self._trace()
        self._forget()
        start, held_up = time.perf_counter(), 0.0
        self._at(self.before + 1)
        self.world.activity.in_loop = True
        for step, yielded in enumerate(self._steps(stream), start=self.before + 1):
            result = checked_step(yielded, self._loop_name)
            seconds = time.perf_counter() - start
            row, stats = step_row(self.world, self.roles, result, seconds, self.signals.asked)
            rewards = stats.rewards()  # of all ranks on the first one, which tells the others
            row |= self.rows.reward_metrics(rewards)
            if step == self.before + 1:
                row |= self.job.checked.data.metrics()
            if held_up:
                row["seconds_checkpoint"], held_up = held_up, 0.0
            evaluated = evaluates and (step % train.eval_every == 0 or step == train.steps)
            if evaluated:
                row |= evaluation.run()
            verdict = self._agree(step, row, stats, rewards)
            self.rows.record(verdict.rewards)
            row |= self.rows.metrics()  # of the curriculum with this step's samples
            self._log(step, row)
            self.exports.after(step, row, evaluated)
            self._write_samples(step, result)
            if verdict.stop:
                raise ValueError(verdict.stop)
            if verdict.leave or self.durable.due(step):
                held_up = self._save(step)
            self._forget()  # the calls of evaluations, exports and checkpoints are no part of the next step's
            if verdict.leave:
                return self._leave(step, verdict.leave)
            if step == train.steps:
                return self._finish()
            self._at(step + 1)
            start = time.perf_counter()
        raise ValueError(
            f"the loop yielded {self.world.journal.step - 1} steps of train.steps={train.steps} and ended; it must yield "
            "one per batch, and batches never run out."
        )

    @property
    def _loop_name(self) -> str:
        return f"algorithm._target_={self.job.config.algorithm.get('_target_')}"

    def _steps(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The user's loop, begun."""
        steps = self.job.loop(self.roles, stream, self.job.settings)
        if not isinstance(steps, Iterator):
            raise ValueError(
                f"{self._loop_name} returned {steps!r}; a loop is a generator function, which yields a Step for each batch."
            )
        return steps

    def _greet(self) -> None:
        checked, data = self.job.checked, self.job.checked.data
        if self.writer and data.left_out.total():
            self.writer.note(f"rows of data.path left out: {left_out_text(data.left_out)}")
        if self.writer and data.heldout_left_out.total():
            self.writer.note(f"held-out rows left out: {left_out_text(data.heldout_left_out)}")
        for error in data.wrong if self.writer else ():
            self._note(f"skipped (data.on_error=skip): {error}")
        if self.writer and data.notes:
            self.writer.note(f"data.path: {left_out_text(data.notes)}")
        if self.writer and checked.ends.disagreement:
            self.writer.note(f"{checked.ends.disagreement}; {shown_ends(self.config, checked.ends)}")
        if self.writer and self.before:
            self.writer.note(f"going on after step {self.before}, from the checkpoint in {self.run_dir}")

    def _save(self, step: int) -> float:
        """Begin a checkpoint. Returns the seconds that the loop was held up."""
        began = time.perf_counter()
        if self.writer:
            self.writer.sync()
        self.durable.save(step, self._memory())
        return time.perf_counter() - began

    def _memory(self) -> dict[str, Any]:
        """What this object itself must know to go on."""
        best = self.exports.best
        return {"guards": self.guards.state(), "best": best.state() if best else None}

    def _recall(self, memory: Mapping[str, Any]) -> None:
        if not memory:
            return self.exports.clear()
        self.guards.restore(memory["guards"])
        if self.exports.best and memory["best"]:
            self.exports.best.restore(memory["best"])

    def _leave(self, step: int, signal: str) -> None:
        trouble = self.durable.wait()
        if trouble:
            raise ValueError(
                f"{signal}: the checkpoint of step {step} could not be written ({trouble}); mend that, and the same command "
                "goes on from the last one that is whole."
            )
        self.world.timeline.close()
        if self.writer:
            self.writer.note(f"{signal}: saved after step {step}; the same command goes on from there")
            self.writer.close()

    def _trace(self) -> None:
        """Start this rank's timeline."""
        world, steps = self.world, self.config.logging.timeline_steps
        if self.writer:
            for left in (self.run_dir / FOLDER).glob("rank*.json"):  # of a run that is overwritten
                left.unlink(missing_ok=True)
        if steps:
            roles = [role.name for role in self.roles.built if role.member]
            dist.barrier()
            world.timeline.open(self.run_dir, f"rank {world.rank}: {', '.join(roles)}", steps)

    def _at(self, step: int) -> None:
        self.world.journal.step = step
        self.world.timeline.at(step)

    def _agree(self, step: int, row: dict[str, float], stats: StepStats, rewards: Mapping[int, list[float]]) -> Verdict:
        """What rank 0 makes of its row, and what it says, known to every rank; it adds guard/NAME to the row."""
        verdict = Verdict()
        if self.writer:
            findings = self.guards.look(step, row)
            row |= {f"guard/{one.guard}": 1.0 for one in findings}
            for one in (one for one in findings if one.say and not one.stop):
                self.writer.note(f"! {one.text}")
            stop = next((f"{one.text}; guards.{one.guard}.action=stop." for one in findings if one.stop), None)
            taken = self.job.lease.lost if self.job.lease else ""
            if taken:
                stop = f"run_dir={self.run_dir} has been taken over by {taken}, while this job stood still."
            verdict = Verdict(stop, stats.asked, stats.figures, rewards if self.rows.measures else {})
        self.world.journal.enter("the first rank's verdict")
        with self.world.timeline.span("call", STEP_END):
            verdict = broadcast(self.world, verdict, (0,), range(self.world.size))
        self.world.residency.learn(verdict.memory)
        return verdict

    def _forget(self) -> None:
        """What was measured so far is no part of the next row."""
        for role in self.roles.built:
            role.seconds.clear()
            if isinstance(role, Reward):
                role.take_scored()
        self.world.residency.meter.take()

    def _note(self, text: str) -> None:
        if self.writer:
            self.writer.note(text)

    def _log(self, step: int, row: dict[str, float]) -> None:
        if self.writer:
            self.writer.log(step, row)

    def _write_samples(self, step: int, result: Step) -> None:
        logging = self.config.logging
        wanted = logging.samples_every and (step % logging.samples_every == 0 or step in (1, self.config.train.steps))
        if not wanted:
            return
        collected = collect_samples(self.world, result, logging.samples_count, self.job.checked.tokenizer)
        if collected is not None:
            items, records = collected
            write_samples(self.run_dir, step, items)
            write_records(self.run_dir, step, records)

    def _finish(self) -> None:
        self.world.activity.in_loop = False
        self.world.timeline.close()
        with self.world.timeline.span("wait", "all ranks", range(self.world.size)):
            dist.barrier()  # the report reads every rank's
        folders = models_of(self.run_dir, [role.name for role in self.roles.trained]) if self.config.train.save else {}
        unwritten = self._save_models(folders)
        if unwritten and self.durable.saved < self.config.train.steps:
            self._save(self.config.train.steps)  # the weights must be somewhere
        unsaved = self.durable.wait()
        if unwritten:
            raise ValueError(self._where_the_weights_are(unwritten, unsaved))
        if self.writer:
            if unsaved:
                self.writer.note(
                    "the last checkpoint is missing: the same command goes on from the last one that is whole"
                )
            self.writer.close()
            for name, folder in folders.items():
                print(f"{name}: {folder}")
            for line in self.exports.summary_lines():
                print(line)
            if self.config.train.report:
                png, html = write_report(self.run_dir)
                print(f"curve:  {png}\nreport: {html}")
        if not unsaved:
            self.durable.finish()

    def _save_models(self, folders: Mapping[str, Path]) -> tuple[str, Path, str] | None:
        """Write what the run leaves. Returns the first that failed, (role, folder, why); the same on every rank."""
        failure: tuple[str, Path, str] | None = None
        for role in (role for role in self.roles.trained if role.name in folders):
            try:
                role.save_checkpoint(folders[role.name], run=self.durable.run)
            except PeerFailedError:
                pass  # its own error says why
            except Exception as error:  # whatever it is, the weights are still here
                failure = failure or (role.name, folders[role.name], line_of(error))
        self.world.journal.enter("what the run leaves")
        return next((one for one in all_gather(self.world, failure, range(self.world.size)) if one), None)

    def _where_the_weights_are(self, unwritten: tuple[str, Path, str], unsaved: str) -> str:
        """Where the weights are, when their export has failed."""
        role, folder, why = unwritten
        checkpoint = self.durable.folder(self.durable.saved)
        if unsaved:
            return (
                f"{folder} could not be written ({why}), nor could the checkpoint of step {self.durable.saved} ({unsaved}). "
                "Mend that; the same command goes on from the last checkpoint that is whole."
            )
        return (
            f"{folder} could not be written: {why}. The weights are safe in {checkpoint}. Mend that and start the same "
            f"command again, which only exports; or: python tools/convert.py {checkpoint / role} OTHER_FOLDER"
        )
