#!/usr/bin/env bash
# Makes the environments of the peers of `python -m dsrl_async.bench transport`: .reference/gymnasium, .reference/torchrl.
# Usage: bash scripts/peers/setup.sh [gymnasium|torchrl ...]      (default: both)
#
# They are apart from .venv: this project needs neither. Python 3.11 is needed; set PYTHON if it is not found as python3.11.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
base=${PYTHON:-python3.11}
if ! "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    echo "error: the peers need Python 3.11; install it, or set PYTHON to one" >&2
    exit 2
fi

make_environment() { # name, packages
    environment=$root/.reference/$1
    if [ -e "$environment/complete" ]; then
        echo "$environment is there already; remove it to make it anew" >&2
        return
    fi
    "$base" -m venv --clear "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "numpy>=2,<3" psutil "${@:2}"
    touch "$environment/complete"
}

[ $# -gt 0 ] || set -- gymnasium torchrl
for name in "$@"; do
    case $name in
        gymnasium) make_environment gymnasium gymnasium==1.4.0 ;;
        torchrl) make_environment torchrl torch==2.13.0 torchrl==0.14.1 ;;
        *) echo "error: unknown peer '$name'; it is gymnasium or torchrl" >&2 && exit 2 ;;
    esac
done
