#!/usr/bin/env bash
# Installs everything into .venv the first time, which takes a few minutes and one or two GB, then runs
# `python -m dsrl_async.launch` with the arguments given.
# Usage: bash scripts/run.sh [--config NAME] [--max-minutes N] [--actors N] [--resume RUN] [--key value ...]
#
# Without arguments it steers the policy that comes along in a scene that comes along, until Ctrl-C, which saves.
# `--help` says more once it is installed: all options of `launch`. `bash scripts/setup.sh` only installs.
source "$(dirname "$0")/setup.sh"
is_installed report,video || help_if_asked "$@"
set_up report,video
exec "$python" -m dsrl_async.launch "$@"
