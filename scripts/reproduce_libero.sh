#!/usr/bin/env bash
# Reproduces docs/measurements/libero_policy.md for one task of LIBERO-Spatial: the base policy's success from its 50
# initial states and, for each seed, a run of 19,000 decisions on initial states 0 to 39, its evaluation from all 50
# initial states, and the picture. The ten states that training does not see are evaluated again, five times each with
# other places of the fixtures. Interrupted runs continue, finished ones stay.
# Usage: bash scripts/reproduce_libero.sh [OUT [TASK [SEEDS...]]]
source "$(dirname "$0")/setup.sh"
no_options "$@"
set_up libero,plot
out=${1:-runs/reproduce_libero} task=${2:-2}
seeds=("${@:3}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0 1)
mkdir -p "$out/evaluation"

config=(--config "$root/configs/libero_spatial_small.yaml")
decisions() { # RUN: how many it has made
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["decisions"])' "$1/summary.json" 2>/dev/null || echo 0
}
train() { # RUN DECISIONS
    local run=$1 until=$2 arguments=(--resume "$1")
    [ "$(decisions "$run")" -lt "$until" ] || return 0
    [ -d "$run" ] || arguments=("${config[@]}" --env.task-ids "[$task]" --seed "${run##*-}" --run-dir "$run")
    "$python" -m dsrl_async.launch "${arguments[@]}" --max-decisions "$until" --log.console plain | tail -n 1
    [ "$(decisions "$run")" -ge "$until" ] || { # Ctrl-C ends a run without an error
        echo "error: $run has ended before $until decisions; run the same command again to continue" >&2
        exit 1
    }
}
evaluate() { # NAME OPTIONS...
    play "$1" "${@:2}"
    play "$1-held-out" "${@:2}" --init-states 40-49 --episodes 50 --env.seeding episode
}
play() {
    local name=$1
    "$python" -m dsrl_async.evaluate "${@:2}" --suite libero_spatial --tasks "$task" --seed 1000 --processes 2 \
        --out "$out/evaluation/$name" | tail -n 1 >"$out/evaluation/$name.json"
}
evaluate base "${config[@]}"
for seed in "${seeds[@]}"; do
    run=$out/seed-$seed
    train "$run" 19000
    evaluate "seed-$seed" --checkpoint "$run"
done
evaluations=("${seeds[@]/#/$out/evaluation/seed-}")
"$python" "$root"/scripts/plot_learning_curve.py "${seeds[@]/#/$out/seed-}" --out "$out/learning_curve.png" \
    --evaluation "$out/evaluation/base.json" "${evaluations[@]/%/.json}"
