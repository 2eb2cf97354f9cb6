# Sourced by run.sh and test.sh: makes .venv the first time and installs this project into it.
# Usage: source scripts/setup.sh EXTRA...   (extras of pyproject.toml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
if [ ! -x "$python" ]; then
    base=${PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or later is needed, $base is older; set PYTHON to one" >&2
        exit 2
    }
    "$base" -m venv .venv
fi

for extra in "$@"; do
    stamp=.venv/installed-$extra
    if [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt scripts/constraints.txt ]; then
        continue
    fi
    echo "installing dsrl_async[$extra] into .venv (once, a few minutes) ..." >&2
    if ! "$python" -c 'import torch' 2>/dev/null; then
        # Without a GPU, the CPU build of torch saves several GB, where its index can be reached.
        index=https://download.pytorch.org/whl/cpu
        if ! command -v nvidia-smi >/dev/null && curl --silent --head --fail --max-time 5 "$index/torch/" >/dev/null; then
            "$python" -m pip install --quiet --constraint scripts/constraints.txt --extra-index-url "$index" torch
        else
            "$python" -m pip install --quiet --constraint scripts/constraints.txt torch
        fi
    fi
    "$python" -m pip install --quiet --constraint scripts/constraints.txt --editable ".[$extra]"
    touch "$stamp"
done
