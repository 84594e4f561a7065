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
check pytest "$@"
