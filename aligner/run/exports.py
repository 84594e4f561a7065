"""Hugging Face folders while a run trains: every so many steps, and the best by evaluation.

    run_dir/exports/step_40   a whole model: weights, config.json, tokenizer
    run_dir/best              a link to the best of them, which holds best.json: step, metric and value

A folder appears under its name complete and on the disk, and the link moves by one rename: from the first evaluation on
there is a whole `best` at every moment.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from aligner.check.run_folder import BEST, EXPORTS, pointed
from aligner.models.checkpoint import PeerFailedError
from aligner.models.hf_folder import flush, write_json
from aligner.models.ownership import others_files, run_of
from aligner.run.best import Best
from aligner.spmd.messages import all_gather, broadcast

if TYPE_CHECKING:
    from aligner.config.run import TrainConfig
    from aligner.trainer.model_role import ModelRole

FIGURES = "best.json"
TOLERATED = (OSError, SafetensorError, ValueError, PeerFailedError)
"""What writing may fail with (a full disk, an occupied name) without ending the training."""


class Exports:
    """The same object on every rank; the role's first rank tends to the folders."""

    def __init__(
        self,
        role: ModelRole,
        run_dir: str | Path,
        train: TrainConfig,
        best: Best | None,
        note: Callable[[str], None],
        run: str | None = None,
    ) -> None:
        """Args:
        role: what is exported.
        best: the best so far; None: nothing is kept for being the best.
        note: says something to whoever watches (rank 0).
        run: the run's id, which marks its exports.
        """
        self.role, self.world, self.train, self.best, self._note = role, role.world, train, best, note
        self.run = run
        self.failed = 0
        """Exports that could not be written."""
        self._folder, self._link = Path(run_dir) / EXPORTS, Path(run_dir) / BEST
        self._tends = self.world.rank == role.mesh.ranks[0]
        if self._tends:
            for left in self._folder.glob(".step_*"):  # of a job that was killed while it wrote or removed one
                shutil.rmtree(left, ignore_errors=True)

    def clear(self) -> None:
        """Remove the exports of a run that is overwritten; not what this run has not written."""
        if self._tends:
            if pointed(self._link) is not None:
                self._link.unlink()
            for step in self._steps():
                if self._ours(step):
                    self._remove(step)

    def after(self, step: int, row: Mapping[str, float], evaluated: bool) -> bool:
        """Export what is due after this step; collective over the world.

        Args:
            row: the step's metrics, on rank 0; others' are not looked at.
            evaluated: it holds an evaluation.

        Returns:
            Whether anything was written, or was tried to be.
        """
        before, best = self.best.state() if self.best else None, False
        if self.best and evaluated:
            self.world.journal.enter("the best so far")
            best = self.best.look(step, broadcast(self.world, row.get(self.best.metric), [0], range(self.world.size)))
        if not best and not self._scheduled(step):
            return False
        if not self._export(step, best):
            self.failed += 1
            if self.best and before:
                self.best.restore(before)  # the next one that beats what is on the disk shall be written
        return True

    def summary_lines(self) -> list[str]:
        """What there is now, for people; rank 0."""
        lines = [f"exports: {self._folder}"] if self._steps() else []
        if self.best and self.best.step is not None:
            lines.append(f"best:    {self._link} (step {self.best.step}, {self.best.metric} {self.best.value:.4g})")
        if self.failed:
            lines.append(f"WARNING: {self.failed} export(s) could not be written; see above.")
        return lines

    def _scheduled(self, step: int) -> bool:
        return bool(self.train.export_every and step and step % self.train.export_every == 0)

    def _export(self, step: int, best: bool) -> bool:
        """Write one, and remove those that need not stay; whether every rank could do its part."""
        trouble: list[str] = []
        written = False
        try:
            self.role.save_checkpoint(self._place(step), run=self.run)
            if best and self._tends:
                self._point(step)
            written = True
        except PeerFailedError:
            pass  # its own error says why
        except TOLERATED as error:
            trouble.append(f"the export of step {step} failed on rank {self.world.rank}: {line_of(error)}")
        if written and self._tends:
            try:
                self._prune(step)
            except OSError as error:
                trouble.append(f"an old export could not be removed: {line_of(error)}")
        self.world.journal.enter(f"exported step {step}")
        outcomes = all_gather(self.world, (written, trouble), range(self.world.size))
        for text in (text for _, texts in outcomes for text in texts):
            self._note(f"WARNING: {text}; the training goes on.")
        return all(done for done, _ in outcomes)

    def _point(self, step: int) -> None:
        """Make `step` the best."""
        assert self.best
        unnamed = self._place(step) / f".{FIGURES}"
        write_json(unnamed, self.best.state())
        os.replace(unnamed, self._place(step) / FIGURES)
        flush(self._place(step))
        link = self._link.with_name(f".{BEST}.new")
        link.unlink(missing_ok=True)
        link.symlink_to(Path(EXPORTS) / self._place(step).name, target_is_directory=True)
        os.replace(link, self._link)
        flush(self._link.parent)

    def _prune(self, step: int) -> None:
        """Remove what is neither the best nor among the newest. Later steps, of a run that was since taken back to a
        checkpoint, are left to be written anew."""
        before = [done for done in self._steps() if done <= step]
        due = [done for done in before if self._scheduled(done)]
        stay = {*(due[-self.train.export_keep :] if self.train.export_keep else due), pointed(self._link)}
        for done in before:
            if done not in stay and self._ours(done):
                self._remove(done)

    def _remove(self, step: int) -> None:
        """Under another name first: half of a model never stands under its own."""
        hidden = self._folder / f".step_{step}.removed"
        self._place(step).rename(hidden)
        shutil.rmtree(hidden)

    def _place(self, step: int) -> Path:
        return self._folder / f"step_{step}"

    def _steps(self) -> list[int]:
        names = [re.fullmatch(r"step_(\d+)", path.name) for path in self._folder.glob("step_*")]
        return sorted(int(match.group(1)) for match in names if match)

    def _ours(self, step: int) -> bool:
        """Nothing lies there but what this run has written."""
        place = self._place(step)
        return not place.is_symlink() and (run_of(place) == self.run) and not others_files(place)


def line_of(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
