"""The process of a measured policy (`conversation.SystemProcess`): it loads a policy once and measures on request.

It runs in this project's environment and, unchanged, in those of the published implementations, so it imports only
numpy, torch, `conversation` and `tracing`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsrl_async.bench import synthetic
from dsrl_async.bench.conversation import answer_on_stdout
from dsrl_async.host.tracing import OperationTrace

STAGES = ("vision", "prefill", "denoise")
GEMMS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mkldnn_convolution",
    "aten::_slow_conv2d_forward",
    "mkldnn::_linear_pointwise",
)
"""Operations that are matrix products on the CPU. A convolution whose stride equals its kernel is one."""
FUSED_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class StageMeter:
    """Attributes a growing quantity, such as time or a count of operations, to the stages of a sample."""

    def __init__(self, read: Callable[[], int]) -> None:
        self.totals = dict.fromkeys(STAGES, 0)
        self._read, self._stage, self._mark = read, "prefill", read()

    def enter(self, stage: str) -> None:
        """Begin a stage. A sample starts in prefill."""
        now = self._read()
        self.totals[self._stage] += now - self._mark
        self._stage, self._mark = stage, now


Sample = Callable[[StageMeter], Tensor]
"""Samples normalised actions [B, H, action_dim] once and tells the meter when it enters a stage."""
Prepare = Callable[[dict[str, np.ndarray], int], Sample]
"""(inputs as from `synthetic.observation`, denoising steps) -> what is measured."""
Load = Callable[[synthetic.Sizes, str, int], Prepare]
"""(sizes, "float32" or "bfloat16", seed) -> a loaded policy."""


def _reset_peak_memory() -> None:
    """Resets VmHWM to the present size (Linux 4.0 or later)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Largest resident size of this process in bytes since `_reset_peak_memory`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def time_stages(sample: Sample, clock: Callable[[], int] = time.perf_counter_ns) -> dict[str, Any]:
    """Milliseconds per stage, by a clock in nanoseconds."""
    meter = StageMeter(clock)
    sample(meter)
    meter.enter("prefill")
    return {stage: total / 1e6 for stage, total in meter.totals.items()}


def count_operations(sample: Sample) -> dict[str, Any]:
    """Kernel-class operations per stage, and host syncs."""
    with OperationTrace() as trace:
        meter = StageMeter(lambda: trace.kernels)
        sample(meter)
        meter.enter("prefill")
    return {"kernels": meter.totals, "host_syncs": trace.host_syncs}


def profile_shares(sample: Sample) -> dict[str, Any]:
    """Shares of time in matrix products and in fused attention, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        sample(StageMeter(lambda: 0))
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(spent.values())
    return {
        "gemm_share": sum(spent.get(name, 0.0) for name in GEMMS) / total,
        "attention_share": spent.get(FUSED_ATTENTION, 0.0) / total,
    }


def sample_actions(sample: Sample) -> dict[str, Any]:
    """Actions and the process's peak memory in bytes while sampling."""
    _reset_peak_memory()
    actions = sample(StageMeter(lambda: 0))
    return {"actions": actions.tolist(), "peak_memory": _peak_memory()}


MEASUREMENTS: dict[str, Callable[[Sample], dict[str, Any]]] = {
    "time": time_stages,
    "cpu_time": partial(time_stages, clock=time.process_time_ns),
    "count": count_operations,
    "profile": profile_shares,
    "actions": sample_actions,
}


def serve(load: Load) -> None:
    """Answer requests until stdin ends. The process's argument is a JSON object with config, dtype, seed, threads."""
    answer = answer_on_stdout()
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    config, seed = settings["config"], settings["seed"]
    prepare = load(config, settings["dtype"], seed)
    answer(ready=True)
    sample: Sample | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            inputs = synthetic.observation(config, request["prompt_lengths"], seed)
            sample = prepare(inputs, request["steps"])
            answer(prepared=True)
        else:
            assert sample is not None
            answer(**MEASUREMENTS[request["do"]](sample))
