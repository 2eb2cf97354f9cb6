#!/usr/bin/env bash
# Makes the environments of the published implementations: .reference/openpi and .reference/lerobot.
# Usage: bash scripts/openpi_reference/setup.sh [openpi|lerobot ...]      (default: openpi)
#
# They are apart from .venv, and from each other, because they need different libraries of the name `transformers`.
# Python 3.11 is needed; set PYTHON if it is not found as python3.11. Only PyPI is used; nothing is loaded from a hub.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
base=${PYTHON:-python3.11}
if ! "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    echo "error: the references need Python 3.11; install it, or set PYTHON to one" >&2
    exit 2
fi

make_environment() { # name; the rest of the recipe is in the caller
    environment=$root/.reference/$1
    if [ -e "$environment/complete" ]; then
        echo "$environment is there already; remove it to make it anew" >&2
        return 1
    fi
    "$base" -m venv --clear "$environment"
    install() { "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
    # torch first and alone: this project's version, so that both sides compute with the same kernels
    install torch==2.13.0
    install "numpy>=2,<3" safetensors "regex" "requests" "pyyaml" "tqdm" "packaging" "filelock"
}

make_openpi() { # openpi's PyTorch model and its patched transformers, as packaged by RLinf; no JAX
    make_environment openpi || return 0
    install "tokenizers>=0.21,<0.22" "huggingface-hub>=0.30,<1.0"
    install --no-deps rlinf-transformer-openpi==4.53.2 rlinf-openpi==0.1.1
    touch "$environment/complete"
}

make_lerobot() { # declares Python 3.12, yet the Pi0 modules themselves run on 3.11
    make_environment lerobot || return 0
    install "tokenizers>=0.22,<0.23" "huggingface-hub>=1.0,<2.0" typer
    install --no-deps transformers==5.5.4
    install --no-deps --ignore-requires-python lerobot==0.6.1
    touch "$environment/complete"
}

for name in "${@:-openpi}"; do
    case $name in
        openpi | lerobot) "make_$name" ;;
        *) echo "error: unknown reference '$name'; it is openpi or lerobot" >&2 && exit 2 ;;
    esac
done
