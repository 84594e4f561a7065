#!/usr/bin/env bash
# Runs ruff, mypy and pytest in the environment of a run; arguments are passed to pytest.
#
#   bash launch/test.sh                    the default tests: no GPU, no pretrained model, none that take minutes
#   bash launch/test.sh -m slow            the tests that take minutes
#   bash launch/test.sh tests/objective    a part
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

check() {
    local begin=$SECONDS
    printf '== %s\n' "$*"
    "$@"
    printf '== passed in %s s\n' "$((SECONDS - begin))"
}

check ruff check .
check ruff format --check .
check mypy
# Two workers, each a file at a time: many tests wait for ranks, signals or time limits. A part runs in one process.
if (($#)); then check pytest "$@"; else check pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20; fi
