#!/usr/bin/env bash
# Makes the figures of docs/libero_policy.md for one task of LIBERO-Spatial: base success from its 50 initial states, and
# for each seed a run of MINUTES on initial states 0 to 39, its evaluation from all 50, and the picture. A run that is there
# already is continued, and an evaluation that is there is kept.
# Usage: bash scripts/reproduce_libero.sh [OUT [MINUTES [TASK [SEEDS...]]]]
source "$(dirname "$0")/setup.sh" libero,plot
out=${1:-runs/reproduce_libero} minutes=${2:-15} task=${3:-2}
seeds=("${@:4}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0 1)
mkdir -p "$out/evaluation"

config=(--config "$root/configs/libero_spatial_small.yaml")
evaluate() {
    local name=$1
    "$python" -m dsrl_async.evaluate "${@:2}" --suite libero_spatial --tasks "$task" --seed 1000 --processes 2 \
        --out "$out/evaluation/$name" | tail -n 1 >"$out/evaluation/$name.json"
}
evaluate base "${config[@]}"
for seed in "${seeds[@]}"; do
    run=$out/seed-$seed
    if [ -d "$run" ]; then
        arguments=(--resume "$run")
    else
        arguments=("${config[@]}" --env.task-ids "[$task]" --seed "$seed" --run-dir "$run")
    fi
    "$python" -m dsrl_async.launch "${arguments[@]}" --max-minutes "$minutes" --log.console plain | tail -n 1
    evaluate "seed-$seed" --checkpoint "$run"
done
evaluations=("${seeds[@]/#/$out/evaluation/seed-}")
"$python" "$root"/scripts/plot_learning_curve.py "${seeds[@]/#/$out/seed-}" --out "$out/learning_curve.png" \
    --evaluation "$out/evaluation/base.json" "${evaluations[@]/%/.json}"
