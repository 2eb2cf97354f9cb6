#!/usr/bin/env bash
# Sets everything up the first time, then runs the linters and the tests; arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
