"""Compares this project's policy with openpi's, both running, by default at full size.

    bash scripts/references/setup.sh openpi
    .venv/bin/python scripts/references/compare.py

There are four runs per model, one process at a time (13 GB for float32 at full size): both programs in float32 and in
bfloat16, with the same seeded weights and inputs. It prints how far each result is from openpi's in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import numpy as np

from dsrl_async.bench import synthetic
from dsrl_async.bench.denoise import OWN, REFERENCE, start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(synthetic.MODELS), default=list(synthetic.MODELS))
    parser.add_argument("--size", choices=list(synthetic.SIZES), default="full")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    for model in arguments.model:
        config = synthetic.sizes(model, arguments.size)
        actions = {}
        for dtype in ("float32", "bfloat16"):
            for system in (REFERENCE, OWN):
                print(f"{model}: {system} in {dtype} ...", file=sys.stderr)
                with start(system, config, dtype, arguments.threads) as process:
                    lengths = synthetic.prompt_lengths(config, 1)
                    process.ask(do="prepare", prompt_lengths=lengths, steps=arguments.steps)
                    actions[system, dtype] = np.array(process.ask(do="actions")["actions"])
        truth = actions[REFERENCE, "float32"]
        for (system, dtype), sampled in actions.items():
            if (system, dtype) != (REFERENCE, "float32"):
                error = np.abs(sampled - truth)
                relative = np.sqrt(np.square(error).mean() / np.square(truth).mean())
                figures = {"largest_difference": float(f"{error.max():.2e}"), "relative_rms": float(f"{relative:.2e}")}
                print(json.dumps({"model": model, "size": arguments.size, "system": system, "dtype": dtype, **figures}))
        figures = {
            "largest": float(f"{np.abs(truth).max():.3g}"),
            "rms": float(f"{np.sqrt(np.square(truth).mean()):.3g}"),
        }
        print(json.dumps({"model": model, "size": arguments.size, "system": REFERENCE, "dtype": "float32", **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
