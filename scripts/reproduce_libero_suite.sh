#!/usr/bin/env bash
# Steers all tasks of LIBERO-Spatial, or of one of its variations such as libero_spatial_with_milk, with one agent and
# the small Pi0: the base policy's success by openpi's protocol and from held-out initial states, an oracle (how many of
# the held-out scenes can be reached by some noise at all), for each seed a run with evaluations during it and the same
# two evaluations of its agent, a table by task and the learning curves. Interrupted steps continue, finished ones stay.
# Variables shorten it: DECISIONS (100000), TASKS (0-9), TRAINED (initial states to train on, 0-39, or 0-7 of a variation
# with 10), HELD_OUT (40-49 or 8-9), EPISODES (of the whole suite, each scene once), HELD_OUT_EPISODES (100), ATTEMPTS of
# the oracle from each scene (8, 0 leaves it out), PROCESSES (2), and OPTIONS of the runs.
# Usage: [DECISIONS=N ...] bash scripts/reproduce_libero_suite.sh [OUT [SUITE [SEEDS...]]]
source "$(dirname "$0")/setup.sh"
source "$(dirname "$0")/reproduction.sh"
no_options "$@"
set_up libero,plot
suite=${2:-libero_spatial}
out=${1:-runs/reproduce_$suite}
seeds=("${@:3}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0 1)
mkdir -p "$out/evaluation"

config=(--config "$root/configs/libero_spatial_small_suite.yaml")
until=${DECISIONS:-100000} tasks=${TASKS:-0-9} processes=${PROCESSES:-2} attempts=${ATTEMPTS:-8}
read -r trained held_out < <("$python" - "$suite" <<'PYTHON'
import sys

from dsrl_async.envs import libero_files

try:
    states = len(libero_files.init_states(sys.argv[1], 0))
except ValueError as error:
    sys.exit(f"error: {error}")
kept = states // 5  # the last fifth is held out
print(f"0-{states - kept - 1} {states - kept}-{states - 1}")
PYTHON
) || exit 2
trained=${TRAINED:-$trained} held_out=${HELD_OUT:-$held_out}
list() { # RANGES: 0-2,5 as [0,1,2,5]
    "$python" -c 'import sys
from dsrl_async.run.evaluation.episodes import parse_numbers
print(str(parse_numbers("", sys.argv[1])).replace(" ", ""))' "$1"
}
kept_scenes=(--init-states "$held_out" --episodes "${HELD_OUT_EPISODES:-100}" --env.seeding episode)
everything=(--suite "$suite" --tasks "$tasks" --processes "$processes")
evaluate() { # NAME OPTIONS...
    play "$1" "${@:2}" "${everything[@]}" ${EPISODES:+--episodes "$EPISODES"}
    play "$1-held-out" "${@:2}" "${everything[@]}" "${kept_scenes[@]}"
}

evaluate base "${config[@]}"
oracle=()
if [ "$attempts" -gt 0 ]; then
    oracle=(--oracle "$out/evaluation/oracle.json")
    "$python" "$root/scripts/studies/measure_oracle.py" "${config[@]}" "${everything[@]}" "${kept_scenes[@]}" \
        --seed 1000 --attempts "$attempts" --out "$out/evaluation/oracle.jsonl" | tail -n 1 >"$out/evaluation/oracle.part"
    mv "$out/evaluation/oracle.part" "$out/evaluation/oracle.json"
fi
begin=("${config[@]}" --env.name "$suite" --env.task-ids "$(list "$tasks")" --env.init-states "$(list "$trained")")
for seed in "${seeds[@]}"; do
    run=$out/seed-$seed
    # shellcheck disable=SC2086
    train "$run" "$until" "${begin[@]}" ${OPTIONS:-}
    evaluate "seed-$seed" --checkpoint "$run"
done

results() { # SUFFIX: the files of all evaluations with it
    local name
    for name in base "${seeds[@]/#/seed-}"; do echo "$out/evaluation/$name$1.json"; done
}
mapfile -t whole < <(results "")
mapfile -t kept < <(results "-held-out")
"$python" "$root/scripts/tabulate_evaluations.py" "${whole[@]}" >"$out/all.md"
"$python" "$root/scripts/tabulate_evaluations.py" "${kept[@]}" "${oracle[@]}" >"$out/held_out.md"
"$python" "$root/scripts/plot_learning_curve.py" "${seeds[@]/#/$out/seed-}" --out "$out/learning_curve.png" \
    --against decisions env_steps wall_s --evaluation "${whole[@]}"
cat "$out/all.md" "$out/held_out.md"
