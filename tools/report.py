"""Draw the report of one run, or compare the curves of several.

python tools/report.py RUN_DIR [--out FOLDER]                  learning_curve.png and report.html
python tools/report.py RUN_DIR RUN_DIR ... [--out FILE.png]    the runs' curves in one picture
python tools/report.py RUN_DIR ... --summary                   one line for each run, and no picture
python tools/report.py RUN_DIR --timeline [STEP]               one step, rank by rank: PNG, and JSON for ui.perfetto.dev
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also from a checkout that was never installed

from aligner.paths import path_option
from aligner.report.metrics import read_metrics
from aligner.report.statistics import run_summary
from aligner.report.write import compare_report, write_report, write_timeline


def main() -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run_dirs", type=path_option, nargs="+", metavar="RUN_DIR", help="folder of a run (it holds metrics.jsonl)"
    )
    parser.add_argument(
        "--out",
        type=path_option,
        help="one run: the folder to write to (default: the run's); several: the PNG (default: compare.png)",
    )
    parser.add_argument("--summary", action="store_true", help="print what each run reached")
    parser.add_argument(
        "--timeline",
        nargs="?",
        type=int,
        const=0,
        metavar="STEP",
        help="draw what each rank did (default: the last step)",
    )
    arguments = parser.parse_args()
    try:
        if arguments.summary:
            for run_dir in arguments.run_dirs:
                print(f"{Path(run_dir).name}: {run_summary(read_metrics(run_dir))}")
            return 0
        if arguments.timeline is not None:
            if len(arguments.run_dirs) > 1:
                raise ValueError("--timeline is of one run; give one RUN_DIR.")
            paths = list(write_timeline(arguments.run_dirs[0], arguments.timeline or None, arguments.out))
        elif len(arguments.run_dirs) > 1:
            paths = [compare_report(arguments.run_dirs, arguments.out or "compare.png")]
        elif arguments.out and Path(arguments.out).suffix:
            raise ValueError(f"--out={arguments.out} looks like a file; for one run give a folder.")
        else:
            paths = list(write_report(arguments.run_dirs[0], arguments.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
