"""Loads a policy checkpoint and prints a JSON line with peak resident memory, the size of the weights, and seconds.

    python scripts/studies/measure_load.py DIRECTORY --dtype bfloat16

The peak is the kernel's high-water mark of this process (VmHWM) and includes the interpreter and torch; `before_bytes`
is what they take after loading a small policy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from dsrl_async.pi0 import load_policy


def status_bytes(key: str) -> int:
    """The value of a line of /proc/self/status that is in kB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    load_policy()
    before = status_bytes("VmRSS")
    begin = time.monotonic()
    policy = load_policy(options.directory, dtype=getattr(torch, options.dtype))
    seconds = time.monotonic() - begin
    peak = status_bytes("VmHWM")
    weights = sum(parameter.nbytes for parameter in policy.model.parameters())
    print(
        json.dumps(
            {
                "directory": str(options.directory),
                "dtype": options.dtype,
                "pi05": policy.config.pi05,
                "before_bytes": before,
                "peak_rss_bytes": peak,
                "weights_bytes": weights,
                "ratio": round(peak / weights, 4),
                "seconds": round(seconds, 2),
                "compiler": "torch._dynamo" in sys.modules,
            }
        )
    )
