#!/usr/bin/env bash
# Reproduces the README's results of the embedded task: the base policy's success and, for each seed, a run of MINUTES,
# its evaluation on 200 fresh episodes, and the picture.
# Usage: bash scripts/reproduce_tabletop.sh [OUT [MINUTES [SEEDS...]]]
source "$(dirname "$0")/setup.sh"
no_options "$@"
set_up plot
out=${1:-runs/reproduce} minutes=${2:-5}
seeds=("${@:3}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0 1 2)
mkdir -p "$out/evaluation"

evaluate() { "$python" -m dsrl_async.evaluate --episodes 200 --seed 1000 "$@" | tail -n 1; }
evaluate >"$out/evaluation/base.json"
for seed in "${seeds[@]}"; do
    "$python" -m dsrl_async.launch --seed "$seed" --max-minutes "$minutes" --run-dir "$out/seed-$seed" \
        --log.console plain | tail -n 1 >"$out/seed-$seed.json"
    evaluate --checkpoint "$out/seed-$seed" >"$out/evaluation/seed-$seed.json"
done
evaluations=("${seeds[@]/#/$out/evaluation/seed-}")
"$python" "$root"/scripts/plot_learning_curve.py "${seeds[@]/#/$out/seed-}" --out "$out/learning_curve.png" \
    --evaluation "$out/evaluation/base.json" "${evaluations[@]/%/.json}"
