#!/usr/bin/env bash
# Tries DSRL on ALOHA's simulated cube transfer (docs/adapters.md) in an environment of its own, .venv-aloha: a small
# random policy of the right shapes is steered for 40 decisions of 50 steps, from start to checkpoint, and 100 steps
# of the checkpoint are filmed. It shows that everything fits together, and takes minutes; the policy cannot
# succeed.
# Usage: bash scripts/run_aloha_sim.sh [OUT]
source "$(dirname "$0")/setup.sh"
no_options "$@"
set_up aloha,video .venv-aloha
out=${1:-runs/aloha_sim}
[ ! -e "$out" ] || { echo "error: $out is there already" >&2; exit 2; }
"$python" "$root/scripts/make_aloha_checkpoint.py" "$out/policy"
# The run's own size is for days on a GPU.
small=(--actors 2 --replay-ratio 1 --sac.batch-size 16 --replay.capacity 1000 --replay.warmup-decisions 16)
options=(--config "$root/configs/aloha_sim_pi0.yaml" --policy.checkpoint "$out/policy" "${small[@]}")
"$python" -m dsrl_async.doctor "${options[@]}"
"$python" -m dsrl_async.launch "${options[@]}" --max-decisions 40 --run-dir "$out/run" --log.console plain
"$python" -m dsrl_async.evaluate --checkpoint "$out/run" --episodes 1 --env.max-episode-steps 100 --video "$out/films"
