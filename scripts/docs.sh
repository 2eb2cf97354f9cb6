#!/usr/bin/env bash
# Builds the documents as a site in site/, and fails at a broken link; `bash scripts/docs.sh serve` shows them on
# http://127.0.0.1:8000 and builds them again at every change. Further arguments go to mkdocs.
# Usage: bash scripts/docs.sh [build|serve [MKDOCS'S ARGUMENTS...]]
source "$(dirname "$0")/setup.sh"
help_if_asked "$@"
set_up docs
cd "$root"
command=${1:-build}
[ "$command" = serve ] && strictness=--no-strict || strictness=--strict # while one writes, a link may lead nowhere
exec "$python" -m mkdocs "$command" "$strictness" "${@:2}"
