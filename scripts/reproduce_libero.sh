#!/usr/bin/env bash
# Reproduces docs/measurements/libero_policy.md for one task of LIBERO-Spatial: the base policy's success from its 50
# initial states and, for each seed, a run of 19,000 decisions on initial states 0 to 39, its evaluation from all 50
# initial states, and the picture. The ten states that training does not see are evaluated again, five times each with
# other places of the fixtures. Interrupted runs continue, finished ones stay.
# Usage: bash scripts/reproduce_libero.sh [OUT [TASK [SEEDS...]]]
source "$(dirname "$0")/setup.sh"
source "$(dirname "$0")/reproduction.sh"
no_options "$@"
set_up libero,plot
out=${1:-runs/reproduce_libero} task=${2:-2}
seeds=("${@:3}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0 1)
mkdir -p "$out/evaluation"

config=(--config "$root/configs/libero_spatial_small.yaml")
evaluate() { # NAME OPTIONS...
    local options=("${@:2}" --suite libero_spatial --tasks "$task" --processes 2)
    play "$1" "${options[@]}"
    play "$1-held-out" "${options[@]}" --init-states 40-49 --episodes 50 --env.seeding episode
}
evaluate base "${config[@]}"
for seed in "${seeds[@]}"; do
    run=$out/seed-$seed
    train "$run" 19000 "${config[@]}" --env.task-ids "[$task]"
    evaluate "seed-$seed" --checkpoint "$run"
done
evaluations=("${seeds[@]/#/$out/evaluation/seed-}")
"$python" "$root"/scripts/plot_learning_curve.py "${seeds[@]/#/$out/seed-}" --out "$out/learning_curve.png" \
    --evaluation "$out/evaluation/base.json" "${evaluations[@]/%/.json}"
