#!/usr/bin/env bash
# Runs one job on this machine: torchrun (see aligner/launcher.py) with N ranks, one thread each unless OMP_NUM_THREADS is set.
#
#   bash launch/local.sh [--limit SECONDS] N [torchrun options --] OVERRIDES...
#   bash launch/local.sh 2 algorithm=grpo model.path=DIR data.path=prompts.jsonl
#   bash launch/local.sh --limit 600 4 --max-restarts 3 -- algorithm=grpo ...
#
# --limit is a time limit: SIGTERM to torchrun, which ends its ranks, and SIGKILL a minute later; exit status 124.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

limit=()
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    --limit)
        [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || { echo "--limit ${2:-} is not a number of seconds; for example --limit 600" >&2; exit 2; }
        # In the foreground, so that Ctrl-C still reaches the launcher.
        limit=(timeout --foreground --signal=TERM --kill-after=60 "$2")
        shift 2
        ;;
esac
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || { echo "the first argument is the number of ranks, not \"${1:-}\"" >&2; usage >&2; exit 2; }
ranks="$1"
shift

options=()
if [[ " $* " == *" -- "* ]]; then
    while [[ "$1" != -- ]]; do
        options+=("$1")
        shift
    done
    shift
fi

# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
exec "${limit[@]}" python -m aligner.launcher --standalone --nproc-per-node "$ranks" "${options[@]}" -m aligner.main "$@"
