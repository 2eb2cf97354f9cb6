#!/usr/bin/env bash
# Installs this project into .venv: once, and again after a change of pyproject.toml. The other scripts do so themselves.
# Usage: bash scripts/setup.sh [EXTRAS]   (of pyproject.toml, such as libero,video; without: report,video)
#
# The other scripts source it, for its variables `root` and `python` and its functions.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

fail() {
    echo "error: $*" >&2
    exit 2
}

show_help() { # prints the comment at the top of the script that runs, up to its first other line
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

help_if_asked() { # ARGUMENTS...: shows the help and ends, if it is asked for
    local argument
    for argument in "$@"; do
        case $argument in -h | --help | --help-all) show_help && exit ;; esac
    done
}

no_options() { # ARGUMENTS...: for a script that takes none but -h
    local argument
    help_if_asked "$@"
    for argument in "$@"; do
        case $argument in -*) fail "there is no option $argument; $(basename "$0") --help says what there is" ;; esac
    done
}

is_installed() { # EXTRAS
    [ -e "$python" ] && [ "$venv/installed-$1" -nt "$root/pyproject.toml" ] &&
        [ "$venv/installed-$1" -nt "$root/scripts/constraints.txt" ]
}

set_up() { # EXTRAS [VENV]: makes VENV, .venv unless it is given, and installs the project with the extras
    venv=$root/${2:-.venv}
    python=$venv/bin/python
    is_installed "$1" || install_project "$1"
}

install_project() { # EXTRAS
    local constraints=$root/scripts/constraints.txt begin=$SECONDS torch="torch, the build for NVIDIA's GPUs" gigabytes=10
    local index=() base=
    if ! "$python" -c 'import pip' 2>/dev/null; then
        base=${PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3 || true)}
        if [ -z "$base" ] || ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            fail "Python 3.11 or later is needed; install it, or set PYTHON to one"
        fi
        "$base" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$base cannot make a virtual environment; on Debian and Ubuntu install python3-venv"
    fi
    # Without a GPU the CPU build of torch saves several GB, if its index is reachable.
    if ! command -v nvidia-smi >/dev/null; then
        torch="torch, the build for CPUs" gigabytes=3
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
        curl --silent --head --fail --max-time 5 "${index[1]}/torch/" >/dev/null 2>&1 || index=()
    fi
    ! holds torch || gigabytes=0
    [[ ,$1, != *,libero,* ]] || holds libero || gigabytes=$((gigabytes + 3))
    check_space "$gigabytes"

    echo "installing dsrl_async[$1] into $venv, once; this takes a few minutes" >&2
    step "1 of 3: the virtual environment"
    if ! "$python" -c 'import pip' 2>/dev/null; then
        "$base" -m venv --clear "$venv" >&2 || fail "$base cannot make a virtual environment in $venv"
    fi
    : >"$venv/install.log"
    if [[ ,$1, == *,aloha,* ]]; then # which needs an older MuJoCo
        grep --invert-match '^mujoco==' "$constraints" >"$venv/constraints.txt"
        constraints=$venv/constraints.txt
    fi
    step "2 of 3: $torch"
    holds torch || pip_install "$constraints" "${index[@]}" torch
    step "3 of 3: dsrl_async and the libraries that it needs"
    pip_install "$constraints" --editable "$root[$1]"
    touch "$venv/installed-$1"
    echo "installed in $((SECONDS - begin)) s, $(megabytes) MB" >&2
}

step() { echo "  $*" >&2; }

holds() { compgen -G "$venv/lib/python*/site-packages/$1" >/dev/null; } # PACKAGE

megabytes() { du -sm "$venv" | cut -f 1; }

check_space() { # GIGABYTES
    local free
    free=$(df -Pm "$root" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge $(($1 * 1000)) ] ||
        fail "the installation takes up to $1 GB, and there are $free MB free for $venv; make room, then try again"
}

pip_install() { # CONSTRAINTS ARGUMENTS...: with a sign of life; what pip says goes to install.log
    local log=$venv/install.log ticker code=0
    mkdir -p "$venv/tmp" # where downloads are unpacked: the system's own may be small, and here their progress is seen
    show_progress "$log" &
    ticker=$!
    TMPDIR=$venv/tmp "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        --constraint "$1" "${@:2}" >>"$log" 2>&1 || code=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    rm -rf "$venv/tmp"
    [ ! -t 2 ] || printf '\r\033[K' >&2
    [ "$code" -eq 0 ] || explain_failure "$log" "$code"
}

show_progress() { # LOG: says how far pip is, on a terminal in one line
    local begin=$SECONDS every=15 before='  ' after='\n' last
    [ ! -t 2 ] || every=1 before='\r\033[K  ' after=''
    while sleep "$every" >/dev/null 2>&1; do # it may outlive this script, and must keep no pipe open
        kill -0 $$ 2>/dev/null || return 0 # the script was killed
        last=$(grep --extended-regexp '^ *(Collecting|Downloading|Using cached|Building|Installing|Preparing)' "$1" |
            tail --lines=1 | sed 's/^ *//; s/^Installing collected packages.*/installing them/' | cut --characters=1-50) || true
        printf "$before%d s, %d MB: %s$after" "$((SECONDS - begin))" "$(megabytes)" "$last" >&2
    done
}

explain_failure() { # LOG CODE: why pip has failed, as far as it is known
    local last
    last=$(grep '^ *ERROR' "$1" | tail --lines=1 | sed 's/^ *//' || true)
    if [ "$2" -gt 128 ] || grep --quiet '^ERROR: Operation cancelled' "$1"; then
        fail "interrupted; the same command goes on"
    elif grep --quiet 'No space left on device' "$1"; then
        fail "there is no space left on the disk of $venv; make room, then try again (what pip said: $1)"
    elif grep --quiet --extended-regexp \
        'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable' "$1"; then
        fail "pip cannot reach its package index; is there a network, or does it need a proxy (HTTPS_PROXY) or a mirror" \
            "(PIP_INDEX_URL)? (what pip said: $1)"
    fi
    fail "pip has failed: ${last:-no reason given} (all that it said: $1)"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    no_options "$@"
    [ $# -le 1 ] || fail "the extras are one word, separated by commas: $(IFS=,; echo "$*")"
    set_up "${1:-report,video}"
    echo "to use it: source ${venv#"$PWD/"}/bin/activate"
fi
