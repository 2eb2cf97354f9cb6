#!/usr/bin/env bash
# Makes the environments of the programs that this project is compared with, each in .reference/NAME.
# Usage: bash scripts/references/setup.sh openpi|lerobot|gymnasium|torchrl|jaxrl2 ...
#
# openpi and lerobot are the published implementations of Pi0; gymnasium and torchrl are peers of `bench transport`;
# jaxrl2 is what official DSRL needs (compare_learner.py).
# Each has an environment of its own because some need different versions of the same library. They need Python 3.11;
# set PYTHON if it is not found as python3.11. Everything comes from PyPI, nothing from a hub.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
base=${PYTHON:-python3.11}
if [ $# = 0 ]; then
    sed -n 's/^# Usage: /usage: /p' "${BASH_SOURCE[0]}" >&2
    exit 2
elif [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi
if ! "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    echo "error: the references need Python 3.11; install it, or set PYTHON to one" >&2
    exit 2
fi

install() { "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

install_model_libraries() { # torch comes first, in this project's version, so that both sides use the same kernels
    install torch==2.13.0
    install "numpy>=2,<3" safetensors regex requests pyyaml tqdm packaging filelock
}

install_openpi() { # openpi's PyTorch model and its patched transformers, as packaged by RLinf; no JAX
    install_model_libraries
    install "tokenizers>=0.21,<0.22" "huggingface-hub>=0.30,<1.0"
    install --no-deps rlinf-transformer-openpi==4.53.2 rlinf-openpi==0.1.1
}

install_lerobot() { # declares Python 3.12, yet the Pi0 modules themselves run on 3.11
    install_model_libraries
    install "tokenizers>=0.22,<0.23" "huggingface-hub>=1.0,<2.0" typer
    install --no-deps transformers==5.5.4
    install --no-deps --ignore-requires-python lerobot==0.6.1
}

install_gymnasium() { install "numpy>=2,<3" psutil gymnasium==1.4.0; }

install_jaxrl2() { # what jaxrl2 imports for its update; its own code is not on PyPI
    install jax==0.5.0 flax==0.10.2 optax==0.2.4 distrax==0.1.5 matplotlib gym==0.26.2 wandb
}

install_torchrl() { install "numpy>=2,<3" psutil torch==2.13.0 torchrl==0.14.1; }

for name in "$@"; do
    environment=$root/.reference/$name
    if ! declare -F "install_$name" >/dev/null || [ "$name" = model_libraries ]; then
        echo "error: unknown reference '$name'; it is openpi, lerobot, gymnasium, torchrl or jaxrl2" >&2
        exit 2
    elif [ -e "$environment/complete" ]; then
        echo "$environment exists already; remove it to make it anew" >&2
    else
        echo "installing $environment; this takes a few minutes" >&2
        "$base" -m venv --clear "$environment"
        "install_$name"
        touch "$environment/complete"
    fi
done
