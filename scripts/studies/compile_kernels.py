"""Compiles the policy's Triton kernels for GPUs that are not there, and says what a thread and a program need.

    python scripts/studies/compile_kernels.py
    python scripts/studies/compile_kernels.py --targets 80 100 --few --json

For each kernel, in the shapes of full-size Pi0 in bfloat16 (or `--dtype float32`), and each compute capability: the
registers of a thread, the bytes that it spills to memory, the shared memory of a program in kB, and its warps. The
operations run as in a sampler, except that Triton's launches compile and go no further. Compiled kernels are kept in
Triton's cache. Needs the package triton and no driver.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dsrl_async.host.command import guard
from dsrl_async.pi0 import kernels
from dsrl_async.pi0.config import Pi0Config

TARGETS = (80, 89, 90, 100)
"""Compute capabilities: A100, L4 and RTX 4090, H100 and H200, B200."""


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # of which Triton keeps the kernels apart

    def get_current_stream(self, device: int) -> int:
        return 0


def call_all(config: Pi0Config, dtype: torch.dtype, capability: int) -> Iterator[str]:
    """Calls every operation in the shapes of a sample; yields, after each, what it is for."""
    c, single = config, torch.float32

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    scale, floor = zeros(c.expert_width, dtype=single), zeros(dtype=single)
    heads, half = c.heads + 2 * c.kv_heads, c.head_dim // 2

    def slots(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin of the tokens, and where their keys and values go."""
        rows, cache = zeros(batch, tokens, 3 * half), zeros(batch, 2, c.kv_heads, tokens + 8, c.head_dim)
        return rows[..., :half], rows[..., 2 * half :], cache[:, :, :, 8:]

    x, wide = zeros(1, 9, c.vlm_width), zeros(c.vlm_width, dtype=single)
    kernels.rms_norm(x, wide, floor, None, torch.empty_like(x))
    yield "VLM"
    kernels.rotate(zeros(1, 9, heads, c.head_dim), *slots(1, 9))
    yield "VLM"
    kernels.geglu(zeros(1, 9, 2 * c.vlm_mlp))
    yield "VLM"
    mask, (*_, keys) = zeros(16, 1, 1, 536), slots(16, 536)
    kernels.attend(zeros(16, 536, c.heads, c.head_dim), keys, mask)
    yield "VLM, 16"
    patches, channels = zeros(9, c.vision_width), zeros(c.vision_width)
    kernels.layer_norm(patches, zeros(c.vision_width, dtype=single), channels, channels, 1e-6)
    yield "vision"
    if capability >= 89:  # the first with numbers of 8 bits
        kernels.quantise(zeros(9, c.vlm_mlp))
        yield "VLM"
    actions, into = zeros(1, 9, c.action_dim, dtype=single), zeros(c.expert_width, c.action_dim, dtype=single)
    kernels.silu_linear(actions, into, scale)
    yield "step"
    out, bias = zeros(c.action_dim, c.expert_width, dtype=single), zeros(c.action_dim, dtype=single)
    kernels.normed_linear(zeros(1, 9, c.expert_width), scale, floor, bias, out)
    yield "step"
    qkv, gate_up = zeros(heads * c.head_dim, c.expert_width), zeros(2 * c.expert_mlp, c.expert_width)
    for batch, tokens in ((16, 1), (1, c.action_horizon), (16, c.action_horizon)):
        x = zeros(batch, tokens, c.expert_width)
        kernels.normed_rotate(x, scale, floor, None, qkv, *slots(batch, tokens))
        yield f"{batch} x {tokens}"
        kernels.normed_geglu(x, scale, floor, None, gate_up)
        yield f"{batch} x {tokens}"
        mask, (*_, keys) = zeros(batch, 1, 1, 600), slots(batch, 600)
        kernels.attend(zeros(batch, tokens, c.heads, c.head_dim), keys, mask)
        yield f"{batch} x {tokens}"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes that it keeps in memory for want of them, by NVIDIA's cuobjdump."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {"registers": int(found["REG"]), "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"])}


def compiled(dtype: torch.dtype, few: bool, capability: int) -> Iterator[dict[str, Any]]:
    """A row for each kernel."""
    made: list[tuple[str, Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made.append((self.fn.__name__, run(self, *arguments, grid=grid, warmup=True, **options), options))

    driver.set_active(AbsentGpu(capability))
    JITFunction.run = compile_only
    try:
        seen = set()
        for where in call_all(Pi0Config(), dtype, capability):
            name, kernel, options = made.pop()
            if few and name in seen:
                continue
            seen.add(name)
            tile = [str(options[key]) for key in ("ROWS", "COLUMNS") if key in options]
            yield {"kernel": name.removesuffix("_kernel"), "of": where, "tile": " x ".join(tile), "sm": capability,
                   **resources(kernel.asm["cubin"]), "shared_kb": kernel.metadata.shared / 1024,
                   "warps": kernel.metadata.num_warps}  # fmt: skip
    finally:
        JITFunction.run = run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS, help="default: all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--few", action="store_true", help="each kernel in one shape only")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a Markdown table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    dtype = getattr(torch, args.dtype)
    rows = [row for capability in args.targets for row in compiled(dtype, args.few, capability)]
    if args.json:
        print(*map(json.dumps, rows), sep="\n")
        return
    print("| kernel | of | tile | warps |", *(f"sm_{capability} |" for capability in args.targets))
    print("|---|---|---|---|" + "---|" * len(args.targets))
    table: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        key: tuple[str, ...] = (f"`{row['kernel']}`", row["of"], row["tile"], str(row["warps"]))
        cell = f"{row['registers']}, {row['spilled_bytes']}, {row['shared_kb']:.0f}"
        table.setdefault(key, {})[row["sm"]] = cell
    for names, cells in table.items():
        print("|", " | ".join([*names, *(cells.get(capability, "") for capability in args.targets)]), "|")


if __name__ == "__main__":
    sys.exit(guard(main))
