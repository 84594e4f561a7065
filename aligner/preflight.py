"""What a batch script asks before it starts the ranks: `python -m aligner.preflight RANKS ARGUMENTS OF aligner.main...`.

All that `mode=check` finds is found here, by one process instead of every rank; its message is the last line, its status 2.
On stdout: the run's folder, and nothing where the arguments ask for no run (--help, --cfg).
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

from aligner.config.schema import CONF, compose_config, to_config
from aligner.main import main, parse


def run_folder(ranks: int, arguments: list[str]) -> Path | None:
    """The run's folder, once everything has been checked for so many ranks. Leaves with status 2 and a message otherwise."""
    with contextlib.redirect_stdout(io.StringIO()):
        main([*arguments, "mode=check", f"check.ranks={ranks}"])
    options = parse(arguments)
    if options.help or options.cfg:
        return None
    folder = (options.config_dir or CONF).resolve()
    return Path(to_config(compose_config(options.overrides, options.config_name, folder)).run_dir).resolve()


if __name__ == "__main__":
    print(run_folder(int(sys.argv[1]), sys.argv[2:]) or "")
