#!/usr/bin/env bash
# Sets everything up the first time, then runs the linters and the tests, as many at a time as there are cores, but at
# most four; arguments go to pytest (-n 0 runs one at a time, as --pdb needs).
# EXTRAS=dev,libero installs LIBERO too, and so runs its tests.
source "$(dirname "$0")/setup.sh" "${EXTRAS:-dev}"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal "$@"
