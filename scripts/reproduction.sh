# What the scripts reproduce_libero.sh and reproduce_libero_suite.sh have in common: functions that continue what was
# interrupted and leave what is finished. They need `python`, `root` and `out`, and are sourced.

decisions() { # RUN: how many it has made
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["decisions"])' "$1/summary.json" 2>/dev/null || echo 0
}

train() { # RUN DECISIONS OPTIONS...: until it has made so many decisions; the options begin it
    local run=$1 until=$2 arguments=(--resume "$1")
    [ "$(decisions "$run")" -lt "$until" ] || return 0
    compgen -G "$run/checkpoints/[0-9]*" >/dev/null || { # what ended before its first checkpoint begins again
        rm -rf "$run"
        arguments=("${@:3}" --seed "${run##*-}" --run-dir "$run")
    }
    "$python" -m dsrl_async.launch "${arguments[@]}" --max-decisions "$until" --log.console plain | tail -n 1
    [ "$(decisions "$run")" -ge "$until" ] || { # Ctrl-C ends a run without an error
        echo "error: $run has ended before $until decisions; run the same command again to continue" >&2
        exit 1
    }
}

play() { # NAME OPTIONS...: an evaluation; its result goes to $out/evaluation/NAME.json
    local name=$1
    "$python" -m dsrl_async.evaluate "${@:2}" --seed 1000 --out "$out/evaluation/$name" |
        tail -n 1 >"$out/evaluation/$name.part"
    mv "$out/evaluation/$name.part" "$out/evaluation/$name.json"
}
