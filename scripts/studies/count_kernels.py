"""Counts the kernels of one call of the sampler at full depth (27 vision, 18 + 18 Gemma layers).

    python scripts/studies/count_kernels.py

Prints a JSON line per model and stage. The widths are small, which changes no count. Eager: ATen operations that are
neither views nor empty allocations. Compiled: calls of generated kernels and of library kernels, read from what
torch.compile generates for this device. `copies` are those that CUDA would make within eager operations, see
`dsrl_async.host.tracing.copies_first`. Host syncs are operations that make the host wait; there must be none, and the
count would fail at the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys

import torch
from torch._inductor.utils import run_and_get_code

from dsrl_async.host.command import guard
from dsrl_async.host.tracing import OperationTrace
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.sampler import Sampler

LAUNCH = re.compile(
    r"^\s+(\w+ = )?((cpp|triton)_\w+(\.run)?|extern_kernels\.\w+|torch\.ops\.\w+\.[\w.]+|aten\.[\w.]+)\("
)
"""A line of generated code that starts a kernel."""


def make_sampler(pi05: bool, denoise_steps: int, compiled: bool) -> Sampler:
    full = Pi0Config()
    config: Pi0Config = dataclasses.replace(
        tabletop_config(), pi05=pi05, depth=full.depth, vision_depth=full.vision_depth
    )
    model = Pi0(config).set_dtype(torch.bfloat16).eval().requires_grad_(False)
    return Sampler(model, batch_size=1, language_length=8, denoise_steps=denoise_steps, compiled=compiled)


def eager(pi05: bool, denoise_steps: int) -> dict[str, int]:
    sampler = make_sampler(pi05, denoise_steps, compiled=False)
    counts = {}
    copies = 0
    for name, half in (("encode", sampler.encode), ("denoise", sampler.denoise)):
        with OperationTrace(guarded=True) as trace:
            half()
        counts[name] = trace.kernels
        copies += trace.hidden_copies
    return counts | {"copies": copies}


def compiled(pi05: bool, denoise_steps: int) -> dict[str, int]:
    sampler = make_sampler(pi05, denoise_steps, compiled=True)
    counts = {}
    for name, half, calls in (("encode", sampler.encode, 1), ("denoise", sampler.denoise, denoise_steps)):
        torch._dynamo.reset()
        _, sources = run_and_get_code(half)
        launches = sum(bool(LAUNCH.match(line)) for source in sources for line in source.splitlines())
        counts[name] = calls * launches + (name == "denoise")  # the copy of the noise is outside
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoise-steps", type=int, default=10)
    parser.add_argument("--compiled", action="store_true", help="also compile, which takes minutes")
    args = parser.parse_args()
    torch.manual_seed(0)
    for pi05 in (False, True):
        ways = {"eager": eager} | ({"compiled": compiled} if args.compiled else {})
        for way, count in ways.items():
            counts = count(pi05, args.denoise_steps)
            line = {
                "model": "pi0.5" if pi05 else "pi0",
                "way": way,
                **counts,
                "total": counts["encode"] + counts["denoise"],
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(guard(main))
