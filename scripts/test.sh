#!/usr/bin/env bash
# Sets everything up the first time, then runs the linters and the tests; arguments go to pytest.
# EXTRAS=dev,libero installs LIBERO too, and so runs its tests.
source "$(dirname "$0")/setup.sh" "${EXTRAS:-dev}"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
