"""Entry point of each rank: `torchrun --nproc-per-node 2 -m aligner.main algorithm=grpo model.path=DIR ...`.

Heavy modules are imported only after the configuration has been checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from aligner.config.secrets import Mask
from aligner.health.process_exit import exit_on_signal, temporary_folder
from aligner.paths import path_option

PATIENCE = 30.0
"""Seconds that other ranks wait for rank 0 to report a configuration error; the launcher ends them when rank 0 exits."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help).")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse aligner's flags; all other arguments are Hydra overrides.

    Raises:
        ValueError: an unknown flag.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-name", default="train")
    parser.add_argument("--config-dir", type=path_option)
    parser.add_argument("overrides", nargs="*")
    namespace, unknown = parser.parse_known_args(arguments)
    flags = [flag for flag in unknown if flag.startswith("-")]
    if flags:
        raise ValueError(f"{flags[0]} is not a flag of aligner; give settings as KEY=VALUE (see --help).")
    namespace.overrides += unknown
    return namespace


def main(arguments: list[str] | None = None) -> None:
    """Run one rank of the job; exits with status 2 for a configuration error."""
    with temporary_folder():
        _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> None:
    rank = int(os.environ.get("RANK", "0"))
    mask = Mask.of(arguments)
    try:
        flags = parse(arguments)
        from aligner.config import schema as configuration

        folder = (flags.config_dir or configuration.CONF).resolve()
        if flags.help:
            from aligner.config.help import help_text

            return _print_once(rank, help_text(folder))
        composed = configuration.compose_config(flags.overrides, flags.config_name, folder)
        if flags.cfg:
            from omegaconf import OmegaConf

            plain = mask.plain(OmegaConf.to_container(composed))
            return _print_once(rank, OmegaConf.to_yaml(OmegaConf.create(plain)))
        from aligner.checkpoint.claim import launch
        from aligner.checkpoint.lease import acquire_lease
        from aligner.run.prepare import prepare

        config = configuration.to_config(composed)
        mask = Mask.of(arguments, dataclasses.asdict(config))
        checking = config.mode == "check"
        ranks = config.check.ranks if checking and config.check.ranks else int(os.environ.get("WORLD_SIZE", "1"))
        job = dataclasses.replace(prepare(config, ranks), mask=mask)
        if checking:
            from aligner.check.summary import job_summary

            return _print_once(rank, mask.text(job_summary(job.config, job.roles, job.checked, ranks)))
        if rank == 0:
            job = dataclasses.replace(job, lease=acquire_lease(Path(config.run_dir), launch()))
    except ValueError as error:
        _refuse(rank, mask.text(str(error)))
    from aligner.run.loop import run_job

    run_job(job)


def _print_once(rank: int, text: str) -> None:
    if rank == 0:
        print(text)


def _refuse(rank: int, message: str) -> NoReturn:
    """Report a configuration error, found before the process groups were made, and exit with status 2.

    All ranks find the same error, and rank 0 reports it. A rank that is still running after PATIENCE found one of its own
    (a file that is missing on its host) and reports it too.
    """
    if rank == 0:
        sys.stderr.write(f"aligner: error: {message}\n")
    else:
        time.sleep(PATIENCE)
        sys.stderr.write(f"aligner: error on rank {rank}: {message}\n")
    sys.stderr.flush()
    sys.exit(2)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # until the job's watch takes them
        signal.signal(number, exit_on_signal)
    main()
