"""Writes tests/pi0/goldens/REFERENCE.safetensors: the actions that a published implementation samples.

    bash scripts/references/setup.sh openpi
    .reference/openpi/bin/python scripts/references/write_goldens.py openpi

and the same with `lerobot`. Weights and inputs come from `dsrl_async.bench.synthetic`, so only the actions are stored,
under the names SIZE/MODEL/batchB/stepsN/DTYPE.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from dsrl_async.bench import synthetic

SEED = 0
RUNS = {
    "openpi": {"toy": [(1, 4), (1, 10), (3, 4), (3, 10)], "two_layers": [(1, 10), (3, 4)]},
    "lerobot": {"toy": [(1, 4), (3, 10)], "two_layers": [(1, 10)]},
}
"""Reference -> size -> batch sizes and numbers of denoising steps."""
PACKAGES = {
    "openpi": ("rlinf-openpi", "rlinf-transformer-openpi", "torch", "numpy"),
    "lerobot": ("lerobot", "transformers", "torch", "numpy"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", choices=sorted(RUNS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: tests/pi0/goldens/REFERENCE.safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    reference = importlib.import_module(f"{arguments.reference}_model")
    out = arguments.out or ROOT / "tests" / "pi0" / "goldens" / f"{arguments.reference}.safetensors"
    actions = {}
    for size, runs in RUNS[arguments.reference].items():
        for name in synthetic.MODELS:
            config = synthetic.sizes(name, size)
            for dtype in ("float32", "bfloat16"):
                model = reference.build(config, dtype, SEED)
                for batch, steps in runs:
                    inputs = synthetic.observation(config, synthetic.prompt_lengths(config, batch), SEED)
                    key, start = f"{size}/{name}/batch{batch}/steps{steps}/{dtype}", time.perf_counter()
                    actions[key] = reference.sample(model, inputs, steps).contiguous()
                    largest, seconds = actions[key].abs().max().item(), time.perf_counter() - start
                    print(f"{key}: largest action {largest:.2f}, {seconds:.1f} s")
    versions = {package: importlib.metadata.version(package) for package in PACKAGES[arguments.reference]}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(actions, out, {**versions, "seed": str(SEED)})


if __name__ == "__main__":
    main()
