#!/usr/bin/env bash
# Sets everything up the first time, then runs `python -m dsrl_async.launch` with the arguments given.
source "$(dirname "$0")/setup.sh" plot
exec "$python" -m dsrl_async.launch "$@"
