# Sourced by the other scripts: makes .venv the first time and installs this project into it. Sets `root` and `python`.
# Usage: source scripts/setup.sh EXTRAS [VENV]   (EXTRAS of pyproject.toml, separated by commas; VENV for .venv)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/${2:-.venv}
python=$venv/bin/python

if ! "$python" -m pip --version >/dev/null 2>&1; then
    base=${PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3 || true)}
    if [ -z "$base" ] || ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or later is needed; install it, or set PYTHON to one" >&2
        exit 2
    fi
    if ! "$base" -m venv --clear "$venv"; then
        echo "error: $base cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2
        exit 2
    fi
fi

constraints=$root/scripts/constraints.txt
if [[ ,$1, == *,aloha,* ]]; then # which needs an older MuJoCo
    grep --invert-match '^mujoco==' "$constraints" >"$venv/constraints.txt"
    constraints=$venv/constraints.txt
fi
install() { "$python" -m pip install --quiet --constraint "$constraints" "$@"; }
stamp=$venv/installed-$1
if ! [ "$stamp" -nt "$root/pyproject.toml" ] || ! [ "$stamp" -nt "$root/scripts/constraints.txt" ]; then
    echo "installing dsrl_async[$1] into $venv (once, a few minutes) ..." >&2
    if ! "$python" -c 'import torch' 2>/dev/null; then
        # Without a GPU the CPU build of torch saves several GB, if its index is reachable.
        index=https://download.pytorch.org/whl/cpu
        if ! command -v nvidia-smi >/dev/null && curl --silent --head --fail --max-time 5 "$index/torch/" >/dev/null; then
            install --extra-index-url "$index" torch
        else
            install torch
        fi
    fi
    install --editable "$root[$1]"
    touch "$stamp"
fi
