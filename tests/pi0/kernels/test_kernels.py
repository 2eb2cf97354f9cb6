"""The Triton kernels, without a GPU: what they compute (in Triton's interpreter), and that they compile."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.paths import ROOT
from support.pi0_models import small_config
from torch import nn

from dsrl_async.host.tracing import OperationTrace
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.sampler import Sampler

HERE = Path(__file__).parent
THERE = importlib.util.find_spec("triton") is not None
OLD = not THERE or tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
pytestmark = pytest.mark.skipif(not THERE, reason="needs triton")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(OLD, reason="the interpreter of older Triton does not take NumPy 2.4")
def test_parity_in_the_interpreter() -> None:
    """In a process of its own, since Triton decides at an import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "interpreted.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout


OPERATIONS = {
    *("rms_norm", "layer_norm", "rotate", "geglu", "attend", "normed_rotate", "normed_geglu", "silu_linear"),
    *("normed_linear", "quantise"),
}
SHARED_KB = {80: 163, 89: 99, 90: 227, 100: 227}
"""Shared memory that a program may have, by compute capability (CUDA C++ Programming Guide)."""


@pytest.mark.timeout(900)
def test_every_kernel_compiles_without_spills() -> None:
    """With both of Triton's assemblers. DSRL_ALL_KERNELS=1: for all targets, and every tile of a sample."""
    every = os.environ.get("DSRL_ALL_KERNELS") == "1"
    which = ["--targets", *map(str, SHARED_KB)] if every else ["--few", "--targets", "89", "100"]
    script = ROOT / "scripts" / "studies" / "compile_kernels.py"
    done = subprocess.run([sys.executable, str(script), "--json", *which], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == OPERATIONS
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] < 255, row
        assert row["shared_kb"] <= SHARED_KB[row["sm"]], row


def test_a_gpu_is_asked_for_gelu_behind_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's operation, given the same, has the other GELU, which is near enough to tell it from anything else."""
    from dsrl_async.pi0 import kernels

    linear, x = nn.Linear(6, 10), torch.randn(7, 6)
    calls: list[tuple[Any, Any]] = []
    operation = torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *given, **options: calls.append((given, options)))
    kernels._linear_gelu(x.to("meta"), linear)
    [((bias, _, weight), options)] = calls
    expected = F.gelu(linear(x), approximate="tanh")
    assert (operation(bias, x, weight, **options) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("pi05", [False, True])
def test_a_sample_can_be_captured_and_has_few_kernels(pi05: bool) -> None:
    """As far as shapes tell: nothing waits for the device, and a step has as many kernels as the docs say."""
    with torch.device("meta"):
        model = Pi0(small_config(pi05)).set_dtype(torch.bfloat16)
    steps, depth = 4, model.config.depth
    sampler = Sampler(model, 2, 8, steps, kernels="triton")
    with OperationTrace(guarded=True):
        sampler.encode()
    with OperationTrace(guarded=True) as denoise:
        sampler.denoise()
    layer = 7 if pi05 else 5  # pi0.5 adds its gated residuals by themselves
    assert denoise.kernels - 1 == steps * (depth * layer + (4 if pi05 else 5))
