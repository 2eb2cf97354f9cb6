#!/usr/bin/env bash
# Sets everything up the first time, then runs the linters and the tests; arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
