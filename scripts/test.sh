#!/usr/bin/env bash
# Sets everything up the first time, then runs the linters and the tests, one per core at a time, but at most four.
# Arguments go to pytest (-n 0 runs one at a time, which --pdb needs). EXTRAS=dev,libero installs LIBERO and runs its
# tests, too.
# Usage: [EXTRAS=dev,libero] bash scripts/test.sh [PYTEST'S ARGUMENTS...]
source "$(dirname "$0")/setup.sh"
help_if_asked "$@"
set_up "${EXTRAS:-dev}"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal "$@"
